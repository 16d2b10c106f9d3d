"""The sampling kernels against stage 1's `sample`, on a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.interface import Request, SamplingParams
from stages.stage1_naive.sampling import Filters, Sampled, SamplingBatch, gumbel_noise
from stages.stage1_naive.sampling import sample as plain

pytestmark = pytest.mark.gpu
CLOSE = 1e-4  # noisy scores nearer than this may come out in another order


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    from stages.stage5_overlap.kernels import sampling

    return sampling.sample(logits, batch, pdl=True)


def batch_of(params: list[SamplingParams], size: int) -> SamplingBatch:
    rows = [
        (Request(str(i), [1, 2, i % size], p, seed=(i << 40) - 7 * i), [3 % size, i % size])
        for i, p in enumerate(params)
    ]
    return SamplingBatch.of(rows, size, torch.device("cuda"))


def assert_same(logits: Tensor, batch: SamplingBatch) -> None:
    """Equal, but where stage 1's best two are a tie by rounding: at most one row of a hundred."""
    ours, theirs = sample(logits, batch), plain(logits, batch)
    other = (ours.tokens != theirs.tokens).nonzero().flatten().tolist()
    assert len(other) <= len(logits) // 100
    for row in other:
        scores = logits[row].float() / batch.temperature[row].clamp(min=1e-5)
        scores += gumbel_noise(batch.seeds, batch.positions, logits.shape[-1], torch.float32)[row]
        assert (scores[theirs.tokens[row]] - scores[ours.tokens[row]]).abs() < CLOSE
    if theirs.chosen is not None and not other:
        torch.testing.assert_close(ours.chosen, theirs.chosen)
        torch.testing.assert_close(ours.top_values, theirs.top_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "size"), [(1, 5), (7, 1000), (9, 4097), (200, 151_936)])
@pytest.mark.parametrize("scale", [0.5, 8.0])
def test_draws_are_those_of_stage_1(dtype: torch.dtype, rows: int, size: int, scale: float) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(rows, size + 3, device="cuda") * scale).to(dtype)[:, :size]  # rows have a stride
    params = [SamplingParams(temperature=[0.0, 0.6, 1.0, 2.5][i % 4]) for i in range(rows)]
    assert_same(logits, batch_of(params, size))


def test_the_first_of_equals_is_taken() -> None:
    logits = torch.zeros(3, 9000, device="cuda")
    logits[1, 5000:] = 1.0
    batch = batch_of([SamplingParams(temperature=0.0)] * 3, 9000)
    assert sample(logits, batch).tokens.tolist() == [0, 5000, 0]


FILTERS: list[dict[str, Any]] = [
    {"top_k": 1}, {"top_k": 3}, {"top_k": 50}, {"top_k": 4000}, {"top_p": 0.9}, {"top_p": 0.001},
    {"top_p": 0.999}, {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}, {},
    {"top_k": 2**31 - 1}, {"top_k": 7, "top_p": 0.5}, {"top_p": 0.0}, {"top_k": 9, "top_p": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [30, 5000, 151_936])
@pytest.mark.parametrize("scale", [0.0, 0.3, 4.0])
def test_what_is_kept_is_what_a_sort_keeps(dtype: torch.dtype, size: int, scale: float) -> None:
    """But for a token at the edge of top-p, whose sum of probabilities another order rounds differently."""
    from stages.stage5_overlap.kernels.sampling import thresholds

    torch.manual_seed(1)
    params = [SamplingParams(temperature=[0.7, 1.0, 3.0][i % 3], **f) for i, f in enumerate(FILTERS)]
    logits = (torch.randn(len(params), size, device="cuda") * scale).to(dtype)
    batch = batch_of(params, size)
    filters = batch.filters
    assert isinstance(filters, Filters)
    scaled = logits.float() / batch.temperature.unsqueeze(1)
    kept = filters.apply(scaled) > -torch.inf
    limits = thresholds(logits, batch.temperature, filters.top_k, filters.top_p, filters.min_p)
    ours = scaled >= limits.unsqueeze(1)
    probs = scaled.double().softmax(-1)
    for row in range(len(params)):
        edge = (ours[row] ^ kept[row]).nonzero().flatten()
        if params[row].top_p == 1.0:
            assert len(edge) == 0, params[row]
        elif len(edge):
            values = scaled[row][edge].unique()
            assert len(values) * probs[row][edge].max() < 2e-4, params[row]


@pytest.mark.parametrize("rows", [1, 40])
def test_everything_at_once(rows: int) -> None:
    torch.manual_seed(2)
    every = SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=0.3, logit_bias={3: 5.0, 8: -100.0}, logprobs=4,
    )  # fmt: skip
    greedy = replace(every, temperature=0.0, top_k=0, logit_bias={})
    params = [(every, greedy)[i % 2] for i in range(rows)]
    logits = (torch.randn(rows, 3000, device="cuda") * 3).to(torch.bfloat16)
    assert_same(logits, batch_of(params, 3000))
    bits = torch.randint(-(2**31), 2**31, (rows, 94), device="cuda").int()
    assert_same(logits, replace(batch_of(params, 3000), mask=bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [8, 60])
@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1}, {"top_k": 7, "top_p": 0.0}]
)
def test_no_token_of_logits_that_are_no_numbers(rows: int, dtype: torch.dtype, filters: Any) -> None:
    """Greedy or not, wherever they are; the rows beside them draw what they do without them."""
    torch.manual_seed(0)
    logits = torch.randn(rows, 9000, device="cuda").to(dtype)
    batch = batch_of([SamplingParams(temperature=(i % 4) / 2, **filters) for i in range(rows)], 9000)
    expected = sample(logits, batch).tokens
    for row in range(0, rows, 2):
        logits[row, (row * 997) % 9000] = torch.nan if row % 4 else torch.inf
    logits[0], logits[2] = torch.nan, -torch.inf
    assert (expected >= 0).all()
    expected[::2] = -1
    assert sample(logits, batch).tokens.tolist() == expected.tolist() == plain(logits, batch).tokens.tolist()


@pytest.mark.parametrize("rows", [1, 9])
def test_shares_of_the_vocabulary_draw_what_the_whole_does(rows: int) -> None:
    """Each rank has the logits of some tokens, and all have every rank's candidates."""
    from stages.stage5_overlap.kernels.sampling import draw

    torch.manual_seed(0)
    size, ranks = 20_000, 4
    logits = torch.randn(rows, size, device="cuda").bfloat16()
    logits[0, 4999:5001] = 20.0  # equals, of two ranks: the first is taken
    if rows > 1:
        logits[1, 12_345], logits[2, 7] = torch.nan, torch.inf
    heat = torch.tensor([0.0, 0.7, 1.0] * rows, device="cuda")[:rows]
    low, high, positions = torch.randint(0, 1000, (3, rows), device="cuda", dtype=torch.int32)
    whole = torch.empty(rows, dtype=torch.int64, device="cuda")
    draw(logits, heat, low, high, positions, None, whole, pdl=True)
    gathered: list[Tensor] = []

    def gather(candidates: Tensor) -> Tensor:
        gathered.append(candidates)
        return torch.cat(gathered, dim=1)

    tokens, newest = torch.empty_like(whole), torch.full((rows,), -7, device="cuda")
    slots = torch.arange(rows, device="cuda", dtype=torch.int32)
    for rank, share in enumerate(logits.chunk(ranks, dim=1)):
        first = rank * size // ranks
        draw(share, heat, low, high, positions, None, tokens, newest, slots, True, first, gather)
    assert tokens.tolist() == whole.tolist()
    assert [token == -1 for token in tokens.tolist()] == [row in (1, 2) for row in range(rows)]
    assert newest.tolist() == tokens.clamp(min=0).tolist()
    assert tokens[0] == 4999

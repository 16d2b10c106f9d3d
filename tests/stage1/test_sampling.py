"""Whether tokens are drawn with the probabilities that the parameters promise, and from nothing else."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from stages.interface import Request, SamplingParams
from stages.stage1_naive.mask import RequestMask, apply_mask, needs_mask
from stages.stage1_naive.sampling import SamplingBatch, gumbel_noise, sample
from tests.stage1.test_filters import kept, penalised, softmax

CPU = torch.device("cpu")
DRAWS = 20_000
SURE = 1e-4  # a right sampler fails a test once in 10,000 choices of seeds; the seeds are fixed
LOGITS = [2.0, 1.4, 1.0, 0.3, 0.1, -0.5, -0.6, -1.5, -3.0, -4.0]
PROMPT, OUTPUT = [1, 5, 5, 8], [0, 0, 0, 2, 5]

CASES = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=2.5),
    "top_k": SamplingParams(top_k=4),
    "top_k 1": SamplingParams(top_k=1),
    "top_p": SamplingParams(top_p=0.8),
    "tiny top_p": SamplingParams(top_p=1e-9),
    "no top_p": SamplingParams(top_p=0.0),
    "min_p": SamplingParams(min_p=0.2),
    "frequency": SamplingParams(frequency_penalty=0.7),
    "negative frequency": SamplingParams(frequency_penalty=-0.4),
    "presence": SamplingParams(presence_penalty=1.5),
    "repetition": SamplingParams(repetition_penalty=1.8),
    "bias": SamplingParams(logit_bias={0: -3.0, 7: 2.5, 9: 4.0}),
    "all but one biased": SamplingParams(logit_bias={token: -100.0 for token in range(10) if token != 8}),
    "everything": SamplingParams(
        temperature=1.4,
        top_k=7,
        top_p=0.93,
        min_p=0.05,
        frequency_penalty=0.3,
        presence_penalty=-0.5,
        repetition_penalty=1.3,
        logit_bias={3: 1.0},
        logprobs=3,
    ),
    "allowed": SamplingParams(allowed_token_ids=[1, 4, 8], top_p=0.9),
    "bad words": SamplingParams(bad_words_ids=[[0], [5, 2], [0, 5, 1], [5, 5, 3]], logit_bias={9: 5.0}),
    "no end yet": SamplingParams(min_tokens=6, stop_token_ids=[1], temperature=1.3),
    "no end any more": SamplingParams(min_tokens=5, stop_token_ids=[1]),
    "greedy": SamplingParams(temperature=0.0),
    "nearly greedy": SamplingParams(temperature=1e-30, top_p=0.9),
    "logprobs": SamplingParams(logprobs=5),
}
# A seed is any int64; where a request stands in its sequence is its second coordinate.
DIRECTIONS = {
    "seeds": (torch.arange(DRAWS), torch.full((DRAWS,), 17)),
    "positions": (torch.full((DRAWS,), -(2**63)), torch.arange(DRAWS)),
    "high bits": (torch.arange(DRAWS) << 32, torch.zeros(DRAWS, dtype=torch.int64)),
    "diagonal": (torch.arange(DRAWS), torch.arange(DRAWS)),
}


def draw(params: SamplingParams, direction: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """DRAWS tokens of one request in one state, [DRAWS]."""
    batch = SamplingBatch.of([(Request("r", PROMPT, params), OUTPUT)] * DRAWS, len(LOGITS), CPU)
    seeds, positions = DIRECTIONS[direction]
    batch = dataclasses.replace(batch, seeds=seeds, positions=positions)
    if needs_mask(params, len(OUTPUT)):
        row = RequestMask(params, len(LOGITS), params.stop_token_ids).row(PROMPT + OUTPUT, len(PROMPT))
        batch = dataclasses.replace(batch, mask=torch.from_numpy(row).expand(DRAWS, -1))
    return sample(torch.tensor([LOGITS] * DRAWS, dtype=dtype), batch).tokens


def may_come(token: int, params: SamplingParams) -> bool:
    after = [*OUTPUT, token]
    return not (
        (params.allowed_token_ids is not None and token not in params.allowed_token_ids)
        or any(after[-len(word) :] == list(word) for word in params.bad_words_ids)
        or (token in params.stop_token_ids and len(OUTPUT) < params.min_tokens)
    )


def promised(params: SamplingParams) -> np.ndarray:
    """The probability of each token, computed exactly."""
    logits = [x if may_come(token, params) else -np.inf for token, x in enumerate(LOGITS)]
    logits = penalised(logits, params, PROMPT, OUTPUT)
    scaled = [logit / max(params.temperature, 1e-5) for logit in logits]
    left = kept(scaled, params.top_k, params.top_p, params.min_p)
    return np.array(softmax([x if token in left else -np.inf for token, x in enumerate(scaled)]))


def assert_distributed(tokens: Tensor, probs: np.ndarray) -> None:
    """Chi-square; tokens expected fewer than five times are pooled, as the test wants it."""
    counts = np.bincount(tokens.numpy(), minlength=len(probs)).astype(float)
    assert counts[probs == 0].sum() == 0, "a token was drawn that had been cut"
    expected = probs * len(tokens)
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert counts[-1] <= 25 + 5 * expected[-1]
    counts, expected = counts[expected > 1], expected[expected > 1]
    if len(counts) > 1:
        assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > SURE


@pytest.mark.parametrize(
    ("case", "direction"),
    [(case, "seeds") for case in CASES] + [(c, d) for c in ("plain", "everything") for d in DIRECTIONS][1:],
)
def test_tokens_have_the_promised_probabilities(case: str, direction: str) -> None:
    assert_distributed(draw(CASES[case], direction), promised(CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_draw_alike(dtype: torch.dtype) -> None:
    rounded = torch.tensor(LOGITS).to(dtype).tolist()
    assert_distributed(draw(SamplingParams(), "seeds", dtype), np.array(softmax(rounded)))


def test_the_test_notices_a_slight_error() -> None:
    """A tenth more heat must fail, or the tests above prove nothing."""
    with pytest.raises(AssertionError):
        assert_distributed(draw(SamplingParams(temperature=1.1), "seeds"), promised(SamplingParams()))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_successive_draws_are_independent(direction: str) -> None:
    tokens = draw(SamplingParams(temperature=2.0, top_k=5), direction).numpy()
    for distance in (1, 2, 64):
        table = np.zeros((5, 5))
        np.add.at(table, (tokens[:-distance], tokens[distance:]), 1)
        assert stats.chi2_contingency(table).pvalue > SURE


def uniform(seeds: Tensor, positions: Tensor, vocab: int) -> np.ndarray:
    """The noise as numbers that must be uniform on (0, 1), [R, V]."""
    noise = gumbel_noise(seeds, positions, vocab, torch.float64).numpy()
    return np.exp(-np.exp(-noise))


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x5BD1E995, 0x5BD1E995 << 32)


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_uniform_over_the_vocabulary(seed: int) -> None:
    row = uniform(integers(seed), integers(0), 150_000)[0]
    assert stats.kstest(row, "uniform").pvalue > SURE
    assert len(np.unique(row)) > 149_000  # no two tokens share their noise, but by chance


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_noise_is_uniform_over_rows(direction: str) -> None:
    seeds, positions = DIRECTIONS[direction]
    for token, column in enumerate(uniform(seeds, positions, 4).T):
        assert stats.kstest(column, "uniform").pvalue > SURE, f"token {token}"


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard deviations of what independent numbers would show."""
    return abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1])) * float(np.sqrt(a.size))


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_have_independent_noise(seed: int) -> None:
    grid = uniform(torch.full((64,), seed), torch.arange(64), 4096)  # [position, token]
    others = integers(*((s & (2**63 - 1)) ^ 1 for s in (seed,)), seed ^ (1 << 40), ~seed).repeat_interleave(
        64
    )
    assert correlation(grid[:, 1:], grid[:, :-1]) < 5
    assert correlation(grid[1:], grid[:-1]) < 5
    assert correlation(grid[1:, 1:], grid[:-1, :-1]) < 5
    for shift in (1, 8, 32):  # positions and tokens that differ in one bit
        assert correlation(grid, grid[np.arange(64) ^ shift]) < 5 * np.sqrt(2)  # each pair occurs twice
        assert correlation(grid, grid[:, np.arange(4096) ^ shift]) < 5 * np.sqrt(2)
    for other in uniform(others, torch.arange(64).repeat(3), 4096).reshape(3, 64, 4096):
        assert correlation(grid, other) < 5


def test_seeds_with_swapped_halves_differ() -> None:
    a, b = uniform(integers(7 << 32 | 9, 9 << 32 | 7), integers(3, 3), 50_000)
    assert correlation(a, b) < 5


def test_no_two_drawn_seeds_share_their_noise() -> None:
    """A key of 32 bits would let some forty pairs of these rows, and so of texts, be the same."""
    rows = 600_000
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(0))
    noise = gumbel_noise(seeds, torch.full((rows,), 9), 3, torch.float64)
    assert len(noise.unique(dim=0)) == rows


def test_float32_noise_is_the_float64_noise_rounded() -> None:
    args = torch.arange(200), torch.arange(200), 5000
    wide, narrow = gumbel_noise(*args, torch.float64), gumbel_noise(*args, torch.float32)
    assert narrow.isfinite().all()
    error = (narrow.double() - wide).abs()
    assert error[wide > -1].max() < 1e-5  # where tokens are won
    assert error.max() < 1e-2  # the smallest of the noise is coarse: it wins nothing


def mixed_rows() -> list[tuple[Request, list[int]]]:
    seeds = [*SEEDS, *range(100, 100 + len(CASES))]
    return [
        (Request(name, PROMPT[: n % 3 + 1], params, seed=seeds[n]), OUTPUT[: n % 5])
        for n, (name, params) in enumerate(CASES.items())
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab", [10, 1000])
def test_a_row_is_the_same_alone_and_in_any_batch(dtype: torch.dtype, vocab: int) -> None:
    """To the last bit, whatever the neighbours ask for."""
    rows = mixed_rows()
    logits = (torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    for trial in range(8):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trial))[: 3 * trial + 2]
        picked = [rows[n] for n in order.tolist()]
        together = sample(logits[order], SamplingBatch.of(picked, vocab, CPU))
        for place, n in enumerate(order.tolist()):
            alone = sample(logits[n : n + 1], SamplingBatch.of([rows[n]], vocab, CPU))
            assert together.tokens[place] == alone.tokens[0]
            wanted = rows[n][0].params.logprobs
            if wanted is not None:
                assert together.logprobs(place, wanted) == alone.logprobs(0, wanted)


def test_the_position_is_where_the_token_will_stand() -> None:
    """So a preempted request that is read again, its output now part of the context, draws the same."""
    rows = [(Request("r", list(range(5)), SamplingParams(), seed=3), [1] * n) for n in (0, 1, 7)]
    assert SamplingBatch.of(rows, 10, CPU).positions.tolist() == [5, 6, 12]


def test_greedy_has_no_noise() -> None:
    logits = torch.randn(300, 50)
    rows = [(Request("r", [0], SamplingParams(temperature=0.0), seed=n), []) for n in range(300)]
    assert torch.equal(sample(logits, SamplingBatch.of(rows, 50, CPU)).tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e-5, 1e-4, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e30])
def test_extreme_logits_and_temperatures(temperature: float, scale: float) -> None:
    logits = torch.tensor([[-1.0, 0.0, 3.0, 1.0, float("-inf")]]) * scale
    make: Callable[..., Request] = Request
    row = make("r", [0], SamplingParams(temperature=temperature, top_p=0.999, logprobs=2), seed=5)
    sampled = sample(logits, SamplingBatch.of([(row, [])], 5, CPU))
    assert sampled.tokens.item() != 4
    assert sampled.tokens.item() == 2 or scale / temperature < 10
    assert not np.isnan(sampled.logprobs(0, 2).chosen)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES)
def test_logits_that_are_no_numbers_draw_nothing(case: str, wrong: float) -> None:
    """Wherever they are in the row; and the rows beside it draw what they do without it."""
    logits = torch.tensor([LOGITS] * 12)
    batch = SamplingBatch.of(
        [(Request("r", PROMPT, CASES[case], seed=n), OUTPUT) for n in range(12)], 10, CPU
    )
    expected = sample(logits, batch).tokens
    for token in range(10):
        logits[token, token] = wrong
    logits[10] = -torch.inf
    sampled = sample(logits, batch)
    assert sampled.tokens.tolist() == [*[-1] * 11, int(expected[11])]


def test_a_mask_hides_no_wrong_logit_and_may_leave_nothing() -> None:
    logits = torch.tensor([LOGITS] * 4)
    logits[1, 3], logits[2, 3] = torch.nan, torch.inf
    batch = SamplingBatch.of([(Request("r", PROMPT, SamplingParams()), [])] * 4, 10, CPU)
    mask = torch.tensor([[1 << 7]] * 3 + [[0]], dtype=torch.int32)
    assert sample(logits, dataclasses.replace(batch, mask=mask)).tokens.tolist() == [7, -1, -1, -1]


@given(
    st.integers(1, 70), st.lists(st.integers(0, 5), max_size=12),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=8),
    st.none() | st.sets(st.integers(0, 5), min_size=1), st.sets(st.integers(0, 9), max_size=3),
    st.integers(0, 8), st.integers(0, 4),
)  # fmt: skip
def test_masks_equal_their_definition(
    more: int, output: list[int], words: list[list[int]], allowed: set[int] | None, stops: set[int],
    least: int, prompt: int,
) -> None:  # fmt: skip
    """The same object makes the rows of all lengths of one output, in any order."""
    vocab = 5 + more
    params = SamplingParams(
        allowed_token_ids=None if allowed is None else list(allowed), bad_words_ids=words, min_tokens=least
    )
    mask = RequestMask(params, vocab, stops)
    for length in (*range(len(output) + 1), 0):
        tokens = [*[3] * prompt, *output[:length]]
        bits = torch.from_numpy(mask.row(tokens, prompt)).unsqueeze(0)
        assert bits.shape == (1, -(-vocab // 32))
        may = apply_mask(torch.zeros(1, vocab), bits)[0] == 0
        for token in range(vocab):
            after = [*output[:length], token]
            wrong = any(after[-len(word) :] == word for word in words)
            early = token in stops and length < least
            assert bool(may[token]) == (not wrong and not early and (allowed is None or token in allowed))

"""The parts of stage 2, each by itself."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.interface import Request, SamplingParams
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.sampling import SamplingBatch, sample
from stages.stage2_paged.assembly import EngineConfig, load, measure_pages
from stages.stage2_paged.attention import choice
from stages.stage2_paged.attention.torch import TorchAttention
from stages.stage2_paged.batch import Batch, Row, Sequence
from stages.stage2_paged.inputs import Slots
from stages.stage2_paged.kv_cache import PageAllocator
from stages.stage2_paged.sampler import Sampler
from stages.stage2_paged.scheduler import Scheduler
from tests.oracle import random_request
from tests.stage2.attention_case import KV_HEADS, make_case, shapes

CPU = torch.device("cpu")
VOCAB = 40


def a_sequence(prompt: list[int], output: list[int], pages: list[int], slot: int, **params: Any) -> Sequence:
    request = Request("a", prompt, SamplingParams(**params))
    tokens = [*prompt, *output]
    return Sequence(request, 0, 99, tokens, len(tokens), slot=slot, pages=pages)


def test_pages_are_taken_once_and_come_back() -> None:
    pages = PageAllocator(5)
    first, second = pages.take(2), pages.take(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pages.free == 0
    pages.give(second)
    assert pages.free == 3
    assert sorted(pages.take(3)) == sorted(second)
    assert pages.take(0) == []


def test_upload_of_a_mixed_batch() -> None:
    slots = Slots(4, 8, 4, 99, Sampler(VOCAB, 4, CPU), CPU)
    old = a_sequence([1, 2, 3], [], [7], slot=2)
    slots.upload(Batch([Row(old, 2, 0, 3, 0, True)], 0))
    slots.remember(torch.tensor([2]), torch.tensor([33]))
    old.pages.append(5)
    old.tokens += [33]
    new = a_sequence([10, 11, 12, 13, 14, 15], [], [3, 1], slot=0)
    ahead = Row(old, 2, 4, 1, 1, True)  # its token at 4 is only on the device
    step = slots.upload(Batch([ahead, Row(new, 0, 0, 6, 0, True)], 1))
    assert step.token_ids.tolist() == [33, 10, 11, 12, 13, 14, 15]
    assert step.positions.tolist() == [4, 0, 1, 2, 3, 4, 5]
    assert step.locations.tolist() == [20, 12, 13, 14, 15, 4, 5]
    assert step.sampled_positions.tolist() == [0, 6]
    assert step.samples.slots.tolist() == [2, 0]
    assert step.samples.batch.positions.tolist() == [5, 6]
    assert step.num_decode == 1
    assert step.decode is not None
    assert step.prefill is not None
    assert step.decode.page_tables.tolist() == [[7, 5]]
    assert step.prefill.page_tables.tolist() == [[3, 1]]
    assert [rows.query_starts.tolist() for rows in (step.decode, step.prefill)] == [[0, 1], [0, 6]]
    assert [rows.kv_lengths.tolist() for rows in (step.decode, step.prefill)] == [[5], [6]]
    assert (step.prefill.query_lengths, step.prefill.host_kv_lengths) == ([6], [6])


def test_rows_that_sample_nothing() -> None:
    """Stage 4 cuts prompts: a step may be all middle pieces."""
    slots = Slots(2, 4, 4, 9, Sampler(VOCAB, 2, CPU), CPU)
    step = slots.upload(Batch([Row(a_sequence([1, 2, 3], [], [0], 1), 1, 0, 2, 0, False)], 0))
    assert step.sampled_positions.tolist() == step.samples.slots.tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_the_sampler_samples_as_stage_1(seed: int) -> None:
    """Slots are taken over again and again: whoever had one before leaves nothing behind."""
    rng, sampler = random.Random(seed), Sampler(VOCAB, 4, CPU)
    torch.manual_seed(seed)
    for _ in range(4):
        rows, known = [], []
        for slot in rng.sample(range(4), rng.randint(1, 4)):
            request = random_request(rng, "a", range(1, 9), VOCAB)
            request = dataclasses.replace(request, seed=rng.randint(-(2**63), 2**63 - 1))
            output = rng.choices(range(VOCAB), k=rng.randint(0, 5))
            tokens = [*request.prompt, *output]
            sequence = Sequence(request, 0, 99, tokens, len(tokens), slot=slot)
            sampler.enter(slot, sequence)
            rows.append(Row(sequence, slot, 0, len(tokens), 0, True))
            known.append((request, output))
        for _ in range(3):  # counts are kept on the device from here on
            logits = torch.randn(len(rows), VOCAB, dtype=torch.float64) * 3
            now = [dataclasses.replace(r, length=len(r.sequence.tokens)) for r in rows]
            inputs = sampler.unpack(now, torch.from_numpy(sampler.pack(now)))
            ours = sampler.sample(logits, inputs)
            theirs = sample(logits, SamplingBatch.of(known, VOCAB, CPU))
            for a, b in zip(dataclasses.astuple(ours), dataclasses.astuple(theirs), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
            for row, (_, output), token in zip(rows, known, ours.tokens.tolist(), strict=True):
                row.sequence.tokens.append(token)
                output.append(token)


def heads(path: Path, ratio: int, head_dim: int) -> ModelConfig:
    return dataclasses.replace(
        ModelConfig.load(path), num_heads=KV_HEADS * ratio, num_kv_heads=KV_HEADS, head_dim=head_dim
    )


@pytest.mark.parametrize("kind", ["decode", "prefill", "extend"])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(("ratio", "head_dim"), [(1, 64), (2, 128), (5, 64), (8, 128)])
def test_torch_attention_is_attention(
    checkpoint: Callable[[str], Path], ratio: int, head_dim: int, page_size: int, kind: str
) -> None:
    lengths = shapes(page_size)[kind]
    if kind != "decode":
        lengths = lengths[:5]  # the check is slow
    config = heads(checkpoint("qwen3"), ratio, head_dim)
    case = make_case(config, lengths, page_size, torch.float64, "cpu")
    backend = TorchAttention(case.cache)
    backend.plan(case.rows)
    torch.testing.assert_close(backend.attend(config.num_layers - 1, case.q), case.expected)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("triton", "no attention backend 'triton'; there are torch, flash_attn, flashinfer"),
        ("torch,", "no attention backend ''"),
        ("torch,torch,torch", "one backend, or two as PREFILL,DECODE"),
        ("flashinfer", "flashinfer needs its package installed, a GPU, .*this is cpu with float32"),
        ("torch,flash_attn", "flash_attn needs"),
    ],
)
def test_backends_that_cannot_be(flag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choice.choose(flag, CPU, torch.float32)


def test_backends_that_can() -> None:
    assert choice.choose(None, CPU, torch.bfloat16) == ("torch", "torch")
    assert choice.choose("torch", CPU, torch.float32) == ("torch", "torch")
    assert choice.pick_page_size(None, ("torch", "torch")) == 16
    with pytest.raises(ValueError, match="pages of 1, 16, 64, 128, 256 tokens, not 17"):
        choice.pick_page_size(17, ("torch", "torch"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pages": 0}, "num_pages must be at least 1, not 0"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"max_rows": 9, "prefill_budget": 8}, r"prefill_budget \(8\) must be at least max_rows \(9\)"),
        ({"memory_fraction": 0.0}, "memory_fraction"),
        ({"memory_fraction": 1.01}, "memory_fraction"),
    ],
)
def test_what_cannot_be_configured(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="any", **settings)


def test_pages_on_a_cpu(checkpoint: Callable[[str], Path]) -> None:
    def pages(**settings: Any) -> int:
        config = EngineConfig(model=str(checkpoint("qwen3")), device="cpu", **settings)
        return measure_pages(config, load(config), Scheduler)

    assert pages(num_pages=7) == 7
    assert pages(max_rows=3, max_context=33, page_size=16) == 9  # more could not be used

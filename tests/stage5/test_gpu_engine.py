"""Stage 5 where it is at home: captured steps, fused kernels, and a host that is always one step ahead."""

import random
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.interface import Engine, Request, SamplingParams
from stages.stage2_paged.engine import EngineConfig as PagedConfig
from stages.stage2_paged.engine import build as build_stage2
from stages.stage5_overlap.engine import EngineConfig, build
from stages.stage5_overlap.fused import KERNELS
from stages.stage5_overlap.graph_runner import GraphRunner
from tests.checkpoints import EOS, VOCAB_SIZE, write_checkpoint
from tests.oracle import run_engine
from tests.stage2.bad_case import write_bad
from tests.stage2.gpu_case import (
    Scores,
    assert_alike,
    assert_bad_neighbours_do_no_harm,
    available,
    forced,
    mixed_lengths,
    score,
    with_mask,
)

pytestmark = pytest.mark.gpu
STEM = 100  # tokens that most prompts share
TIGHT = 30  # pages: hardly more than the longest request needs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bf16"), "qwen3", head_dim=64, initializer_range=0.1)


@pytest.fixture(scope="module")
def expected(model: Path) -> Scores:
    config = PagedConfig(model=str(model), device="cuda", dtype="bfloat16", attention="torch", num_pages=2000)
    return score(build_stage2(config), forced(mixed_lengths(64), STEM))


def make(model: Path, **more: Any) -> Engine:
    settings: dict[str, Any] = {"page_size": 16, "num_pages": 2000, "max_rows": 32, "prefill_budget": 100}
    return build(EngineConfig(model=str(model), device="cuda", dtype="bfloat16", **(settings | more)))


@pytest.mark.parametrize("num_pages", [2000, TIGHT])
@pytest.mark.parametrize("fused", ["all", "none", *(f"-{name}" for name in KERNELS), *KERNELS])
def test_scores_are_those_of_stage_2(model: Path, expected: Scores, fused: str, num_pages: int) -> None:
    engine = make(model, fused=fused, num_pages=num_pages)
    assert_alike(score(engine, forced(mixed_lengths(64), STEM)), expected)
    assert (engine.statistics.preemptions > 0) == (num_pages == TIGHT)


@pytest.mark.parametrize("attention", ["torch", "flashinfer", "flash_attn"])
@pytest.mark.parametrize(("overlap", "graphs"), [(True, False), (False, True), (False, False), (True, True)])
def test_scores_with_parts_switched_off(
    model: Path, expected: Scores, attention: str, overlap: bool, graphs: bool
) -> None:
    if why := available(attention):
        pytest.skip(why)
    engine = make(model, attention=attention, overlap=overlap, graphs=graphs)
    assert_alike(score(engine, forced(mixed_lengths(64), STEM)), expected)


@pytest.mark.parametrize(("overlap", "graphs"), [(True, True), (True, False), (False, True)])
def test_a_mask_forces_what_a_bias_does(model: Path, expected: Scores, overlap: bool, graphs: bool) -> None:
    """Every second request has one; the others are beside them in the same batches."""
    requests = [
        with_mask(request) if i % 2 else request for i, request in enumerate(forced(mixed_lengths(64), STEM))
    ]
    assert_alike(score(make(model, overlap=overlap, graphs=graphs), requests), expected)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_first_end_after_min_tokens(model: Path, overlap: bool) -> None:
    """A step's mask is made of the tokens before it, and a request behind its masks is replayed plainly."""
    params = SamplingParams(temperature=0.8, logit_bias={EOS: 100.0}, max_tokens=30)
    requests = [Request(str(i), [i + 1, 2], replace(params, min_tokens=i), seed=i) for i in range(20)]
    pairs = replace(params, logit_bias={}, allowed_token_ids=[5, 6], bad_words_ids=[[5, 5], [6, 6]])
    requests += [Request(f"pairs {i}", [i, i], pairs, seed=i) for i in range(6)]
    outputs = run_engine(make(model, overlap=overlap), requests)
    for i in range(20):
        assert [output.token_id == EOS for output in outputs[str(i)]] == [False] * i + [True]
    for i in range(6):
        tokens = [output.token_id for output in outputs[f"pairs {i}"]]
        assert tokens in ([5, 6] * 15, [6, 5] * 15)


@pytest.mark.parametrize("fused", ["all", "-decode", "none"])
@pytest.mark.parametrize("attention", ["torch", "flashinfer", "flash_attn"])
def test_nan_beside_does_no_harm(tmp_path: Path, attention: str, fused: str) -> None:
    if why := available(attention):
        pytest.skip(why)
    bad_model = write_bad(tmp_path, "qwen3", head_dim=64, initializer_range=0.1)
    engine, fresh = (make(bad_model, attention=attention, fused=fused, num_pages=90) for _ in range(2))
    assert_bad_neighbours_do_no_harm(engine, fresh, mixed_lengths(64), STEM)


def test_scores_of_a_prompt_are_those_of_stage_2(model: Path) -> None:
    """In chunks, on fused kernels, beside others; nothing of it is taken from the prefix cache."""
    asked = [
        replace(request, params=replace(request.params, prompt_logprobs=3))
        for request in forced(mixed_lengths(24), STEM)
    ]
    plain = PagedConfig(model=str(model), device="cuda", dtype="bfloat16", attention="torch", num_pages=2000)
    found = []
    for engine in (build_stage2(plain), make(model)):
        outputs = run_engine(engine, asked)
        found.append(torch.tensor([s.chosen for r in asked for s in outputs[r.id][0].prompt_logprobs or ()]))
        assert engine.statistics.cached_tokens == 0
    assert len(found[0]) == sum(len(request.prompt) - 1 for request in asked)
    assert_alike(([], found[1]), ([], found[0]))


@pytest.mark.parametrize("family", ["llama3-rope", "qwen2", "mistral"])
def test_other_families(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(tmp_path, family, head_dim=64, initializer_range=0.1)
    plain = build_stage2(
        PagedConfig(model=str(folder), device="cuda", dtype="bfloat16", attention="torch", num_pages=2000)
    )
    assert_alike(score(make(folder), forced(mixed_lengths(24))), score(plain, forced(mixed_lengths(24))))


def test_a_replay_is_the_eager_step_at_every_size(model: Path) -> None:
    """Equal at the padded size; with fewer rows than the graph has, within what bfloat16 rounds."""
    engine: Any = make(model, max_rows=80)
    runner = engine._runner
    assert isinstance(runner, GraphRunner)
    table = runner._slots.page_table
    torch.manual_seed(0)
    cache = engine._runner._decode._cache
    cache.keys.normal_()
    cache.values.normal_()
    for size, graph in runner._graphs.items():
        with torch.inference_mode():
            table[:80, :25] = torch.arange(2000).view(80, 25)  # rows share no page
            packed = graph.packed
            packed.zero_()
            packed[0] = torch.randint(0, VOCAB_SIZE, (size,))
            packed[1] = -1  # no new page
            packed[3] = torch.arange(size)
            packed[4] = torch.randint(1, 300, (size,))  # where the token drawn will stand
            packed[8] = torch.full((size,), 0.8).view(torch.int32)
            logits, tokens = (x.clone() for x in runner._step(packed))
            graph.graph.replay()
            assert torch.equal(graph.logits, logits)
            assert torch.equal(graph.tokens, tokens)
            fewer = packed[:, : max(1, size - 5)].contiguous()
            torch.testing.assert_close(runner._step(fewer)[0], logits[: fewer.shape[1]], rtol=0.05, atol=0.1)


def test_sampled_tokens_do_not_depend_on_graphs_or_overlap(model: Path) -> None:
    """Seeded sampling from graphs of one size, replayed late, and from eager steps of that size (which have
    no kernels for a whole layer)."""
    params = SamplingParams(temperature=0.9, max_tokens=60, ignore_eos=True)
    requests = [Request(str(i), [i + 1, 2, 3], params, seed=i) for i in range(16)]
    said = []
    for overlap, graphs in ((True, True), (False, True), (True, False)):
        engine = make(
            model, max_rows=16, overlap=overlap, graphs=graphs, fused="-layer"
        )  # graphs alone have it
        for request in requests:
            engine.add(request)
        outputs: dict[str, list[int]] = {}
        while engine.has_work:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output.token_id)
        said.append(outputs)
    assert said[0] == said[1] == said[2]


def test_ten_thousand_requests_leave_no_page_owned(model: Path) -> None:
    rng = random.Random(0)
    engine = make(model, num_pages=120, max_rows=24)
    alive, added = set[str](), 0
    while added < 10_000 or engine.has_work:
        for _ in range(rng.randint(0, 4) if added < 10_000 else 0):
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.8]), max_tokens=rng.randint(1, 30),
                top_k=rng.choice([0, 0, 0, 5]), top_p=rng.choice([1.0, 1.0, 0.9]),
                presence_penalty=rng.choice([0.0, 0.0, 0.0, 1.0]),
            )  # fmt: skip
            stem = [rng.randrange(3)] * rng.randint(0, 60)
            prompt = [*stem, *rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 60))]
            engine.add(Request(str(added), prompt, params, seed=added))
            alive.add(str(added))
            added += 1
        for output in engine.step():
            assert output.request_id in alive
            if output.finish_reason:
                alive.remove(output.request_id)
        if alive and rng.random() < 0.2:
            gone = rng.choice(sorted(alive))
            engine.abort(gone)
            alive.remove(gone)
    assert not alive
    counted = engine.statistics
    assert counted.free_pages + counted.cached_pages == counted.pages
    assert counted.evicted_pages > 0


def test_memory_does_not_grow(model: Path) -> None:
    """100,000 steps; the first tenth may fill caches."""
    engine = make(model, num_pages=400, max_rows=2)
    params = SamplingParams(temperature=0.8, max_tokens=500, ignore_eos=True)
    memory = []
    for step in range(100_000):
        if engine.statistics.running < 2 and not engine.statistics.waiting:
            engine.add(Request(str(step), [step % VOCAB_SIZE, 1], replace(params, seed=step), seed=step))
        engine.step()
        if step in (10_000, 99_999):
            memory.append((torch.cuda.memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    assert memory[1][0] <= memory[0][0]
    assert memory[1][1] - memory[0][1] < 20_000, "kilobytes of the host's memory"

"""A vocabulary that ranks cannot share evenly, and biases that only one of them may add."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.interface import Request, SamplingParams
from stages.stage1_naive.config import ModelConfig
from stages.stage2_paged.assembly import load, load_whole
from stages.stage2_paged.engine import EngineConfig as PagedConfig
from stages.stage2_paged.engine import build as build_stage2
from stages.stage5_overlap import engine as stage5
from stages.stage5_overlap.graph_runner import VocabularyShare
from stages.stage6_parallel.sharding import Shard, check_divisible
from tests.checkpoints import write_checkpoint
from tests.oracle import assert_same_outputs, run_engine, tokens_of
from tests.stage2.gpu_case import assert_alike, forced, mixed_lengths, score
from tests.stage2.oracle_case import CONTEXT, oracle, settings, sharing
from tests.stage6 import cases
from tests.stage6.ranks import Ranks

ODD = 323  # tokens; two ranks have 162 of them and 161, four 81 and 80
CPU = torch.device("cpu")
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama3-rope", {"attention_bias": True}),
    "qwen3": ("qwen3", {"attention_bias": True}),
}


@pytest.fixture(scope="module", params=SHAPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, biases = SHAPES[request.param]
    return write_checkpoint(tmp_path_factory.mktemp("uneven"), family, vocab_size=ODD, **biases)


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_add_up(path: Path, size: int) -> None:
    config = ModelConfig.load(path)
    check_divisible(config, size)
    whole = load_whole(path, config, torch.float32, CPU)
    parts = [Shard(rank, size).load(path, config, torch.float32, CPU) for rank in range(size)]
    assert {len(part.head) for part in parts} == {len(part.embedding) for part in parts} == {-(-ODD // size)}
    for name in ("embedding", "head"):
        rows = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(rows[:ODD], getattr(whole, name))
        assert rows[ODD:].count_nonzero() == 0
    assert {part.config.vocab_size for part in parts} == {ODD}
    for i, layer in enumerate(whole.layers):
        for name in ("o_bias", "down_bias"):
            biases = [getattr(part.layers[i], name) for part in parts]
            expected = getattr(layer, name)
            assert expected is None or torch.equal(torch.stack(biases).sum(0), expected)
        if layer.gate_up_bias is not None:
            shares = [part.layers[i].gate_up_bias.chunk(2) for part in parts]  # type: ignore[union-attr]
            assert torch.equal(
                torch.cat([torch.cat(x) for x in zip(*shares, strict=True)]), layer.gate_up_bias
            )


def test_two_ranks_say_what_one_does(path: Path, ranks: Callable[[int], Ranks]) -> None:
    """Also hot, where any token is drawn; and with log-probabilities, which the padding has no part in."""
    requests = sharing(random.Random(0), 8, CONTEXT)
    hot = SamplingParams(
        temperature=100.0, max_tokens=40, ignore_eos=True, logprobs=20, logit_bias={ODD - 1: 3.0}
    )
    requests += [Request(f"hot {seed}", [ODD - 1, seed], hot, seed) for seed in range(3)]
    config = settings(path, tp=2, attention="torch", page_size=16, num_pages=20, max_rows=6)
    outputs, *_ = ranks(2).run(cases.serve, config, requests, 0)[0]
    expected = oracle(path, requests)
    for request in requests:
        assert_same_outputs(expected[request.id], outputs[request.id])
    drawn = {token for seed in range(3) for token in tokens_of(outputs[f"hot {seed}"])}
    assert len(drawn) > 90
    assert max(drawn) < ODD


@pytest.mark.parametrize("rows", [5, 7])
def test_few_tokens_for_many_ranks(rows: int, tmp_path: Path) -> None:
    """So few that the last rank has none."""
    path = write_checkpoint(tmp_path, "llama", vocab_size=rows, eos_token_id=None)
    config = ModelConfig.load(path)
    parts = [Shard(rank, 4).load(path, config, torch.float32, CPU) for rank in range(4)]
    whole = load_whole(path, config, torch.float32, CPU)
    assert torch.equal(torch.cat([part.head for part in parts])[:rows], whole.head)


def test_the_model_leaves_the_padding_out(path: Path) -> None:
    config = ModelConfig.load(path)
    model = load_whole(path, config, torch.float32, CPU)
    padded = replace(model, head=torch.cat([model.head, model.head[:1]]))
    hidden = torch.randn(4, config.hidden_size)
    assert torch.equal(padded.logits(hidden), model.logits(hidden))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", ["all", "-layer", "-linear", "none"])
def test_biases_in_the_fused_kernels(fused: str, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"device": "cuda", "page_size": 16, "num_pages": 1000, "prefill_budget": 100}
    path = write_checkpoint(
        tmp_path, "llama", head_dim=64, initializer_range=0.1, attention_bias=True, mlp_bias=True
    )
    plain = PagedConfig(model=str(path), dtype="bfloat16", attention="torch", max_rows=32, **shared)
    expected = score(build_stage2(plain), forced(mixed_lengths(24), 100))
    for rows in (1, 32):
        config = stage5.EngineConfig(model=str(path), dtype="bfloat16", fused=fused, max_rows=rows, **shared)
        assert_alike(score(stage5.build(config), forced(mixed_lengths(24), 100)), expected)


@pytest.mark.gpu
def test_graphs_never_draw_the_padding(tmp_path: Path) -> None:
    """As on the last of the ranks: a head with more rows than there are tokens."""
    path = write_checkpoint(tmp_path, "qwen3", head_dim=64, vocab_size=ODD)
    config = stage5.EngineConfig(model=str(path), device="cuda", dtype="bfloat16", num_pages=200, max_rows=16)
    loaded = load(config)
    rows = torch.cat(
        [loaded.model.head, loaded.model.head.new_zeros(3 * ODD, loaded.model.config.hidden_size)]
    )
    loaded = replace(loaded, model=replace(loaded.model, head=rows))
    engine = stage5.assemble(config, loaded, lambda ops: ops, share=VocabularyShare(0, lambda x: x))
    more: dict[str, Any]
    for more in (
        {},
        {"logprobs": 20},
        {"top_p": 0.99999},
        {"presence_penalty": 1.0, "logit_bias": {ODD - 1: 2.0}},
    ):
        hot = SamplingParams(temperature=50.0, max_tokens=50, ignore_eos=True, **more)
        outputs = run_engine(engine, [Request(str(seed), [seed, 1, 2], hot, seed) for seed in range(12)])
        drawn = {token for each in outputs.values() for token in tokens_of(each)}
        assert len(drawn) > 200
        assert max(drawn) < ODD

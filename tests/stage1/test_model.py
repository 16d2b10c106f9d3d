"""The model against `transformers`: logits and greedy tokens, for every family."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stages.interface import Engine, EngineConfig
from stages.stage1_naive.attention import QKV, NaiveAttention, rope_frequencies, rope_table, rotate
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.engine import build
from stages.stage1_naive.model import Ops, rms_norm
from stages.stage1_naive.weights import Checkpoint, load_model
from tests.checkpoints import FAMILIES, VOCAB_SIZE, write_checkpoint
from tests.oracle import assert_same_greedy, from_engine, from_transformers, greedy_request, run_engine
from tests.oracle import tokens_of as ids

STEPS = 64
LENGTHS = (1, 2, 63, 65, 200, 512)  # the scaled RoPE was "trained" on 64; 512 fills the context
PROMPT_LENGTHS = (1, 5, 40, 150)  # of the greedy runs
Load = Callable[[str], Path]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()


def reference(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()


def reference_logits(model: Any, prompt: list[int]) -> Tensor:
    """[T, V]"""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt], device=model.device)).logits[0]
    return logits


def our_logits(path: Path, dtype: torch.dtype, device: str = "cpu") -> Callable[[list[int]], Tensor]:
    """The model alone: prompt -> the logits of all its positions, [T, V]."""
    config, where = ModelConfig.load(path), torch.device(device)
    model = load_model(config, Ops(), Checkpoint(path, config).read, dtype, where, progress=False)
    attend = NaiveAttention(QKV(config, rope_table(config, config.context_length, where)))

    @torch.inference_mode()
    def logits(prompt: list[int]) -> Tensor:
        positions = torch.arange(len(prompt), device=where)
        return model.logits(model.hidden(torch.tensor(prompt, device=where), positions, attend))

    return logits


def engine_of(path: Path, device: str = "cpu", dtype: str = "float32") -> Engine:
    return build(EngineConfig(model=str(path), device=device, dtype=dtype))


VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "sharded": {"shards": True},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 4},
    "wide eps": {"rms_norm_eps": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, variant: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, family, seed=1, **VARIANTS[variant])
    assert len(list(path.glob("*.safetensors"))) > 1 or variant != "sharded"
    model, ours = reference(path), our_logits(path, torch.float32)
    for length in LENGTHS:
        expected, actual = reference_logits(model, prompt_of(length)), ours(prompt_of(length))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_float64_throughout(family: str, checkpoint: Load) -> None:
    """Invariant 1 needs it. A step that fell back to float32 would swallow, or enlarge, a change of 1e-9."""
    config, cpu = ModelConfig.load(checkpoint(family)), torch.device("cpu")
    read = Checkpoint(checkpoint(family), config).read
    attend = NaiveAttention(QKV(config, rope_table(config, config.context_length, cpu)))
    token_ids, positions = torch.tensor(prompt_of(100)), torch.arange(100)

    def logits(change: float) -> Tensor:
        def shifted(name: str) -> Tensor:
            return read(name).double() + (change if "embed" in name else 0.0)

        model = load_model(config, Ops(), shifted, torch.float64, cpu, progress=False)
        return model.logits(model.hidden(token_ids, positions, attend))

    base = logits(0.0)
    assert base.dtype == torch.float64
    slopes = [(logits(change) - base) / change for change in (1e-9, 1e-7)]
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-4 * slopes[1].abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(family: str, checkpoint: Load) -> None:
    model, engine = reference(checkpoint(family)), engine_of(checkpoint(family))

    def runs() -> Iterator[tuple[Any, list[int]]]:
        for length in PROMPT_LENGTHS:
            request = greedy_request(prompt_of(length), STEPS)
            outputs = run_engine(engine, [request])[request.id]
            yield from_transformers(model, request.prompt, STEPS), ids(outputs)

    assert_same_greedy(runs())


def test_greedy_texts_tell_prompts_apart(checkpoint: Load) -> None:
    """Equal tokens prove little if every prompt gets the same ones, or one token for ever."""
    for family in FAMILIES:
        engine = engine_of(checkpoint(family))
        texts = [from_engine(engine, prompt_of(length), 16).tokens for length in PROMPT_LENGTHS]
        assert len({tuple(text) for text in texts}) == len(texts)
        assert max(len(set(text)) for text in texts) > 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_position_sees_only_the_past(family: str, checkpoint: Load) -> None:
    logits = our_logits(checkpoint(family), torch.float64)
    prompt = prompt_of(30)
    changed = [*prompt[:20], *reversed(prompt[20:])]
    torch.testing.assert_close(logits(changed)[:20], logits(prompt)[:20], atol=1e-12, rtol=0)
    assert (logits(changed)[20] - logits(prompt)[20]).abs().max() > 1e-3


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 64)])
def test_scaled_frequencies_are_those_of_transformers(
    theta: float, factor: float, original: int, tmp_path: Path
) -> None:
    """To the last bit: at position 100,000 a rounding error of a frequency is a hundredth of a radian."""
    parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0}
    parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
    theirs = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=parameters)
    theirs.architectures = ["LlamaForCausalLM"]
    theirs.save_pretrained(tmp_path)
    ours = rope_frequencies(ModelConfig.load(tmp_path))
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = 1.0 / theta ** (torch.arange(0, 128, 2) / 128)
    kept = expected / plain
    assert kept[0] == 1.0  # fast: as it was
    assert kept[-1] == pytest.approx(1 / factor)  # slow: stretched
    assert ((kept > 1.01 / factor) & (kept < 0.99)).any()  # and some in between
    assert torch.equal(ours, expected), f"off by {((ours - expected) / expected).abs().max():.1e}"


def test_rotation_turns_by_the_position() -> None:
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    angles = torch.tensor([[0.0] * 4, [0.1, 0.2, 0.3, 0.4], [3.0] * 4], dtype=torch.float64)  # by position
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)
    turned = rotate(x, table, torch.tensor([1, 0, 1]))
    as_complex = torch.complex(x[..., :4], x[..., 4:])
    by = torch.exp(1j * angles[[1, 0, 1]]).unsqueeze(1)
    torch.testing.assert_close(turned, torch.view_as_real(as_complex * by).transpose(-1, -2).flatten(-2))


def test_norm_is_computed_wide_and_returned_narrow() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its square overflows float16
    assert rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-6).eq(1).all()
    assert rms_norm(x.double(), torch.ones(4096).double(), 1e-6).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_on_cuda_is_as_exact_as_transformers(family: str, checkpoint: Load) -> None:
    """Both are held to float32 on the CPU: rounding is theirs alike, a mistake would be ours alone."""
    exact_model = reference(checkpoint(family))
    rounded_model = reference(checkpoint(family), torch.bfloat16, "cuda")
    ours = our_logits(checkpoint(family), torch.bfloat16, "cuda")

    def error(logits: Tensor, exact: Tensor) -> float:
        return (logits.float().cpu() - exact).square().mean().sqrt().item()

    for length in LENGTHS:
        prompts = [prompt_of(length, seed) for seed in range(max(2, 64 // length))]
        exact = torch.cat([reference_logits(exact_model, prompt) for prompt in prompts])
        theirs = error(torch.cat([reference_logits(rounded_model, prompt) for prompt in prompts]), exact)
        mine = error(torch.cat([ours(prompt) for prompt in prompts]), exact)
        assert mine <= 1.5 * theirs + 1e-3 * exact.std().item(), f"{length} tokens: {mine} after {theirs}"
        assert mine < 0.2 * exact.std().item()  # and neither is nonsense


@pytest.mark.gpu
def test_greedy_on_cuda_equals_the_cpu(checkpoint: Load) -> None:
    """Float32 on both, TF32 off: torch's own default for matrix products."""
    on = cache(engine_of)

    def runs() -> Iterator[tuple[Any, list[int]]]:
        for family in FAMILIES:
            cpu, cuda = on(checkpoint(family)), on(checkpoint(family), "cuda")
            for length in PROMPT_LENGTHS:
                request = greedy_request(prompt_of(length), STEPS)
                outputs = run_engine(cuda, [request])[request.id]
                yield from_engine(cpu, request.prompt, STEPS), ids(outputs)

    assert_same_greedy(runs())

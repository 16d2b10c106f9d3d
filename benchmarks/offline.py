"""Tokens per second of an engine, with random weights of a real model's shape: no download.

    python benchmarks/offline.py --stage 2 --out benchmarks/results/stage2-h200.json

The first workload is mini-sglang's own: 256 requests, prompts and outputs of 100 to 1,024 tokens drawn from
random.seed(0), temperature 0.6, no stop tokens. The other is one request, 128 tokens in and 512 out.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stages import load_stage
from stages.interface import Engine, Request, SamplingParams
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.weights import tensor_shapes

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
Workload = list[tuple[list[int], int]]  # prompts, and how many tokens to generate for each


def random_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """A model folder with weights drawn from a normal distribution; norms are ones."""
    (folder / "config.json").write_text(json.dumps(shape))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (
            torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=generator)
        ).bfloat16()
        for name, size in tensor_shapes(ModelConfig.load(folder)).items()
    }
    save_file(tensors, folder / "model.safetensors")


def workloads() -> dict[str, Workload]:
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10_000) for _ in range(draw.randint(100, 1024))] for _ in range(256)]
    many = [(prompt, draw.randint(100, 1024)) for prompt in prompts]
    return {
        "256 requests offline": many,
        "1 request, 128 in, 512 out": [(prompts[0][:100] + prompts[1][:28], 512)],
    }


def run(engine: Engine, workload: Workload) -> tuple[int, float]:
    """Tokens generated, and the seconds it took."""
    for i, (prompt, max_tokens) in enumerate(workload):
        params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=max_tokens)
        engine.add(Request(str(i), prompt, params, seed=i))
    start, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += len(engine.step())
    return tokens, time.perf_counter() - start


def measure(stage: int, options: dict[str, Any], names: list[str], repeats: int) -> list[dict[str, Any]]:
    module = load_stage(stage)
    known = {field.name for field in fields(module.EngineConfig)}
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(Path(folder), QWEN3_0_6B)
        config = module.EngineConfig(
            model=folder, **{k: v for k, v in options.items() if v is not None and k in known}
        )
        engine = module.build(config)
    run(engine, [([1] * 64, 8)] * 4)  # warm-up: kernels are compiled and memory is taken
    results = []
    for name in names:
        runs = [run(engine, workloads()[name]) for _ in range(repeats)]
        seconds = [taken for _, taken in runs]
        median = statistics.median(seconds)
        result = {"workload": name, "stage": stage, **options, "tokens": runs[0][0], "seconds": median}
        results.append({**result, "tokens_per_second": runs[0][0] / median, "all_seconds": seconds})
        print(f"stage {stage} {options}: {name}: {runs[0][0] / median:,.0f} tok/s", flush=True)
    return results


def environment() -> dict[str, Any]:
    packages = ("torch", "triton", "flashinfer-python", "flash-attn", "flash-attn-4", "transformers")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "versions": {"python": platform.python_version(), **{p: v for p in packages if (v := _version(p))}},
        "commit": commit or None,
        "command": "python " + " ".join(sys.argv),
        "model": "Qwen3-0.6B's shape, random weights, bfloat16",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--attention", action="append", help="PREFILL[,DECODE]; several times to compare")
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--workload", action="append", choices=list(workloads()), help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for attention in args.attention or [None]:
        options = {"attention": attention, "page_size": args.page_size}
        results += measure(args.stage, options, args.workload or list(workloads()), args.repeats)
        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text(json.dumps({**environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

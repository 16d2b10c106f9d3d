"""Tokens per second of an engine, with random weights of a real model's shape: no download.

    python benchmarks/offline.py --stage 2 --out benchmarks/results/stage2-h200.json

`offline` is mini-sglang's own workload: 256 requests, prompts and outputs of 100 to 1,024 tokens drawn from
random.seed(0), temperature 0.6, no stop tokens. The others are described by their functions.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import save_file

from stages import LATEST, load_stage
from stages.interface import Engine, Request, SamplingParams, Statistics
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
Json = dict[str, Any]
Prompts = list[list[int]]


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


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randint(0, 10_000) for _ in range(count)]


def add(engine: Engine, name: str, prompt: list[int], max_tokens: int) -> None:
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=max_tokens)
    engine.add(Request(name, prompt, params, seed=crc32(name.encode())))


def drain(engine: Engine) -> tuple[int, float]:
    """Step until nothing is left; tokens generated, and the seconds it took."""
    start, count = time.perf_counter(), 0
    while engine.has_work:
        count += len(engine.step())
    return count, time.perf_counter() - start


def rate(name: str, count: int, seconds: float) -> Json:
    return {"workload": name, "tokens": count, "seconds": seconds, "tokens_per_second": count / seconds}


def offline(engine: Engine, draw: random.Random) -> Iterator[Json]:
    """256 requests at once; always the same ones, so of a cache only the first run is honest."""
    same = random.Random(0)
    prompts = [[same.randint(0, 10_000) for _ in range(same.randint(100, 1024))] for _ in range(256)]
    lengths = [same.randint(100, 1024) for _ in prompts]
    shift = draw.randint(1, 10_000)  # other tokens each time, the same lengths
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        add(engine, str(i), [(token + shift) % 10_001 for token in prompt], length)
    yield rate("256 requests offline", *drain(engine))


def one(engine: Engine, draw: random.Random) -> Iterator[Json]:
    """One request, 128 tokens in and 512 out."""
    add(engine, "1", tokens(draw, 128), 512)
    yield rate("1 request, 128 in, 512 out", *drain(engine))


def shared(engine: Engine, draw: random.Random) -> Iterator[Json]:
    """256 requests that share 2,048 tokens and have 64 of their own, all at once."""
    prefix = tokens(draw, 2048)
    before = engine.statistics
    for i in range(256):
        add(engine, str(i), prefix + tokens(draw, 64), 32)
    result = rate("256 x (2,048 shared + 64) in, 32 out, at once", *drain(engine))
    yield result | {"hit_rate": hit_rate(before, engine.statistics)}


def shared_in_turn(engine: Engine, draw: random.Random) -> Iterator[Json]:
    """The same, each request after the one before it has ended."""
    prefix = tokens(draw, 2048)
    before, count, seconds = engine.statistics, 0, 0.0
    for i in range(256):
        add(engine, str(i), prefix + tokens(draw, 64), 32)
        brought, taken = drain(engine)
        count, seconds = count + brought, seconds + taken
    result = rate("256 x (2,048 shared + 64) in, 32 out, one after the other", count, seconds)
    yield result | {"hit_rate": hit_rate(before, engine.statistics)}


def hit_rate(before: Statistics, after: Statistics) -> float:
    return (after.cached_tokens - before.cached_tokens) / (after.prompt_tokens - before.prompt_tokens)


def chat(engine: Engine, draw: random.Random) -> Iterator[Json]:
    """8 conversations of 8 turns, one after the other: a system prompt of 1,024 tokens, then 4,000 of the
    user and 16 of the model in each turn. The time to the first token by turn, median of the conversations."""
    firsts: list[list[float]] = [[] for _ in range(8)]
    lengths = []
    for conversation in range(8):
        prompt = tokens(draw, 1024)
        for turn in range(8):
            prompt = prompt + tokens(draw, 4000)
            add(engine, f"{conversation} {turn}", prompt, 16)
            start, answer = time.perf_counter(), list[int]()
            while engine.has_work:
                answer += [output.token_id for output in engine.step()]
                if len(answer) == 1:
                    firsts[turn].append(time.perf_counter() - start)
            lengths.append(len(prompt))
            prompt = prompt + answer
    yield {
        "workload": "chat of 8 turns",
        "first_token_seconds": [statistics.median(values) for values in firsts],
        "prompt_tokens": lengths[:8],
    }


def gaps(engine: Engine, draw: random.Random) -> Iterator[Json]:
    """32 requests are decoding when a prompt of 32,000 tokens arrives: the gaps between their tokens until it
    has its first, and the tokens that left in that time, prompt tokens not counted."""
    for i in range(32):
        add(engine, str(i), tokens(draw, 128), 3000)
    for _ in range(40):
        engine.step()
    last = dict.fromkeys(map(str, range(32)), time.perf_counter())
    start, found, count = time.perf_counter(), list[float](), 0
    add(engine, "long", tokens(draw, 32_000), 1)
    arrived = False
    while not arrived:
        outputs = engine.step()
        now = time.perf_counter()
        count += len(outputs)
        for output in outputs:
            if output.request_id == "long":
                arrived = True
            else:
                found.append(1000 * (now - last[output.request_id]))
                last[output.request_id] = now
    taken = time.perf_counter() - start
    if not found:  # nobody got a token meanwhile: the gap is as long as the whole prefill, and one step more
        for output in engine.step():
            found.append(1000 * (time.perf_counter() - last[output.request_id]))
    for i in range(32):
        engine.abort(str(i))
    cuts = statistics.quantiles(found, n=100, method="inclusive")
    yield {
        "workload": "a prompt of 32,000 tokens meets 32 running requests",
        "gap_ms": {"p50": cuts[49], "p99": cuts[98], "max": max(found)},
        "first_token_seconds": taken,
        "tokens_per_second": count / taken,
    }


def long_prompts(engine: Engine, draw: random.Random) -> Iterator[Json]:
    """Prompts of up to 128,000 tokens, alone: the memory at the peak of the prefill beyond what lay there."""
    for length in (2_000, 8_000, 32_000, 64_000, 128_000):
        if length >= engine.context_length:
            continue
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        add(engine, "long", tokens(draw, length), 1)
        _, seconds = drain(engine)
        peak = torch.cuda.max_memory_allocated() - before
        yield {
            "workload": "peak memory of prefill",
            "prompt_tokens": length,
            "peak_bytes": peak,
            "seconds": seconds,
        }


WORKLOADS: dict[str, Callable[[Engine, random.Random], Iterator[Json]]] = {
    "offline": offline,
    "one": one,
    "shared": shared,
    "shared-in-turn": shared_in_turn,
    "chat": chat,
    "gaps": gaps,
    "long-prompts": long_prompts,
}


def median(runs: list[Json]) -> Json:
    """Of several runs of one workload: the one whose time is the median, with the times of all."""
    if len(runs) == 1:
        return runs[0]
    time_of = "seconds" if "seconds" in runs[0] else "first_token_seconds"
    ordered = sorted(runs, key=lambda run: run[time_of])
    return ordered[len(runs) // 2] | {f"all_{time_of}": [run[time_of] for run in runs]}


def measure(folder: str, stage: int, options: Json, names: list[str], repeats: int) -> list[Json]:
    module = load_stage(stage)
    given = {name: value for name, value in options.items() if value is not None}
    engine = module.build(module.EngineConfig(model=folder, **given))
    draw = random.Random(1)
    for i in range(4):  # warm-up: kernels are compiled and memory is taken
        add(engine, str(i), tokens(draw, 64), 8)
    drain(engine)
    results = []
    for name in names:
        runs = [list(WORKLOADS[name](engine, draw)) for _ in range(repeats)]
        for parts in zip(*runs, strict=True):
            result = {"stage": stage, **options} | median(list(parts))
            results.append(result)
            print(json.dumps(result), flush=True)
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
    parser.add_argument("--stage", type=int, action="append", help="several times to compare")
    parser.add_argument("--attention", action="append", help="PREFILL[,DECODE]; several times to compare")
    parser.add_argument("--budget", type=int, action="append", help="--prefill-budget; several to compare")
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="add the results to this JSON file")
    args = parser.parse_args()
    names = args.workload or ["offline", "one"]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        long = {"max_position_embeddings": 131_072} if "long-prompts" in names else {}
        random_checkpoint(Path(folder), QWEN3_0_6B | long)
        for stage, attention, budget in product(
            args.stage or [LATEST], args.attention or [None], args.budget or [None]
        ):
            options = {"attention": attention, "page_size": args.page_size, "prefill_budget": budget}
            results += measure(folder, stage, options, names, args.repeats)
            gc.collect()
            torch.cuda.empty_cache()
    if args.out:
        record = environment()
        if args.out.exists():
            known = json.loads(args.out.read_text())
            record["command"] = f"{known['command']} && {record['command']}"
            results = known["results"] + results
        args.out.write_text(json.dumps({**record, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

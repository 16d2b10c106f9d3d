"""The named workloads of the offline benchmark, and how they are run."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch

from minisgl.bench.limits import Work
from stages.interface import Engine, Request, SamplingParams

Json = dict[str, Any]
Load = list[tuple[list[int], int]]  # prompts, and how many tokens to generate for each


class Draw(random.Random):
    """Random prompts for a vocabulary; each run draws others, so that no cache knows them."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        super().__init__(seed)
        self._most = min(10_000, vocab_size - 1)

    def tokens(self, count: int) -> list[int]:
        return self.choices(range(self._most + 1), k=count)


@dataclass(frozen=True)
class Batch:
    """Requests that arrive all at once, or each when the one before has ended (`in_turn`)."""

    about: str
    make: Callable[[Draw], Load]
    shared: int = 0  # tokens with which all prompts begin
    in_turn: bool = False

    def work(self, load: Load) -> list[Work]:
        """What must be computed of it, by an engine that computes the shared tokens once."""
        return [Work(len(p), n, self.shared if i else 0) for i, (p, n) in enumerate(load)]

    def run(self, engine: Engine, load: Load) -> Json:
        before, tokens, seconds = engine.statistics, 0, 0.0
        for group in [[one] for one in load] if self.in_turn else [load]:
            for i, (prompt, max_tokens) in enumerate(group):
                add(engine, str(i), prompt, max_tokens)
            brought, taken = drain(engine)
            tokens, seconds = tokens + brought, seconds + taken
        after = engine.statistics
        read = after.prompt_tokens - before.prompt_tokens
        hit_rate = (after.cached_tokens - before.cached_tokens) / read if read else 0.0
        return {"seconds": seconds, "tokens": tokens, "hit_rate": hit_rate}


def add(engine: Engine, name: str, prompt: list[int], max_tokens: int) -> None:
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=max_tokens)
    engine.add(Request(name, prompt, params, seed=crc32(name.encode())))


def drain(engine: Engine) -> tuple[int, float]:
    """Step until nothing is left; tokens generated, and the seconds it took."""
    start, count = time.perf_counter(), 0
    while engine.has_work:
        count += len(engine.step())
    return count, time.perf_counter() - start


def _offline(draw: Draw) -> Load:
    """mini-sglang's own: the lengths are always those of `random.seed(0)`, as it draws them."""
    same = random.Random(0)
    lengths = []
    for _ in range(256):
        lengths.append(same.randint(100, 1024))
        for _ in range(lengths[-1]):
            same.randint(0, 10_000)
    return [(draw.tokens(length), same.randint(100, 1024)) for length in lengths]


def _alike(count: int, prompt: int, output: int, shared: int = 0) -> Callable[[Draw], Load]:
    def make(draw: Draw) -> Load:
        prefix = draw.tokens(shared)
        return [(prefix + draw.tokens(prompt), output) for _ in range(count)]

    return make


BATCHES: dict[str, Batch] = {
    "offline": Batch("256 requests, 100 to 1,024 tokens in and out", _offline),
    "one": Batch("1 request, 128 in, 512 out", _alike(1, 128, 512)),
    "eight": Batch("8 requests, 128 in, 512 out", _alike(8, 128, 512)),
    "thirty-two": Batch("32 requests, 128 in, 512 out", _alike(32, 128, 512)),
    "prefill": Batch("prefill of 64 x 1,024", _alike(64, 1024, 1)),
    "long-prefill": Batch("8 x 32,000 in, 16 out", _alike(8, 32_000, 16)),
    "shared": Batch("256 x (2,048 shared + 64) in, 32 out, at once", _alike(256, 64, 32, 2048), 2048),
    "shared-in-turn": Batch(
        "256 x (2,048 shared + 64) in, 32 out, one after the other", _alike(256, 64, 32, 2048), 2048, True
    ),
    "ladder": Batch("16 x (256 shared + 64) in, 64 out", _alike(16, 64, 64, 256), 256),
}


def chat(engine: Engine, draw: Draw) -> Iterator[Json]:
    """8 conversations of 8 turns, one after the other: a system prompt of 1,024 tokens, then 4,000 of the
    user and 16 of the model in each turn. The time to the first token by turn, the conversations' median."""
    firsts: list[list[float]] = [[] for _ in range(8)]
    lengths = []
    for conversation in range(8):
        prompt = draw.tokens(1024)
        for turn in range(8):
            prompt = prompt + draw.tokens(4000)
            add(engine, f"{conversation} {turn}", prompt, 16)
            start, answer = time.perf_counter(), list[int]()
            while engine.has_work:
                outputs = engine.step()
                if outputs and not answer:
                    firsts[turn].append(time.perf_counter() - start)
                answer += [output.token_id for output in outputs]
            lengths.append(len(prompt))
            prompt = prompt + answer
    yield {
        "workload": "chat of 8 turns",
        "first_token_seconds": [statistics.median(values) for values in firsts],
        "all_first_token_seconds": firsts,
        "prompt_tokens": lengths[:8],
    }


def gaps(engine: Engine, draw: Draw) -> Iterator[Json]:
    """32 requests are decoding when a prompt of 32,000 tokens arrives: the gaps between their tokens until it
    has its first, and the rate at which they get tokens meanwhile."""
    names = [str(i) for i in range(32)]
    for name in names:
        add(engine, name, draw.tokens(128), 3000)
    for _ in range(40):
        engine.step()
    start = time.perf_counter()
    last, found, count, arrived = dict.fromkeys(names, start), list[float](), 0, False
    add(engine, "long", draw.tokens(32_000), 1)
    while not arrived:
        outputs, now = engine.step(), time.perf_counter()
        arrived = any(output.request_id == "long" for output in outputs)
        decoded = [output.request_id for output in outputs if output.request_id != "long"]
        found += [1000 * (now - last[name]) for name in decoded]
        last.update(dict.fromkeys(decoded, now))
        count += len(decoded)
    taken = time.perf_counter() - start
    if not found:  # nobody got a token meanwhile: the gap is the whole prefill, and the step that ends it
        engine.step()
        found = [1000 * (time.perf_counter() - last[name]) for name in names]
    for name in names:
        engine.abort(name)
    cuts = statistics.quantiles(found, n=100, method="inclusive")
    yield {
        "workload": "a prompt of 32,000 tokens meets 32 running requests",
        "gap_ms": {"p50": cuts[49], "p99": cuts[98], "max": max(found)},
        "first_token_seconds": taken,
        "tokens_per_second": count / taken,
        "all_gap_ms": found,
    }


def long_prompts(engine: Engine, draw: Draw) -> Iterator[Json]:
    """Prompts of up to 128,000 tokens, alone: the memory at the peak of the prefill beyond what lay there.

    Raises:
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("long-prompts measures a GPU's memory, and there is no GPU here")
    for length in (2_000, 8_000, 32_000, 64_000, 128_000):
        if length >= engine.context_length:
            break
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        add(engine, "long", draw.tokens(length), 1)
        _, seconds = drain(engine)
        peak = torch.cuda.max_memory_allocated() - before
        yield {
            "workload": "peak memory of prefill",
            "prompt_tokens": length,
            "peak_bytes": peak,
            "seconds": seconds,
        }


STORIES: dict[str, Callable[[Engine, Draw], Iterator[Json]]] = {
    "chat": chat,
    "gaps": gaps,
    "long-prompts": long_prompts,
}

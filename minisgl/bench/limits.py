"""How fast a workload could be, with this machine's own matmul rate and copy bandwidth and nothing else."""

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stages.stage1_naive.config import ModelConfig


@dataclass(frozen=True)
class Machine:
    """What a device reached when it was asked to."""

    flops: float  # a second, of a large matrix product
    bandwidth: float  # bytes a second, read and written, of a large copy


@dataclass(frozen=True)
class Work:
    """One request: of its `prompt` tokens, those beyond `cached` are computed; then `output` tokens."""

    prompt: int
    output: int
    cached: int = 0


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of several runs of a matrix product and of a copy."""
    cuda = device.type == "cuda"
    n, size = (8192, 1 << 30) if cuda else (1024, 1 << 26)
    a, b = torch.randn(2, n, n, device=device, dtype=torch.float32).to(dtype)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    return Machine(
        flops=2 * n**3 / _best(lambda: torch.matmul(a, b), cuda),
        bandwidth=2 * size / _best(lambda: target.copy_(source), cuda),
    )


def least_seconds(
    config: ModelConfig, bytes_per_number: int, machine: Machine, work: list[Work], in_turn: bool = False
) -> float:
    """The least time in which this machine can do `work`.

    Prompts cost their matrix products, attention's too. A decode step costs its matrix products, or reading
    the weights if that takes longer, and then reading K and V. Requests decode all at once, or each alone
    (`in_turn`).
    """
    c = config
    qkv = c.hidden_size * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    layer = qkv + c.num_heads * c.head_dim * c.hidden_size + 3 * c.hidden_size * c.intermediate_size
    layers, head = c.num_layers * layer, c.hidden_size * c.vocab_size
    kv_token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * bytes_per_number
    flops = tokens_read = 0
    for w in work:
        pairs = (w.prompt * (w.prompt + 1) - w.cached * (w.cached + 1)) // 2  # of a query and a key it sees
        flops += 2 * (w.prompt - w.cached) * layers + 2 * head
        flops += 4 * c.num_layers * c.num_heads * c.head_dim * pairs
        tokens_read += sum(range(w.prompt + 1, w.prompt + w.output))  # the last token is never read
    steps = sorted(w.output - 1 for w in work)
    rows = [1] * sum(steps) if in_turn else [len(steps) - bisect_right(steps, i) for i in range(steps[-1])]
    step_flops, weights = 2 * (layers + head) / machine.flops, (layers + head) * bytes_per_number
    matmuls = sum(max(n * step_flops, weights / machine.bandwidth) for n in rows)
    return flops / machine.flops + matmuls + tokens_read * kv_token / machine.bandwidth


def _best(call: Callable[[], object], cuda: bool) -> float:
    times = []
    for _ in range(12):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)

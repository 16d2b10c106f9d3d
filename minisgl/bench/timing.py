"""The time of one operation on a device, without the time it takes to ask for it."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

_REPLAYS = 20
_CALLS = 16  # in a graph, at least


def microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """The median time of one of `calls`, which do the same, each with data of its own: together these should
    not fit into the GPU's cache, unless they would in use.

    On a GPU they are captured in a CUDA graph, one after the other, and it is replayed. They may not wait for
    the device.
    """
    rounds = -(-_CALLS // len(calls))
    each = rounds * len(calls)
    if device.type != "cuda":
        return 1e6 * statistics.median(_seconds(calls) for _ in range(rounds * _REPLAYS)) / len(calls)
    _run(calls)  # compiles what is not compiled
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may talk to the device
        for _ in range(rounds):
            _run(calls)
    times: list[float] = []
    for _ in range(_REPLAYS + 2):  # the first two are a warm-up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / each)
    return statistics.median(times[2:])


def _run(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _seconds(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    _run(calls)
    return time.perf_counter() - start

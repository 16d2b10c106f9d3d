"""`collectives`: what the ranks of stage 6 say to each other, alone, without a model."""

import argparse
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from minisgl.bench.record import Json, environment, save
from minisgl.bench.shapes import SHAPES
from minisgl.bench.timing import microseconds
from stages.stage1_naive import model as plain
from stages.stage5_overlap.fused import has_dependent_launch, make_ops
from stages.stage6_parallel.communicator import Communicator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="ranks (default: 2)")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-32b", help="a model (default: qwen3-32b)")
    parser.add_argument(
        "--rows", default="1,8,32,64,128,256,2048,16384", help="positions in a step (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers there, as JSON")


def run(args: argparse.Namespace) -> None:
    """Start the ranks, let them measure, and print what rank 0 saw."""
    if args.tp < 2 or not all(rows.strip().isdecimal() and int(rows) for rows in args.rows.split(",")):
        raise ValueError("--tp must be at least 2, and --rows numbers such as 1,8,256")
    rows = [int(number) for number in args.rows.split(",")]
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, args.tp, is_master=True, wait_for_workers=False)
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(rank, args.tp, store.port, args.shape, rows, queue), daemon=True)
        for rank in range(args.tp)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise ValueError("a rank failed; its error is above")
    results: list[Json] = queue.get()
    _print(results)
    if args.out:
        save(args.out, environment() | {"model": f"{args.shape}'s shape", "tp": args.tp, "results": results})


def _rank(rank: int, size: int, port: int, shape: str, rows: list[int], queue: Any) -> None:
    torch.set_num_threads(1)
    alone = torch.cuda.device_count() >= size
    device = torch.device(f"cuda:{rank}" if alone else "cpu")
    communicator = Communicator(TCPStore("127.0.0.1", port, size), rank, size, device, nccl=alone)
    results = [_measure(communicator, rank, shape, count, device) for count in rows]
    if rank == 0:
        queue.put(results)
    communicator.smallest(0)  # nobody leaves before the others are done
    communicator.close()


def _measure(communicator: Communicator, rank: int, shape: str, rows: int, device: torch.device) -> Json:
    """Microseconds of each collective for `rows` positions, and of what it is joined with. Sums are summed
    again, up to infinity: no time here depends on the numbers."""
    width, vocab = SHAPES[shape]["hidden_size"], SHAPES[shape]["vocab_size"]
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    ops = make_ops(frozenset({"norm"})) if gpu else plain.Ops()
    x, residual = torch.randn(2, rows, width, device=device, dtype=torch.float32).to(dtype)
    weight = torch.ones(width, device=device, dtype=dtype)
    sampled = min(rows, 256)  # rows of a step that sample
    logits = torch.randn(sampled, vocab // communicator.size, device=device, dtype=torch.float32).to(dtype)
    candidates = torch.ones(sampled, 2 * -(-logits.shape[1] // 4096), device=device, dtype=torch.int32)

    def joined() -> None:
        ops.add_norm(communicator.all_reduce(x), residual, weight, 1e-6)

    calls: dict[str, Callable[[], object]] = {
        "all_reduce": partial(communicator.all_reduce, x),
        "add_norm": lambda: ops.add_norm(x, residual, weight, 1e-6),
        "all_reduce, then add_norm": joined,
        "all_gather of logits": partial(communicator.all_gather, logits),
        "all_gather of candidates": partial(communicator.all_gather, candidates),
    }
    if few := _few_rows(communicator, rank, rows, x):
        calls["both in one kernel"] = lambda: few.add_norm(x, residual, weight, 1e-6)
    with torch.inference_mode():
        times = {name: microseconds([call], device) for name, call in calls.items()}
    if few:
        communicator.smallest(0)  # the others read this rank's memory until they are done
        few.close()
    return {"rows": rows, "bytes": x.nbytes, "microseconds": times}


def _few_rows(communicator: Communicator, rank: int, rows: int, x: Tensor) -> Any:
    if not x.is_cuda:
        return None
    from stages.stage6_parallel import one_shot

    few = one_shot.connect(
        rank, communicator.size, rows, x.shape[1], x.dtype, x.device, has_dependent_launch()
    )
    return few if few is not None and few.most_rows >= rows else None


def _print(results: list[Json]) -> None:
    names = dict.fromkeys(name for result in results for name in result["microseconds"])
    print("µs" + "".join(f"{name:>28}" for name in ("rows", *names)))
    for result in results:
        times = (result["microseconds"].get(name) for name in names)
        cells = ("-" if time is None else f"{time:,.1f}" for time in times)
        print("  " + "".join(f"{cell:>28}" for cell in (result["rows"], *cells)))

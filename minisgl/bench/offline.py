"""`offline`: named workloads in this process, each beside its limit; `stages`: one through every stage."""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from minisgl import builtin
from minisgl.bench.limits import Machine, least_seconds, measure_machine
from minisgl.bench.record import environment, save
from minisgl.bench.shapes import SHAPES, write_config
from minisgl.bench.workloads import BATCHES, STORIES, Draw, Json
from minisgl.cli import add_engine_arguments
from stages import LATEST, load_stage
from stages.interface import Engine, EngineConfig
from stages.stage1_naive.config import ModelConfig, find_model
from stages.stage1_naive.weights import pick_device, pick_dtype
from stages.stage5_overlap.fused import KERNELS

_WHOLE = "everything"
# what each variant changes in stage 5's configuration
ABLATIONS: dict[str, dict[str, object]] = {
    _WHOLE: {},
    "radix": {"radix": False},
    "chunks": {"prefill_budget": 131_072},  # no prompt is cut
    "overlap": {"overlap": False},
    "graphs": {"graphs": False},
    "overlap-and-graphs": {"overlap": False, "graphs": False},
    **{f"fused-{name}": {"fused": f"-{name}"} for name in KERNELS},
    "every-fused": {"fused": "none"},
    **{f"all-but-{name}": {"attention": name} for name in ("flash_attn", "flashinfer", "torch")},
}


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str], command: str) -> None:
    """The flags of `offline`, `stages` or `ablate`. The engine's own flags are the chosen stage's."""
    every_stage, ablate = command == "stages", command == "ablate"
    add_engine_arguments(parser, argv)
    names = [*BATCHES, *(STORIES if command == "offline" else [])]
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this model's shape, not MODEL")
    parser.add_argument(
        "--workload",
        action="append",
        choices=names,
        help=f"several times for several (default: {'ladder' if every_stage else 'offline, one'})",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument(
        "--warm-up",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first run each once for its kernels to be compiled; does not count (default: on)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers there, as JSON")
    if ablate:
        choices = [name for name, changes in ABLATIONS.items() if changes]
        parser.add_argument(
            "--without", action="append", choices=choices, help="what to take out (default: each in turn)"
        )
    if every_stage:
        parser.add_argument(
            "--stages", default=",".join(map(str, range(1, LATEST + 1))), help="which (default: all)"
        )
        parser.add_argument("--chart", type=Path, metavar="FILE", help="draw FILE-light.svg and -dark.svg")


def run_offline(args: argparse.Namespace) -> None:
    with _model(args) as folder:
        results = _Bench(args, folder).measure(args.stage, args.workload or ["offline", "one"])
    _finish(args, results)


def run_stages(args: argparse.Namespace) -> None:
    results = []
    if not all(number.strip().isdecimal() for number in args.stages.split(",")):
        raise ValueError(f"--stages must be numbers such as 1,3, not {args.stages!r}")
    numbers = [int(number) for number in args.stages.split(",")]
    for number in numbers:
        load_stage(number)  # a wrong one is found before anything is measured
    with _model(args) as folder:
        bench = _Bench(args, folder)
        for number in numbers:
            results += bench.measure(number, args.workload or ["ladder"])
    _finish(args, results)
    if args.chart:  # after the numbers are saved: it may fail
        from minisgl.bench.charts import draw_ladder

        draw_ladder(results, args.chart)


def run_ablate(args: argparse.Namespace) -> None:
    """Stage 5 whole, and with one part taken out at a time."""
    results, refused = [], list[str]()
    names = args.workload or ["offline", "one"]
    with _model(args) as folder:
        bench = _Bench(args, folder)
        for variant, changes in ABLATIONS.items():
            if args.without and variant not in args.without and changes:
                continue
            try:
                results += bench.measure(5, names, variant, **changes)
            except ValueError as error:  # a backend that is not here, a kernel that this GPU cannot run
                refused.append(f"{variant}: {error}")
    whole = {r["workload"]: r["seconds"] for r in results if r["variant"] == _WHOLE and "seconds" in r}
    print(f"\ntime in units of the whole engine's\n{'':<24}" + "".join(f"{name:>14}" for name in names))
    for variant in dict.fromkeys(result["variant"] for result in results):
        mine = [r for r in results if r["variant"] == variant and r["workload"] in whole]
        print(f"{variant:<24}" + "".join(f"{r['seconds'] / whole[r['workload']]:>14.2f}" for r in mine))
    print("\n".join(["", *(f"not measured: {reason}" for reason in refused)]))
    _finish(args, results)


@contextmanager
def _model(args: argparse.Namespace) -> Iterator[Path]:
    if args.repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {args.repeats}")
    if args.shape is None:
        yield find_model(args.model or str(builtin.PATH))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), args.shape)
        args.random_weights = True
        yield Path(folder)


class _Bench:
    """Engines of one model on one machine, one after the other."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._config = ModelConfig.load(folder)
        device = pick_device(args.device)
        self._dtype = pick_dtype(args.dtype, self._config, device)
        self._machine: Machine = measure_machine(device, self._dtype)
        copied, product = self._machine.bandwidth / 1e9, self._machine.flops / 1e12
        print(f"this machine copies {copied:,.0f} GB/s and multiplies {product:,.1f} TFLOP/s")

    def measure(
        self, stage: int, names: list[str], variant: str | None = None, **changes: object
    ) -> list[Json]:
        """The results of `names`, printed one by one. Memory is free again on return.

        `changes` are fields of the engine's configuration that make it `variant`.
        """
        config = self._engine_config(stage, changes)
        tp = getattr(config, "tp", 1)  # the others are one GPU's
        about = {"stage": stage} | ({"variant": variant} if variant else {}) | ({"tp": tp} if tp > 1 else {})
        engine = load_stage(stage).build(config)
        draw = Draw(stage, self._config.vocab_size)
        results = []
        for name in names:
            first = _warm_up(engine, draw, name) if self._args.warm_up else {}
            batch = name in BATCHES
            measured = self._batch(engine, draw, name, tp) if batch else self._story(engine, draw, name)
            for result in measured:
                results.append(about | result | first)
                print(_line(results[-1]), flush=True)
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        return results

    def _engine_config(self, stage: int, changes: dict[str, object]) -> EngineConfig:
        module = load_stage(stage)
        known = {field.name for field in fields(module.EngineConfig)} - {"model"}
        given = {name: value for name, value in vars(self._args).items() if name in known}
        if stage != self._args.stage:  # flags that were not given have the defaults of another stage
            defaults = {f.name: f.default for f in fields(load_stage(self._args.stage).EngineConfig)}
            given = {name: value for name, value in given.items() if value != defaults[name]}
        config: EngineConfig = module.EngineConfig(model=str(self._folder), **(given | changes))
        return config

    def _batch(self, engine: Engine, draw: Draw, name: str, tp: int) -> Iterator[Json]:
        batch, runs, limits = BATCHES[name], list[Json](), list[float]()
        for _ in tqdm(range(self._args.repeats), desc=batch.about, unit="run", leave=False):
            load = batch.make(draw)
            runs.append(batch.run(engine, load))
            size = self._dtype.itemsize
            work = batch.work(load)
            limits.append(least_seconds(self._config, size, self._machine, work, batch.in_turn) / tp)
        seconds = statistics.median(run["seconds"] for run in runs)
        tokens, limit = runs[0]["tokens"], statistics.median(limits)
        yield {
            "workload": batch.about,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "hit_rate": statistics.median(run["hit_rate"] for run in runs),
            "limit_seconds": limit,
            "of_limit": limit / seconds,
            "all_seconds": [run["seconds"] for run in runs],
        }

    def _story(self, engine: Engine, draw: Draw, name: str) -> Iterator[Json]:
        for run in tqdm(range(self._args.repeats), desc=name, unit="run", leave=False):
            for result in STORIES[name](engine, draw):
                yield result | {"run": run}


def _warm_up(engine: Engine, draw: Draw, name: str) -> Json:
    """What a workload takes at first, when kernels are compiled and memory is taken."""
    if name in BATCHES:
        return {"first_seconds": BATCHES[name].run(engine, BATCHES[name].make(draw))["seconds"]}
    start = time.perf_counter()
    list(STORIES[name](engine, draw))
    return {"first_seconds": time.perf_counter() - start}


def _line(result: Json) -> str:
    head = f"{result.get('variant', 'stage ' + str(result['stage'])):<18}  {result['workload']:<58}"
    if "of_limit" in result:
        return (
            f"{head}{result['seconds']:>10.3f} s {result['tokens_per_second']:>10,.0f} tok/s"
            f"   limit {result['limit_seconds']:.3f} s, {result['of_limit']:.0%} of it reached"
        )
    shown = {name: value for name, value in result.items() if not name.startswith(("all_", "stage", "work"))}
    return f"{head}{shown}"


def _finish(args: argparse.Namespace, results: list[Json]) -> None:
    if args.out:
        model = f"{args.shape}'s shape, random weights" if args.shape else str(args.model or builtin.NAME)
        flags = {f.name: getattr(args, f.name) for f in fields(load_stage(args.stage).EngineConfig)}
        del flags["model"]
        save(args.out, environment() | {"model": model, "engine": flags, "results": results})

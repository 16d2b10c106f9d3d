"""Stage 6, assembled: stage 5's engine on every rank, each with its part of the weights, all in step."""

import logging
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, NoReturn

import msgspec
import torch

from stages.interface import Engine, EngineFailed, Request, Statistics, TokenOutput
from stages.stage1_naive import limits
from stages.stage1_naive.config import ModelConfig, find_model
from stages.stage2_paged.assembly import Loaded, load
from stages.stage5_overlap import engine as stage5
from stages.stage5_overlap.fused import choose_kernels, has_dependent_launch
from stages.stage5_overlap.graph_runner import VocabularyShare
from stages.stage6_parallel.communicator import Communicator, FewRows
from stages.stage6_parallel.launcher import Place, check_world, join
from stages.stage6_parallel.link import Follower, Leader, Step, digest, portable
from stages.stage6_parallel.ops import parallel_ops
from stages.stage6_parallel.sharding import Shard, check_divisible
from stages.stage6_parallel.watch import SERVING

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(stage5.EngineConfig):
    """As before, for one or more ranks."""

    tp: Annotated[int, "tensor parallelism: GPUs (or processes) to a model"] = 1
    one_shot: Annotated[bool, "all-reduce few rows by reading the other GPUs' memory, not with NCCL"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tp < 1:
            raise ValueError(f"tp must be at least 1, not {self.tp}")


def build(config: EngineConfig) -> Engine:
    """Stage 5's engine for one rank; for more this process is rank 0, which speaks for all.

    The others are processes started here, or by `torchrun`. There every process calls this: it returns on
    rank 0 only, and on another it serves rank 0 and ends the process when that leaves.

    Raises:
        ValueError: the model or the configuration cannot be served; the message says why.
        EngineFailed: a rank was lost meanwhile.
    """
    check_world(config.tp)
    if config.tp == 1:
        return stage5.build(config)
    path = find_model(config.model)
    check_divisible(ModelConfig.load(path), config.tp)  # before any process is started
    config = replace(config, model=str(path))
    place = join(config.tp, msgspec.json.encode(config).decode())
    return _lead(config, place) if place.rank == 0 else _follow(config, place)


def _lead(config: EngineConfig, place: Place) -> Engine:
    leader = Leader(place)
    last = [leader.close]  # what ends it all, in this order
    with ExitStack() as end:
        end.callback(lambda: [step() for step in last])
        with leader.watch.guard():
            leader.wait_for_ranks()
            communicator = connect(config, place)
            last.append(communicator.close)
            leader.watch.release = communicator.abort
            engine = build_rank(config, place, communicator)
        last.insert(1, engine.close)  # NCCL does not leave before the graphs have gone
        leader.watch.patience = SERVING
        return ParallelEngine(engine, leader, end.pop_all().close)


def _follow(config: EngineConfig, place: Place) -> NoReturn:
    follower, built = Follower(place), False
    limits.logger.disabled = True  # rank 0 says it, of the same requests
    try:
        communicator = connect(config, place)
        engine = build_rank(config, place, communicator)
        built = True
        follow(engine, follower)
        _leave(0)
    except Exception as error:
        follower.report(error, refused=isinstance(error, ValueError) and not built)
        _leave(1)


def _leave(status: int) -> NoReturn:
    """At once: libraries that clean up at the end of a process would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def connect(config: EngineConfig, place: Place) -> Communicator:
    """Join the collectives of all ranks."""
    device, alone = place.device(config.device)
    return Communicator(place.store, place.rank, place.size, torch.device(device), nccl=alone)


def build_rank(config: EngineConfig, place: Place, communicator: Communicator) -> Engine:
    """This rank's engine: its share of the weights and of the cache, and as many pages as every rank has."""
    device, alone = place.device(config.device)
    config = replace(config, device=device, trace=config.trace if place.rank == 0 else None)
    if not alone:
        config = _share_device(config, place)
    shard = Shard(place.rank, place.size)
    loaded = load(config, shard.load)
    if alone:
        communicator.few_rows = _connect_few_rows(config, place, loaded)
    wrap = partial(parallel_ops, rank=place.rank, communicator=communicator)
    share = VocabularyShare(place.rank * len(loaded.model.head), communicator.all_gather)
    engine = stage5.assemble(config, loaded, wrap, communicator.smallest, share)
    communicator.smallest(0)  # everyone is ready
    return engine


def _connect_few_rows(config: EngineConfig, place: Place, loaded: Loaded) -> FewRows | None:
    """What all-reduces a decode step's rows, if the ranks are GPUs of one machine with a kernel for it."""
    model, device, dtype = loaded.model.config, loaded.device, loaded.dtype
    fused = choose_kernels(config.fused, model, device, dtype)
    if not config.one_shot or "norm" not in fused or place.local_size < place.size:
        return None
    from stages.stage6_parallel import one_shot

    pdl = has_dependent_launch()
    return one_shot.connect(place.rank, place.size, config.max_rows, model.hidden_size, dtype, device, pdl)


def _share_device(config: EngineConfig, place: Place) -> EngineConfig:
    """What a rank may have of a GPU, or a CPU, that it shares with the other ranks of this machine."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // place.local_size)))
    if config.device.startswith("cuda") and place.rank == 0:
        logger.warning("ranks share a GPU: their collectives go through the host, and graphs are off")
    return replace(config, graphs=False, memory_fraction=config.memory_fraction / place.local_size)


def follow(engine: Engine, link: Follower) -> None:
    """Do what rank 0 does until it leaves.

    Raises:
        EngineFailed: this rank's last step brought something else than rank 0's.
    """
    last = b""
    while step := link.receive():
        if step.digest != last:
            raise EngineFailed("the ranks disagree about the last step, which no ranks of one version should")
        for call in step.calls:
            engine.abort(call) if isinstance(call, str) else engine.add(call)
        last = digest(engine.step(), engine.statistics)


class ParallelEngine:
    """Rank 0's engine, whose calls the other ranks repeat: SPMD, one program on many data.

    An engine depends on nothing but the calls made to it, so all schedule the same batches, and all sample
    the same tokens, from the same gathered logits. One message a step is all that the scheduling needs.
    `end` is called once: by `close`, or when nobody has this object any more.
    """

    def __init__(self, engine: Engine, link: Leader, end: Callable[[], object]) -> None:
        self._engine = engine
        self._link = link
        self._end = weakref.finalize(self, end)
        self._calls: list[Request | str] = []  # since the last step
        self._digest = b""

    @property
    def context_length(self) -> int:
        return self._engine.context_length

    @property
    def has_work(self) -> bool:
        """Also when a rank is lost: `step` says so."""
        return self._engine.has_work or self._link.watch.failure is not None

    @property
    def statistics(self) -> Statistics:
        return self._engine.statistics

    def add(self, request: Request) -> None:
        self._link.watch.check()
        request = portable(request)
        self._engine.add(request)  # what it refuses the others never hear of
        self._calls.append(request)

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)
        self._calls.append(request_id)

    def step(self) -> list[TokenOutput]:
        with self._link.watch.guard():
            self._link.send(Step(self._calls, self._digest))
            self._calls = []
            outputs = self._engine.step()
        self._digest = digest(outputs, self._engine.statistics)
        return outputs

    def close(self) -> None:
        self._end()

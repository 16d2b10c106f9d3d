"""What the rank processes of tests do. Imports no transformers, which would take each of them seconds."""

import hashlib
import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import msgspec
import torch

from stages.interface import Engine, EngineFailed, Request, Statistics, TokenOutput
from stages.stage6_parallel import peer_memory
from stages.stage6_parallel.communicator import Communicator
from stages.stage6_parallel.engine import EngineConfig, ParallelEngine, build_rank, follow
from stages.stage6_parallel.launcher import Place
from stages.stage6_parallel.link import Follower, Leader, Step
from tests.oracle import run_arriving, run_engine


class StoreLink:
    """Both ends of a link, through the ranks' store."""

    def __init__(self, place: Place) -> None:
        # nobody dies here
        self.watch = SimpleNamespace(failure=None, check=lambda: None, guard=nullcontext)
        self._store = place.store
        self._count = 0

    def send(self, step: Step | None) -> None:
        self._store.set(f"step {self._count}", msgspec.msgpack.encode(step))
        self._count += 1

    def receive(self) -> Step | None:
        message = self._store.get(f"step {self._count}")
        self._count += 1
        return msgspec.msgpack.decode(message, type=Step | None)


def serve(
    place: Place, communicator: Communicator, settings: dict[str, Any], requests: list[Request], seed: int
) -> tuple[dict[str, list[TokenOutput]], Statistics, str]:
    """Requests that come and go at rank 0: its outputs, and each rank's statistics and tables at the end."""
    engine = build_rank(EngineConfig(**settings), place, communicator)
    link = StoreLink(place)
    outputs: dict[str, list[TokenOutput]] = {}
    if place.rank == 0:
        parallel = ParallelEngine(engine, cast(Leader, link), engine.close)
        outputs = run_arriving(parallel, requests, random.Random(seed))
        parallel.step()  # carries the last calls
        link.send(None)
    else:
        follow(engine, cast(Follower, link))
    return outputs, engine.statistics, tables(engine)


def tables(engine: Any) -> str:
    """A hash of all that a rank's scheduling depends on: queues, slots, pages, and the radix tree."""
    table = engine._table
    tree: list[Any] = []
    stack = [table._cache.tree.root]
    while stack:
        node = stack.pop()
        tree.append((node.tokens, node.pages, node.locks, node.last_used))
        stack.extend(node.children[key] for key in sorted(node.children))
    state = [
        [(s.request.id, s.slot, s.pages, s.tokens, s.scheduled) for s in (*table.waiting, *table.running)],
        table._slots, table._allocator._free, tree,
    ]  # fmt: skip
    return hashlib.sha256(repr(state).encode()).hexdigest()


def count(
    place: Place, communicator: Communicator, settings: dict[str, Any], requests: list[Request]
) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives and bytes of a run. Every rank is called directly."""
    engine = build_rank(EngineConfig(**settings), place, communicator)
    communicator.calls.clear()
    communicator.bytes.clear()
    run_engine(engine, requests)
    return dict(communicator.calls), dict(communicator.bytes)


def collect(place: Place, communicator: Communicator, dtype: torch.dtype, rows: int) -> list[list[Any]]:
    """The two collectives on small numbers that tell the ranks apart."""
    x = torch.arange(rows * 2, dtype=dtype).view(rows, 2) + 10 * place.rank
    with torch.inference_mode():
        gathered = communicator.all_gather(x)
        return [gathered.tolist(), communicator.all_reduce(x).tolist()]


def disagree(
    place: Place, communicator: Communicator, settings: dict[str, Any], request: Request
) -> list[str]:
    """The last rank takes another token for its own."""
    engine = build_rank(EngineConfig(**settings), place, communicator)
    link = StoreLink(place)
    if place.rank == 0:
        parallel = ParallelEngine(engine, cast(Leader, link), engine.close)
        parallel.add(request)
        while parallel.has_work:
            parallel.step()
        parallel.step()  # nothing to compute: only the digest of the last commit
        link.send(None)
        return []
    try:
        follow(Lying(engine) if place.rank == place.size - 1 else engine, cast(Follower, link))
    except EngineFailed as error:
        return [str(error)]
    return []


def pages(place: Place, communicator: Communicator, settings: dict[str, Any], counts: list[int]) -> int:
    """Of an engine on whose ranks different numbers of pages were measured."""
    config = EngineConfig(**settings, num_pages=counts[place.rank])
    return build_rank(config, place, communicator).statistics.pages


class Lying:
    """An engine that reports its last token wrongly."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.add, self.abort = engine.add, engine.abort

    @property
    def statistics(self) -> Statistics:
        return self._engine.statistics

    def step(self) -> list[TokenOutput]:
        return [
            TokenOutput(output.request_id, output.token_id + bool(output.finish_reason))
            for output in self._engine.step()
        ]


def smallest(place: Place, communicator: Communicator, numbers: list[int]) -> int:
    return communicator.smallest(numbers[place.rank])


def share(place: Place, communicator: Communicator, able: list[int]) -> str:
    """Why ranks on a CPU cannot share memory. Those that are `able` believe that they can."""
    with patch.object(peer_memory, "_export", _exported) if place.rank in able else nullcontext():
        try:
            peer_memory.shared(100, torch.device("cpu"), place.rank, place.size)
        except peer_memory.NotShared as error:
            return str(error)
    return ""


def _exported(length: int, device: torch.device, rank: int, size: int) -> tuple[torch.Tensor, bytes]:
    return torch.zeros(length, dtype=torch.uint8), bytes(64)

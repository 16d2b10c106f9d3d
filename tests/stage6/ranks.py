"""Groups of rank processes that run many cases: to start one takes seconds, a case hardly any."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from stages.stage6_parallel.communicator import Communicator
from stages.stage6_parallel.launcher import Place

T = TypeVar("T")
# A case's first arguments. The store is empty for every case.
Case = Callable[..., T]


class Ranks:
    """`size` processes on the CPU that are joined by gloo."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        self._store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()  # or the end of a rank that dies would not be noticed
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, case: Case[T], *arguments: Any) -> list[T]:
        """What `case(place, communicator, *arguments)` returns on each rank."""
        for end in self._ends:
            end.send((case, arguments))
        results = [end.recv() for end in self._ends]
        for rank, (error, _) in enumerate(results):
            assert not error, f"rank {rank} failed:\n{error}"
        return [result for _, result in results]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, size)
    communicator = Communicator(store, rank, size, torch.device("cpu"), nccl=False)
    number = 0
    while True:
        case, arguments = pipe.recv()
        number += 1
        place = Place(rank, size, rank, size, "127.0.0.1", PrefixStore(f"case {number}", store))
        try:
            pipe.send(("", case(place, communicator, *arguments)))
        except Exception:
            pipe.send((traceback.format_exc(), None))

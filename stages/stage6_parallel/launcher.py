"""From one process to a rank each: started here, or by `torchrun`, perhaps on several machines.

Either way a process learns its place from the environment variables that `torchrun` sets, and the ranks find
each other through a key-value store of PyTorch's.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Which of the model's processes this is, and what it starts with."""

    rank: int
    size: int
    local_rank: int  # among the ranks of this machine
    local_size: int
    host: str  # where the others find rank 0
    store: Store
    children: Mapping[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)  # by rank

    def device(self, name: str) -> tuple[str, bool]:
        """This rank's device for a `--device` flag, and whether it is a GPU that no other rank has.

        `auto` and `cuda` deal out the machine's GPUs. One GPU that is named is for all ranks.
        """
        count = torch.cuda.device_count()
        if name not in ("auto", "cuda") or count == 0:
            return "cpu" if name == "auto" else name, False
        return f"cuda:{self.local_rank % count}", self.local_size <= count


def join(size: int, config: str) -> Place:
    """Take this process's place among `size`. Without `torchrun` it is rank 0, and starts the others here
    with `config`, which is an engine's configuration as JSON."""
    return _from_environment() if "WORLD_SIZE" in os.environ else _start_others(size, config)


def check_world(size: int) -> None:
    """Raises a ValueError if `torchrun` started another number of processes than `size`."""
    world = os.environ.get("WORLD_SIZE", str(size))
    if world != str(size):
        raise ValueError(
            f"tp is {size}, but WORLD_SIZE, which torchrun sets, is {world}: give --tp {world}, "
            "or start without torchrun"
        )


def _from_environment() -> Place:
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in variables if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is set, as torchrun does, but not {', '.join(missing)}")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    store, _, _ = next(rendezvous("env://"))
    return Place(rank, size, local_rank, local_size, os.environ["MASTER_ADDR"], store)


def _start_others(size: int, config: str) -> Place:
    with socket.create_server((_LOOPBACK, 0)) as listener:  # a free port, for nobody outside
        port = listener.getsockname()[1]
        store = TCPStore(
            _LOOPBACK, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TQDM_DISABLE": "1",  # one bar is enough
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    # No fork: CUDA would not survive it. No multiprocessing: it imports the user's main module again.
    command = [sys.executable, "-m", "stages.stage6_parallel.worker", str(os.getpid()), config]
    children: dict[int, subprocess.Popen[bytes]] = {}
    # The others inherit that SIGINT is blocked: Ctrl-C reaches all of a terminal, and rank 0 ends them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for rank in range(1, size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children[rank] = subprocess.Popen(command, env=environment | place, stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return Place(0, size, 0, size, _LOOPBACK, store, children)

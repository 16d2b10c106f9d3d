"""What the ranks of one model say to each other while they compute."""

import os
import threading
from collections import Counter
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

_LOADING = timedelta(hours=1)  # a rank may wait so long for another's weights; nobody waits while idle
_LEAVING_S = 5.0
# the newer name, since PyTorch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class FewRows(Protocol):
    """An all-reduce joined with what follows it; see `one_shot.py`."""

    most_rows: int

    def add_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`Ops.add_norm` of the sum of all ranks' `x` [T, H], T up to `most_rows`."""

    def release(self) -> None:
        """Free a kernel that waits for a rank that will not come."""

    def close(self) -> None:
        """Give back what it holds; the last call."""


class Communicator:
    """The collectives of one group of ranks, which every rank must call in the same order.

    They go through NCCL where every rank has a GPU of its own, else through gloo and the host's memory.
    `few_rows` is for decode steps, where there is one.
    `calls` and `bytes` count what this rank passed in, by the name of the collective; a replayed CUDA graph
    is not counted.
    """

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, nccl: bool) -> None:
        if dist.is_initialized():
            raise ValueError(
                "torch.distributed is in use in this process: end the other engine with tp, "
                "or run this one in a process of its own"
            )
        if nccl:
            torch.cuda.set_device(device)
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # who watches the ranks says more
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_LOADING)
        self.size = size
        self.few_rows: FewRows | None = None
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._nccl = nccl

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in its place."""
        self._count("all_reduce", x)
        if self._nccl or not x.is_cuda:
            dist.all_reduce(x)
            return x
        host = x.cpu()
        dist.all_reduce(host)
        return x.copy_(host)

    def all_gather(self, x: Tensor) -> Tensor:
        """[R, n] of each rank, side by side in the order of ranks: [R, size * n]."""
        self._count("all_gather", x)
        local = x.contiguous() if self._nccl else x.cpu().contiguous()
        parts = local.new_empty(self.size * len(x), x.shape[1])  # one rank's rows after the other's
        _all_gather(parts, local)
        return parts.to(x.device).view(self.size, *x.shape).transpose(0, 1).flatten(1)

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' `number`. Waits for all of them, on the host."""
        shared = torch.tensor(number)
        dist.all_reduce(shared, op=dist.ReduceOp.MIN)
        return int(shared)

    def abort(self) -> None:
        """Free a thread of this process that waits for a rank that will not come; gloo does so by itself
        when that rank is killed. Returns when no CUDA graph holds one of NCCL's operations any more."""
        if self.few_rows is not None:
            self.few_rows.release()
        if self._nccl and dist.is_initialized():
            dist.distributed_c10d._get_default_group().abort()

    def close(self) -> None:
        """Leave the group, whether or not the others are there."""
        aborted = threading.Thread(target=self.abort, daemon=True)  # else NCCL would wait for them
        aborted.start()
        aborted.join(_LEAVING_S)
        if aborted.is_alive():
            return
        if self.few_rows is not None:
            self.few_rows.close()
            self.few_rows = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _count(self, name: str, x: Tensor) -> None:
        self.calls[name] += 1
        self.bytes[name] += x.numel() * x.element_size()

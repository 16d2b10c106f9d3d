"""Memory of one GPU that the processes of other GPUs read and write as if it were theirs.

PyTorch's symmetric memory does this too, but up to 2.13 at least it numbers its meetings by process (as its
issue 196082 says of subgroups): rank 0 would wait for ever if it had an engine before, since the other ranks
are new processes. So this asks the driver for handles, which one process exports and another opens.
"""

import ctypes
import socket
import weakref
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")
_BLOCK = 2 << 20  # CUDA cuts smaller allocations out of blocks of this size, and shares whole blocks


class NotShared(Exception):
    """The ranks cannot read each other's memory; the message says why."""


def shared(length: int, device: torch.device, rank: int, size: int) -> list[Tensor]:
    """Zeros in every rank's memory, as this rank sees them: [bytes] uint8 of each rank in their order, with
    `length` bytes or more.

    All ranks call it, on GPUs that are numbered as the ranks, and none goes on before all have answered.

    Raises:
        NotShared: on all ranks, if one has none to share, or cannot open another's.
    """
    own, handle, reason = torch.empty(0), b"", ""
    try:
        own, handle = _export(-(-length // _BLOCK) * _BLOCK, device, rank, size)
    except Exception as error:  # no driver, an old one, no memory: the others wait for this rank's word
        reason = str(error) or repr(error)
    told = _gather((socket.gethostname(), handle, reason), size)
    for other, (host, _, said) in enumerate(told):
        if said or host != told[0][0]:
            raise NotShared(f"rank {other}: {said or 'it is on another machine than rank 0'}")
    seen: list[Tensor] = []
    try:
        for other, (_, theirs, _) in enumerate(told):
            seen.append(own if other == rank else _Memory.of(theirs, own.numel()).tensor())
    except Exception as error:
        reason = str(error) or repr(error)
    for other, said in enumerate(_gather(reason, size)):
        if said:
            raise NotShared(f"rank {other}: {said}")
    return seen


def _gather(word: _T, size: int) -> list[_T]:
    told: list[_T] = [word] * size
    dist.all_gather_object(told, word)
    return told


def _export(length: int, device: torch.device, rank: int, size: int) -> tuple[Tensor, bytes]:
    for other in range(size):
        if other != rank and not torch.cuda.can_device_access_peer(device, other):
            raise NotShared(f"GPU {rank} cannot read the memory of GPU {other}")
    own = _Memory.new(length).tensor().zero_()
    torch.cuda.synchronize(device)  # who sees it sees zeros
    handle = _IpcHandle()
    _driver("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(own.data_ptr()))
    return own, bytes(handle)


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_byte * 64)]


class _Memory:
    """Bytes on a GPU that are given back when no tensor sees them any more, or else with the process."""

    def __init__(self, address: int, length: int, end: str) -> None:
        weakref.finalize(self, _call, end, ctypes.c_uint64(address)).atexit = False
        view = {"shape": (length,), "typestr": "|u1", "data": (address, False), "version": 3}
        self.__cuda_array_interface__ = view

    @classmethod
    def new(cls, length: int) -> "_Memory":
        """Of its own: who opens a handle sees all of the allocation that it is of."""
        address = ctypes.c_uint64()
        _driver("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(length))
        return cls(address.value, length, "cuMemFree_v2")

    @classmethod
    def of(cls, exported: bytes, length: int) -> "_Memory":
        """Another process's, perhaps another GPU's."""
        address, lazy_peers = ctypes.c_uint64(), ctypes.c_uint(1)
        handle = _IpcHandle.from_buffer_copy(exported)
        _driver("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, lazy_peers)
        return cls(address.value, length, "cuIpcCloseMemHandle")

    def tensor(self) -> Tensor:
        seen = torch.as_tensor(self)
        if not seen.is_cuda:
            raise NotShared("torch.set_default_device would copy it away from the GPU")
        return seen


def _call(name: str, *arguments: object) -> int:
    """A function of the CUDA driver, in this thread's context; its status."""
    return int(getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments))


def _driver(name: str, *arguments: object) -> None:
    if status := _call(name, *arguments):
        raise NotShared(f"{name}: CUDA error {status}")

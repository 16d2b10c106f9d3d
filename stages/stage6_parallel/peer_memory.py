"""Memory of one GPU that the processes of other GPUs read and write as if it were theirs.

PyTorch's symmetric memory does this too, but numbers its meetings by process (its issue 196082): rank 0 would
wait for ever if it had an engine before, since the other ranks are new processes.
"""

import ctypes
import weakref

import torch
import torch.distributed as dist
from torch import Tensor


def shared(length: int, device: torch.device, rank: int, size: int) -> list[Tensor]:
    """So many zero bytes in every rank's memory, as this rank sees them: [length] uint8 of each rank. All
    ranks of one machine call it, the device of each being numbered as the rank.

    Raises:
        OSError: there is no driver.
        RuntimeError: a rank cannot export its memory, or this one cannot read another's.
    """
    exported: bytes | None = None
    try:
        if not all(torch.cuda.can_device_access_peer(device, i) for i in range(size) if i != rank):
            raise RuntimeError("they cannot read each other's")
        own = torch.as_tensor(_Memory.new(length)).zero_()
        torch.cuda.synchronize(device)  # who sees it sees zeros
        handle = _IpcHandle()
        _driver("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(own.data_ptr()))
        exported = bytes(handle)
    finally:  # the others wait for this rank's word in any case
        told: list[bytes | None] = [None] * size
        dist.all_gather_object(told, exported)
    seen = []
    for other, theirs in enumerate(told):
        if theirs is None:
            raise RuntimeError(f"rank {other} has none to share")
        seen.append(own if other == rank else torch.as_tensor(_Memory.of(theirs, length)))
    return seen


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
        """Of its own, since whoever maps it maps the whole allocation."""
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


def _call(name: str, *arguments: object) -> int:
    """A function of the CUDA driver, in this thread's context; its status."""
    return int(getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments))


def _driver(name: str, *arguments: object) -> None:
    if status := _call(name, *arguments):
        raise RuntimeError(f"{name}: CUDA error {status}")

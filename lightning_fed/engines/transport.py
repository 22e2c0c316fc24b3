"""Objects between processes of one machine: pickled, with their tensors beside them in memory that is mapped.

What is packed once can be sent to many: each receiver maps the same pages, and gets pages of its own where it writes.
The memory has no name, so it is gone with the last process that holds it, however that process ends.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import pickle
import socket
import struct
import tempfile
import weakref
from collections.abc import Iterator
from types import CodeType
from typing import Any

import cloudpickle
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_fed._compat.torch import storage_key
from lightning_fed.wire.tensor_array import TensorArray

_HEADER = struct.Struct("!QQ")  # bytes of the pickle, number of buffers beside it
_ALIGNED = 64
_INLINE = 512  # smaller buffers stay in the pickle
_SMALL = 1 << 16  # smaller tensors have memory of their own in the receiver, which can be resized


class Packed:
    """An object ready to be sent, any number of times."""

    def __init__(self, pickled: bytes, buffers: list[pickle.PickleBuffer]) -> None:
        views = [buffer.raw() for buffer in buffers]
        self.pickled, self.sizes = pickled, [view.nbytes for view in views]
        self.memory: int | None = None
        if views:
            self.memory = _anonymous_file()
            weakref.finalize(self, os.close, self.memory)
            os.truncate(self.memory, _end(self.sizes))
            for view, start in zip(views, _starts(self.sizes), strict=True):
                _write(self.memory, view, start)


def dump(thing: Any, *, by_value: bool = False) -> Packed:
    """Pickle ``thing``.

    Args:
        thing: Anything that can be pickled.
        by_value: Also take along classes and functions that the receiver cannot import: lambdas, those of a notebook or
            of the script that runs.
    """
    buffers: list[pickle.PickleBuffer] = []

    def beside(buffer: pickle.PickleBuffer) -> bool:
        small = buffer.raw().nbytes < _INLINE
        if not small:
            buffers.append(buffer)
        return small

    stream = io.BytesIO()
    pickler = _ByValue if by_value else _ByName
    pickler(stream, protocol=5, buffer_callback=beside).dump(thing)
    return Packed(stream.getvalue(), buffers)


def to_bytes(thing: Any, *, by_value: bool = False) -> bytes:
    """Do as ``dump``, in one piece."""
    stream = io.BytesIO()
    (_ByValue if by_value else _ByName)(stream, protocol=5).dump(thing)
    return stream.getvalue()


def from_bytes(pickled: Any) -> Any:
    """Return what ``to_bytes`` was given."""
    return pickle.loads(pickled)


def transmit(to: socket.socket, packed: Packed) -> None:
    """Send an object; the receiver calls ``receive``."""
    sizes = struct.pack(f"!{len(packed.sizes)}Q", *packed.sizes)
    header = _HEADER.pack(len(packed.pickled), len(packed.sizes))
    # The descriptor goes with the first byte that is read.
    socket.send_fds(to, [header], [] if packed.memory is None else [packed.memory])
    to.sendall(sizes + packed.pickled)


def receive(source: socket.socket) -> Any:
    """Wait for an object.

    Raises:
        EOFError: If the other side has gone.
    """
    header, memory = b"", []
    while len(header) < _HEADER.size:
        part, descriptors, _, _ = socket.recv_fds(source, _HEADER.size - len(header), 1)
        memory += descriptors
        if not part:
            raise EOFError
        header += part
    length, count = _HEADER.unpack(header)
    sizes = list(struct.unpack(f"!{count}Q", _read(source, 8 * count)))
    pickled = _read(source, length)
    if not memory:
        return pickle.loads(pickled)
    try:
        # A private mapping: what is written stays here.
        mapped = memoryview(mmap.mmap(memory[0], _end(sizes), access=mmap.ACCESS_COPY))
    finally:
        os.close(memory[0])
    buffers = [mapped[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=True)]
    return pickle.loads(pickled, buffers=buffers)


class _Storage:
    """The memory under one or more tensors, as bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if not len(self.bytes):
            return _storage, (pickle.PickleBuffer(b""),)
        # Not by way of numpy(), after which a tensor cannot be resized.
        memory = (ctypes.c_uint8 * len(self.bytes)).from_address(self.bytes.data_ptr())
        memory.tensor = self.bytes  # type: ignore[attr-defined]  # which may have no other owner once all is pickled
        return _storage, (pickle.PickleBuffer(memory),)


def _storage(buffer: Any) -> Tensor:
    if not len(buffer):
        return torch.empty(0, dtype=torch.uint8)
    if len(buffer) <= _SMALL:
        return torch.frombuffer(bytearray(buffer), dtype=torch.uint8).clone()
    return torch.frombuffer(buffer if isinstance(buffer, memoryview) else bytearray(buffer), dtype=torch.uint8)


def _array(tensor: Tensor) -> TensorArray:
    return TensorArray(tensor)  # the class itself has the name of Flower's, and cannot be pickled


def _tensor(storage: Tensor, dtype: torch.dtype, offset: int, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage.untyped_storage(), offset, shape, stride)


def _is_plain(tensor: Tensor) -> bool:
    special = tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and not special


class _Tensors:
    """Pickles plain CPU tensors by their memory, once for all tensors that share it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._storages: dict[int, _Storage] = {}

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is TensorArray and (tensor := thing.__dict__["tensor"]) is not None:
            return _array, (tensor,)
        if type(thing) is Tensor and not thing.requires_grad:
            thing = thing.cpu()  # a device's number means another device in a process that sees only one
        if type(thing) is Tensor and _is_plain(thing):
            storage = self._storages.setdefault(storage_key(thing), _Storage(thing))
            return _tensor, (storage, thing.dtype, thing.storage_offset(), thing.shape, thing.stride())
        return self._other(thing)

    def _other(self, thing: Any) -> Any:
        return NotImplemented


class _ByName(_Tensors, pickle.Pickler):
    pass


class AbsentTrainer:
    """In a worker, where the server's trainer would be: what holds it (a datamodule, a callback) is sent without it."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"trainer.{name}: the server's trainer is not in the processes in which clients train. Use the `trainer`"
            " that a hook is called with, or keep what you need of the server's in an attribute of your own."
        )

    def __reduce__(self) -> Any:
        return AbsentTrainer, ()


class _ByValue(_Tensors, cloudpickle.Pickler):
    def _other(self, thing: Any) -> Any:
        if isinstance(thing, Trainer):
            return AbsentTrainer, ()
        if isinstance(thing, CodeType):
            # cloudpickle leaves the name of the source file out, and with it the lines of a traceback.
            make, parts = cloudpickle.Pickler.dispatch_table[CodeType](thing)
            return make, tuple(thing.co_filename if part == "<dynamic-code>" else part for part in parts)
        return cloudpickle.Pickler.reducer_override(self, thing)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lightning_fed", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _starts(sizes: list[int]) -> Iterator[int]:
    start = 0
    for size in sizes:
        yield start
        start += -(-size // _ALIGNED) * _ALIGNED


def _end(sizes: list[int]) -> int:
    return sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)


def _write(memory: int, view: memoryview, start: int) -> None:
    written = 0
    while written < view.nbytes:  # one call writes at most 2 GiB
        written += os.pwrite(memory, view[written:], start + written)


def _read(source: socket.socket, length: int) -> bytes:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        got = source.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(buffer)

"""Tensors as Flower's arrays, which within a process are the tensors themselves."""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

from lightning_fed.values.weights import dtype_name

_NARROW = {torch.bfloat16} | {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}


class TensorArray(Array):
    """A Flower ``Array`` that keeps a tensor and turns it into bytes only when bytes are asked for.

    Within a process nothing is serialised. ``numpy()`` gives a copy, so nobody who got the record can change what
    others see. bfloat16 and float8, which NumPy lacks, become float32, which holds them exactly.
    """

    def __init__(self, tensor: Tensor) -> None:
        held = self.__dict__
        held["tensor"], held["dtype"] = tensor.detach(), _numpys_name(tensor.dtype)
        held["shape"], held["stype"] = tuple(tensor.shape), "numpy.ndarray"

    @property
    def data(self) -> bytes:
        """The array in NumPy's format, as Flower sends it."""
        if self.__dict__["tensor"] is None:
            return bytes(self.__dict__["_bytes"])
        buffer = BytesIO()
        np.save(buffer, self.numpy(), allow_pickle=False)
        return buffer.getvalue()

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["tensor"], self.__dict__["_bytes"] = None, value

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return a copy of the tensor as a NumPy array."""
        tensor = self.__dict__["tensor"]
        if tensor is None:
            return super().numpy()
        if tensor.dtype in _NARROW:
            tensor = tensor.float()
        return np.array(tensor.cpu().numpy(), copy=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def decoded(array: Array) -> Tensor:
    """Return the tensor of an array in NumPy's format.

    As ``numpy.load`` without pickle, which takes the memory that the header asks for before it looks whether so much
    came.

    Raises:
        ValueError: If the array is of another form, or its header and its bytes do not agree.
    """
    data = array.data
    stream = BytesIO(data)
    version = np.lib.format.read_magic(stream) if array.stype == "numpy.ndarray" else None
    if version not in _HEADERS:
        raise ValueError(f"an array as {array.stype[:50]!r}, version {version}: it is no tensor in NumPy's format")
    shape, is_fortran, dtype = _HEADERS[version](stream)
    values = bytearray(memoryview(data)[stream.tell() :])
    if dtype.kind not in "biufc" or math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError(f"{len(values)} bytes for an array of {shape} {dtype}")
    if not values:
        return torch.from_numpy(np.empty(shape, dtype))
    made = np.frombuffer(values, dtype).reshape(shape, order="F" if is_fortran else "C")
    return of_bytes(torch.from_numpy(made))


def of_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory is bytes from elsewhere, if it can be one.

    Raises:
        ValueError: If a bool is neither, with which torch computes anything.
    """
    if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise ValueError("a bool that is neither True nor False")
    return tensor


@lru_cache
def _numpys_name(dtype: torch.dtype) -> str:
    return dtype_name(torch.float32 if dtype in _NARROW else dtype)


# Flower writes the class's name into the bytes it sends: on the other side a plain Array comes out.
TensorArray.__qualname__ = "Array"

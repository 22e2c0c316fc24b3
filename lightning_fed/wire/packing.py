"""All tensors of a message as one piece of bytes, as they are in memory.

Flower sends each array of a message by calls of its own, in NumPy's format, which has no narrow floats. Between our own
server and sites all go as one array, bfloat16 and float8 as they are. What comes off the wire are ``TensorArray``, as
everywhere within a process: Flower's strategies and mods ask these for NumPy's form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from lightning_fed._compat.flower import filled
from lightning_fed.values.weights import dtype_name
from lightning_fed.wire.tensor_array import TensorArray, of_bytes

_PACKED, _INDEX = "lightning-fed.packed", "lightning-fed.index"
_ALIGNED = 64
# Far beyond any tensor: what says more is wrong, and its product would take long to find.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 64, 2**48
_KINDS = ("bool", "uint", "int", "float", "bfloat", "complex")
_DTYPES = {
    name: dtype
    for name in dir(torch)
    if isinstance(dtype := getattr(torch, name), torch.dtype) and name == dtype_name(dtype)
    if name.rstrip("0123456789").partition("8_")[0] in _KINDS and not re.fullmatch(r"u?int[1-7]", name)
}


class Packer:
    """Packs contents that share their arrays once, so that Flower, too, finds them to be the same."""

    def __init__(self) -> None:
        self._packed: dict[tuple[int, ...], tuple[list[Any], RecordDict]] = {}

    def pack(self, content: RecordDict) -> RecordDict:
        """Return the same records, their tensors as one piece; the content itself stays as it is."""
        records = {key: record for key, record in content.items() if _is_plain(record)}
        if not records:
            return content
        key = tuple(map(id, records.values()))
        if key not in self._packed:
            self._packed[key] = list(records.values()), _pack(records)  # the records, that no other gets their number
        others = {name: record for name, record in content.items() if name not in records}
        return filled(RecordDict(), {**others, **self._packed[key][1]})


def _is_plain(record: Any) -> bool:
    """Return whether all arrays of a record are tensors that are in memory as one would think."""
    if not isinstance(record, ArrayRecord):
        return False
    tensors = [array.__dict__.get("tensor") for array in record.values()]
    return all(t is not None and t.layout == torch.strided and dtype_name(t.dtype) in _DTYPES for t in tensors)


def _pack(records: Mapping[str, Any]) -> RecordDict:
    parts, index, size = [], [], 0
    for key, record in records.items():
        entries = []
        for name, array in record.items():
            tensor = array.__dict__["tensor"].cpu().resolve_conj().resolve_neg().contiguous()
            entries.append([name, dtype_name(tensor.dtype), list(tensor.shape)])
            parts.append((size, tensor))
            size += _room(tensor.nbytes)
        index.append([key, entries])
    memory = np.zeros(size, dtype=np.uint8)
    for start, tensor in parts:
        memory[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy()
    packed = ArrayRecord({"": Array("uint8", (size,), _PACKED, memory.tobytes())})
    return RecordDict({_PACKED: packed, _INDEX: ConfigRecord({"json": json.dumps(index)})})


def unpack_tensors(content: RecordDict) -> None:
    """Make of what ``Packer.pack`` gave the records that they were; a content that nobody packed stays as it is.

    Raises:
        ValueError: If the index does not describe the bytes.
    """
    packed, index = content.pop(_PACKED, None), content.pop(_INDEX, None)
    if packed is None and index is None:
        return
    if not isinstance(packed, ArrayRecord) or not isinstance(index, ConfigRecord) or list(packed) != [""]:
        raise ValueError("half of its tensors")
    memory = torch.frombuffer(bytearray(packed[""].data) or bytearray(1), dtype=torch.uint8)
    start, end = 0, len(packed[""].data)
    for key, entries in json.loads(str(index["json"])):
        if not isinstance(key, str) or key in content:
            raise ValueError(f"tensors for {key!r}, which is there already")
        tensors = {}
        for name, dtype, shape in entries:
            if name in tensors:
                raise ValueError(f"two tensors {name!r}")
            tensors[str(name)] = TensorArray(_tensor(memory[:end], start, str(dtype), shape))
            start += _room(tensors[str(name)].__dict__["tensor"].nbytes)
        content[key] = filled(ArrayRecord(), tensors)
    if start != end:
        raise ValueError(f"{end} bytes for tensors of {start}")


def _tensor(memory: Tensor, start: int, name: str, shape: Any) -> Tensor:
    dtype = _DTYPES.get(name)
    if dtype is None or not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name[:50]} {str(shape)[:200]} for a tensor")
    if not all(isinstance(size, int) and 0 <= size < _MOST_ELEMENTS for size in shape):
        raise ValueError(f"sizes for a {name} tensor that are none")
    size = math.prod(shape) * dtype.itemsize
    if start + size > len(memory):
        raise ValueError(f"too few bytes for a {name} tensor of shape {shape}")
    return of_bytes(memory[start : start + size].view(dtype)).reshape(shape)


def _room(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED

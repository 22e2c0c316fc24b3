"""A content as few pieces of bytes: its tensors as they are in memory, and its numbers and texts as JSON.

Flower sends each record and each array of a message as an object of its own, with a request for each on each of its
ways, and arrays in NumPy's format, which has no narrow floats. Between our own server and sites all tensors go as one
object, bfloat16 and float8 as they are, and all else as another, or with them. What comes off the wire are
``TensorArray``, as everywhere within a process: Flower's strategies and mods ask these for NumPy's form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from lightning_fed._compat.flower import filled
from lightning_fed.values.weights import dtype_name
from lightning_fed.wire.tensor_array import TensorArray, of_bytes

_TENSORS, _REST = "lightning-fed.tensors", "lightning-fed.rest"
_ALIGNED = 64
# Bytes beyond which tensors go as one of Flower's arrays, whose pieces travel side by side.
_SMALL = 1 << 20
# Far beyond any tensor: what says more is wrong, and its product would take long to find.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 64, 2**48
# Of JSON that somebody else wrote: its characters, and its lists and objects, of which each takes much more memory.
# 50,000 tensors and 2,000 names have fewer.
_MOST_TEXT, _MOST_LISTS = 1 << 24, 1 << 17
_DTYPE_KINDS = ("bool", "uint", "int", "float", "bfloat", "complex")
_DTYPES = {
    name: dtype
    for name in dir(torch)
    if isinstance(dtype := getattr(torch, name), torch.dtype) and name == dtype_name(dtype)
    if name.rstrip("0123456789").partition("8_")[0] in _DTYPE_KINDS and not re.fullmatch(r"u?int[1-7]", name)
}
_RECORDS: dict[str, type[ConfigRecord] | type[MetricRecord]] = {"config": ConfigRecord, "metrics": MetricRecord}
_NAMES: dict[type, str] = {kind: name for name, kind in _RECORDS.items()}


class Packer:
    """Packs contents that share their arrays once, so that Flower, too, finds them to be the same."""

    def __init__(self) -> None:
        self._packed: dict[tuple[int, ...], tuple[list[Any], Any]] = {}

    def pack(self, content: RecordDict, *, is_reply: bool = False, apart: Container[str] = ()) -> RecordDict:
        """Return the same records in few; the content itself stays as it is.

        Args:
            content: Any content.
            is_reply: All in one record: nobody else sends the same tensors.
            apart: Names of records that stay as they are.
        """
        tensors = {key: record for key, record in content.items() if _is_plain(record)}
        simple = {key: record for key, record in content.items() if _is_simple(record) and key not in apart}
        packed = {key: record for key, record in content.items() if key not in tensors and key not in simple}
        rest = [list(content), [[key, _NAMES[type(record)], dict(record)] for key, record in simple.items()]]
        if is_reply:
            packed[_TENSORS] = _pack(tensors, rest)
            return filled(RecordDict(), packed)
        if tensors:
            ids = tuple(map(id, tensors.values()))
            if ids not in self._packed:  # with the records, that no other gets their number
                self._packed[ids] = list(tensors.values()), _pack(tensors, None)
            packed[_TENSORS] = self._packed[ids][1]
        packed[_REST] = ConfigRecord({"json": json.dumps(rest)})
        return filled(RecordDict(), packed)


def _is_plain(record: Any) -> bool:
    """Return whether all arrays of a record are tensors that are in memory as one would think."""
    if not isinstance(record, ArrayRecord):
        return False
    tensors = [array.__dict__.get("tensor") for array in record.values()]
    return all(t is not None and t.layout == torch.strided and dtype_name(t.dtype) in _DTYPES for t in tensors)


def _is_simple(record: Any) -> bool:
    """Return whether a record holds what JSON has: numbers and texts, and no bytes."""
    if type(record) not in _NAMES:
        return False
    return not any(isinstance(one, bytes) for v in record.values() for one in (v if isinstance(v, list) else [v]))


def _pack(records: Mapping[str, Any], rest: Any) -> ConfigRecord | ArrayRecord:
    """Return records of tensors as one: the length of an index, the index, and the bytes that it tells of."""
    parts, index, size = [], [], 0
    for key, record in records.items():
        entries = []
        for name, array in record.items():
            tensor = array.__dict__["tensor"].cpu().resolve_conj().resolve_neg().contiguous()
            entries.append([name, dtype_name(tensor.dtype), list(tensor.shape)])
            parts.append((size, tensor))
            size += _room(tensor.nbytes)
        index.append([key, entries])
    text = json.dumps([index, rest]).encode()
    begin = _room(8 + len(text))
    memory = np.zeros(begin + size, dtype=np.uint8)
    memory[: 8 + len(text)] = np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8)
    for start, tensor in parts:
        memory[begin + start : begin + start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy()
    if len(memory) <= _SMALL:
        return ConfigRecord({"bytes": memory.tobytes()})
    return ArrayRecord({"": Array("uint8", (len(memory),), _TENSORS, memory.tobytes())})


def unpack_content(content: RecordDict) -> None:
    """Make of what ``Packer.pack`` gave the records that they were; a content that nobody packed stays as it is.

    Raises:
        ValueError: If it does not describe itself.
        Exception: Of any kind, if it is something else.
    """
    packed, rest = content.pop(_TENSORS, None), content.pop(_REST, None)
    if packed is None and rest is None:
        return
    found = dict(content.items())
    within = None if packed is None else _unpack_tensors(packed, found)
    order = _unpack_rest(within if rest is None else read_json(str(rest["json"])), found)
    for key in list(content):
        del content[key]
    content.update({key: found[key] for key in [*(key for key in order if key in found), *found]})


def _unpack_tensors(packed: Any, found: dict[str, Any]) -> Any:
    """Take the tensors in; return what came with them."""
    data: bytes = packed["bytes"] if isinstance(packed, ConfigRecord) else packed[""].data  # type: ignore[assignment]
    memory, length = torch.frombuffer(bytearray(data), dtype=torch.uint8), int.from_bytes(data[:8], "little")
    start, end = _room(8 + length), len(data)
    index, rest = read_json(data[8 : 8 + length].decode())
    for key, entries in index:
        tensors: dict[str, TensorArray] = {}
        for name, dtype, shape in entries:
            if not isinstance(name, str) or name in tensors:
                raise ValueError(f"two tensors {name!r:.100}")
            tensors[name] = TensorArray(_tensor(memory, start, str(dtype), shape))
            start += _room(tensors[name].__dict__["tensor"].nbytes)
        _add(found, key, filled(ArrayRecord(), tensors))
    if start != end:
        raise ValueError(f"{end} bytes for tensors of {start}")
    return rest


def _unpack_rest(rest: Any, found: dict[str, Any]) -> list[str]:
    """Take the other records in; return the order of all."""
    order, records = rest
    for key, kind, values in records:
        _add(found, key, _RECORDS[kind](values))
    return [str(key) for key in order]


def read_json(text: str) -> Any:
    """Read what somebody else wrote.

    Raises:
        ValueError: If it is no JSON, or larger than anybody needs.
    """
    lists = text.count("[") + text.count("{")
    if len(text) > _MOST_TEXT or lists > _MOST_LISTS:
        raise ValueError(
            f"JSON of {len(text):,} characters and {lists:,} lists; at most {_MOST_TEXT:,} and {_MOST_LISTS:,} are read"
        )
    return _JSON.decode(text)


def _int(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**63:
        raise ValueError(f"{digits[:50]}, which is no integer of 64 bits")
    return number


_JSON = json.JSONDecoder(parse_int=_int)


def _add(found: dict[str, Any], key: Any, record: Any) -> None:
    if not isinstance(key, str) or key in found:
        raise ValueError(f"a record {key!r:.100}, which is there already")
    found[key] = record


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

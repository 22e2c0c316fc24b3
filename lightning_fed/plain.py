"""Flower's records as what a checkpoint takes: tensors, numbers, strings, lists and dicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from lightning_fed.messages import pack, tensor_of
from lightning_fed.tensor_array import TensorArray


def to_plain(value: Any) -> Any:
    """Records, arrays and containers of them as tensors, numbers, strings and dicts, for a checkpoint.

    Raises:
        TypeError: For anything else.
    """
    if isinstance(value, (np.str_, np.bytes_)):
        value = value.item()
    if isinstance(value, np.generic):  # first, for np.float64 is a float, too
        return {"__scalar__": torch.from_numpy(np.asarray(value).copy())}
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    if isinstance(value, bytes):
        return {"__bytes__": torch.frombuffer(bytearray(value or b"\0"), dtype=torch.uint8)[: len(value)].clone()}
    if isinstance(value, np.ndarray):
        return {"__ndarray__": torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))}
    if isinstance(value, Array):
        return {"__array__": tensor_of(value).clone()}
    for cls in (ArrayRecord, MetricRecord, ConfigRecord, RecordDict):
        if isinstance(value, cls):
            return {f"__{cls.__name__}__": {k: to_plain(v) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        items = [to_plain(item) for item in value]
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, dict):
        return {"__dict__": [[to_plain(k), to_plain(v)] for k, v in value.items()]}
    raise TypeError(f"{type(value).__name__} cannot go into a checkpoint.")


def from_plain(value: Any) -> Any:
    """The inverse of ``to_plain``."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    (key, inner), *_ = value.items()
    match key:
        case "__bytes__":
            return inner.numpy().tobytes()
        case "__scalar__":
            return inner.numpy()[()]
        case "__ndarray__":
            return inner.numpy().copy()
        case "__array__":
            return TensorArray(inner)
        case "__tuple__":
            return tuple(from_plain(item) for item in inner)
        case "__dict__":
            return {from_plain(k): from_plain(v) for k, v in inner}
    if key == "__ArrayRecord__":
        return pack({name: from_plain(array).__dict__["tensor"] for name, array in inner.items()})
    records = {"__MetricRecord__": MetricRecord, "__ConfigRecord__": ConfigRecord, "__RecordDict__": RecordDict}
    return records[key]({k: from_plain(v) for k, v in inner.items()})  # type: ignore[operator]

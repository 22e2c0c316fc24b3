"""How values of each type are written for a checkpoint, and made again. ``wire/plain.py`` says what that is for.

``write`` and ``read`` do the same for the values inside: see ``plain.Writer`` and ``plain.Reader``.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, Flag
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor, nn

from lightning_fed.wire.messages import pack
from lightning_fed.wire.tensor_array import TensorArray

# ------------------------------------------------------------------------------------------------------ numbers, arrays


def _write_tensor(value: Tensor, write: Any) -> list[Any]:
    return [value.detach().clone(), value.is_leaf and value.requires_grad, str(value.device)]


def _read_tensor(plain: list[Any], read: Any) -> Tensor:
    tensor, requires_grad, device = plain
    with suppress(RuntimeError, AssertionError):  # a machine without that device
        tensor = tensor.to(device)
    return tensor.requires_grad_(requires_grad)


def _read_parameter(plain: list[Any], read: Any) -> nn.Parameter:
    return nn.Parameter(_read_tensor([plain[0], False, plain[2]], read), plain[1])


def write_array(kind: str, value: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return an array or, as ``kind`` says, a scalar: as a tensor where torch has the dtype, else as bytes."""
    try:
        return {f"__{kind}__": torch.from_numpy(value.copy(order="K"))}
    except (TypeError, ValueError):
        if value.dtype.hasobject or value.dtype.fields:
            raise TypeError(f"An array of {value.dtype} cannot go into a checkpoint.") from None
    return {f"__raw_{kind}__": [value.dtype.str, list(value.shape), _write_bytes(value.tobytes())]}


def _read_raw(plain: list[Any], read: Any) -> np.ndarray[Any, Any]:
    dtype, shape, data = plain
    return np.frombuffer(bytearray(_read_bytes(data)), dtype).reshape(shape)


def _write_bytes(value: bytes | bytearray | memoryview) -> Tensor:
    return torch.frombuffer(bytearray(value or b"\0"), dtype=torch.uint8)[: len(value)].clone()


def _read_bytes(plain: Tensor) -> bytes:
    return plain.numpy().tobytes()


def _read_dtype(plain: str, read: Any) -> torch.dtype:
    dtype = getattr(torch, plain.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{plain} is no dtype.")
    return dtype


def _with_state(made: Any, setter: str, state: Any) -> Any:
    getattr(made, setter)(state)
    return made


def _read_generator(plain: Any, read: Any) -> np.random.Generator:
    state = read(plain)
    known = {"PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"} & {state["bit_generator"]}
    if not known:
        raise TypeError(f"{state['bit_generator']} is none of NumPy's bit generators.")
    made = np.random.Generator(getattr(np.random, known.pop())())
    made.bit_generator.state = state
    return made


# ----------------------------------------------------------------------------------- containers, the user's own classes

# The functions of a defaultdict that are known by name.
_FACTORIES: dict[str, Any] = {
    cls.__name__: cls for cls in (bool, int, float, complex, str, bytes, list, tuple, dict, set, deque, Counter)
}


def _write_defaultdict(value: defaultdict[Any, Any], write: Any) -> list[Any]:
    factory = value.default_factory
    name = None if factory is None else str(getattr(factory, "__name__", ""))
    if name is not None and _FACTORIES.get(name) is not factory:
        if factory is not write.factory:
            raise TypeError("A defaultdict's own function cannot go into a checkpoint.")
        name = ""
    return [name, write.pairs(value)]


def _read_defaultdict(plain: list[Any], read: Any) -> defaultdict[Any, Any]:
    name, pairs = plain
    factory = None if name is None else _FACTORIES.get(name, read.factory)
    if name is not None and factory is None:
        raise TypeError("A defaultdict finds no function to take.")
    return defaultdict(factory, read.pairs(pairs))


def _write_record(record: Any, write: Any) -> dict[str, Any]:
    return {name: write(value) for name, value in record.items()}


def _record_reader(cls: Any) -> Callable[[dict[str, Any], Any], Any]:
    return lambda plain, read: cls({name: read(value) for name, value in plain.items()})


def _read_arrays(plain: dict[str, Any], read: Any) -> ArrayRecord:
    return pack({name: read(array).__dict__["tensor"] for name, array in plain.items()})


def _read_member(plain: list[Any], read: Any) -> Enum:
    cls, member = read.classes.find(plain[0], Enum), read(plain[1])
    return cls(member) if issubclass(cls, Flag) else cls[member]


def _read_dataclass(plain: list[Any], read: Any) -> Any:
    cls: type = read.classes.find(plain[0], object)
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__qualname__} is no data class.")
    made: Any = object.__new__(cls)
    for name, value in read.pairs(plain[1]):
        object.__setattr__(made, name, value)
    return made


def _read_subclass(plain: list[Any], read: Any) -> Any:
    name, base, value = plain
    cls = {one.__name__: one for one in BASES}[base]
    return cls.__new__(read.classes.find(name, cls), _read_bytes(value) if cls is bytes else value)


# ----------------------------------------------------------------------------------------------------------- the tables

# A base of the user's classes -> what makes a value that base's own, without any method of the class.
BASES: dict[Any, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: lambda value: _write_bytes(memoryview(value)),
}
# A type -> its tag, how it is written, how it is made again.
KINDS: dict[Any, tuple[str, Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    bytes: ("bytes", lambda v, write: _write_bytes(v), lambda p, read: _read_bytes(p)),
    bytearray: ("bytearray", lambda v, write: _write_bytes(v), lambda p, read: bytearray(_read_bytes(p))),
    complex: ("complex", lambda v, write: [v.real, v.imag], lambda p, read: complex(*p)),
    range: ("range", lambda v, write: [v.start, v.stop, v.step], lambda p, read: range(*p)),
    tuple: ("tuple", lambda v, write: write.all(v), lambda p, read: tuple(read.all(p))),
    set: ("set", lambda v, write: write.all(v), lambda p, read: set(read.all(p))),
    frozenset: ("frozenset", lambda v, write: write.all(v), lambda p, read: frozenset(read.all(p))),
    deque: ("deque", lambda v, write: [v.maxlen, write.all(v)], lambda p, read: deque(read.all(p[1]), p[0])),
    dict: ("dict", lambda v, write: write.pairs(v), lambda p, read: dict(read.pairs(p))),
    OrderedDict: ("OrderedDict", lambda v, write: write.pairs(v), lambda p, read: OrderedDict(read.pairs(p))),
    Counter: ("Counter", lambda v, write: write.pairs(v), lambda p, read: Counter(dict(read.pairs(p)))),
    defaultdict: ("defaultdict", _write_defaultdict, _read_defaultdict),
    Tensor: ("tensor", _write_tensor, _read_tensor),
    nn.Parameter: ("parameter", _write_tensor, _read_parameter),
    torch.Size: ("Size", lambda v, write: list(v), lambda p, read: torch.Size(p)),
    torch.dtype: ("dtype", lambda v, write: str(v), _read_dtype),
    torch.device: ("device", lambda v, write: str(v), lambda p, read: torch.device(p)),
    torch.Generator: (
        "torch.Generator",
        lambda v, write: [str(v.device), v.get_state()],
        lambda p, read: _with_state(torch.Generator(p[0]), "set_state", p[1]),
    ),
    random.Random: (
        "random.Random",
        lambda v, write: write(v.getstate()),
        lambda p, read: _with_state(random.Random(), "setstate", read(p)),
    ),
    np.random.RandomState: (
        "RandomState",
        lambda v, write: write(v.get_state()),
        lambda p, read: _with_state(np.random.RandomState(), "set_state", read(p)),
    ),
    np.random.Generator: ("Generator", lambda v, write: write(v.bit_generator.state), _read_generator),
    ArrayRecord: ("ArrayRecord", _write_record, _read_arrays),
    **{cls: (cls.__name__, _write_record, _record_reader(cls)) for cls in (MetricRecord, ConfigRecord, RecordDict)},
}
# A tag -> how it is made again.
READ: dict[str, Callable[[Any, Any], Any]] = {
    **{f"__{tag}__": read for tag, _, read in KINDS.values()},
    "__scalar__": lambda p, read: p.numpy()[()],
    "__ndarray__": lambda p, read: p.numpy().copy(order="K"),
    "__raw_scalar__": lambda p, read: _read_raw(p, read)[()],
    "__raw_ndarray__": _read_raw,
    "__array__": lambda p, read: TensorArray(p),
    "__path__": lambda p, read: Path(p),
    "__enum__": _read_member,
    "__namedtuple__": lambda p, read: tuple.__new__(read.classes.find(p[0], tuple), read.all(p[1])),
    "__dataclass__": _read_dataclass,
    "__subclass__": _read_subclass,
}

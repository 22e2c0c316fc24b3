"""Values as what a checkpoint takes: tensors, numbers, strings, lists and dicts.

A checkpoint is read with ``weights_only=True``, which makes nothing else. So any other value is written as a dict whose
one key says what it is, and made again from it. What has no such form is a ``TypeError``; nothing is pickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from enum import Enum, Flag
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array
from torch import Tensor

from lightning_fed.wire.messages import tensor_of
from lightning_fed.wire.plain_kinds import BASES, KINDS, READ, write_array

Factory = Callable[[], Any] | None


class Classes(dict[str, type]):
    """The user's own classes that may be made again from a checkpoint: enums, named tuples, data classes, kinds of str.

    A checkpoint only names them. A name is looked up here and never imported, and no ``__init__`` is run: a file brings
    in nothing that the program which reads it does not work with anyway.

    Attributes:
        learns: Take in every class that is met in writing.
    """

    learns = False

    def name(self, cls: type) -> str:
        """Return the name of a class.

        Raises:
            TypeError: If it is not among these.
        """
        name = f"{cls.__module__}:{cls.__qualname__}"
        if self.learns:
            self[name] = cls
        if self.get(name) is not cls:
            raise TypeError(f"{cls.__qualname__} cannot go into a checkpoint.")
        return name

    def find(self, name: str, base: type) -> Any:
        """Return the class of a name.

        Raises:
            TypeError: If it is not among these, or no subclass of ``base``.
        """
        cls = self.get(name)
        if cls is None or not issubclass(cls, base):
            raise TypeError(f"{name.rpartition(':')[2]}, which the checkpoint names, is not there.")
        return cls


def to_plain(value: Any, classes: Classes | None = None, factory: Factory = None) -> Any:
    """Return a value in tensors, numbers, strings, lists and dicts, in memory of their own.

    What is held twice is one object in the result, too, and again after ``from_plain``.

    Args:
        value: Any value.
        classes: The user's own classes that may be made again.
        factory: The function that a ``defaultdict`` finds where it is read; all but those of builtin types need it.

    Raises:
        TypeError: If the value, or something in it, has no such form.
    """
    return Writer(Classes() if classes is None else classes, factory)(value)


def from_plain(plain: Any, classes: Classes | None = None, factory: Factory = None) -> Any:
    """Return the inverse of ``to_plain``.

    Raises:
        TypeError: If it needs a class or a function that is not given.
    """
    return Reader(Classes() if classes is None else classes, factory)(plain)


class Writer:
    """Writes a value, and what is in it, each once."""

    def __init__(self, classes: Classes, factory: Factory) -> None:
        self.classes, self.factory = classes, factory
        self._done: dict[int, tuple[Any, Any]] = {}
        self._begun: list[int] = []

    def __call__(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        key = id(value)
        if key in self._begun:
            raise TypeError(f"A {type(value).__name__} that holds itself cannot go into a checkpoint.")
        if key not in self._done:
            self._begun.append(key)
            try:
                self._done[key] = value, self._write(value)  # the value, too, or its id may become another's
            finally:
                self._begun.pop()
        return self._done[key][1]

    def _write(self, value: Any) -> Any:
        cls = type(value)
        if cls is list:
            return self.all(value)
        if cls is Tensor and value.is_cpu and not (value.is_leaf and value.requires_grad):
            return value.detach().clone()
        if cls in KINDS:
            tag, write, _ = KINDS[cls]
            return {f"__{tag}__": write(value, self)}
        if isinstance(value, np.generic):
            return write_array("scalar", np.asarray(value))
        if cls is np.ndarray:
            return write_array("ndarray", value)
        if isinstance(value, Array):
            return {"__array__": tensor_of(value).clone()}
        if isinstance(value, Path):
            return {"__path__": str(value)}
        return self._write_own(value, cls)

    def _write_own(self, value: Any, cls: type) -> Any:
        """Values of the user's own classes."""
        if isinstance(value, Enum):
            return {"__enum__": [self.classes.name(cls), self(value.value) if isinstance(value, Flag) else value.name]}
        attributes = getattr(value, "__dict__", {})
        if dataclasses.is_dataclass(cls) and cls.__new__ is object.__new__:
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(cls) if hasattr(value, f.name)}
            return {"__dataclass__": [self.classes.name(cls), self.pairs({**fields, **attributes})]}
        if isinstance(value, tuple) and hasattr(cls, "_fields") and not attributes:
            return {"__namedtuple__": [self.classes.name(cls), self.all(value)]}
        for base, exact in BASES.items():
            if isinstance(value, base) and not attributes:
                return {"__subclass__": [self.classes.name(cls), base.__name__, exact(value)]}
        raise TypeError(f"{cls.__name__} cannot go into a checkpoint.")

    def all(self, values: Iterable[Any]) -> list[Any]:
        return [self(value) for value in values]

    def pairs(self, value: dict[Any, Any]) -> list[list[Any]]:
        return [[self(k), self(v)] for k, v in value.items()]


class Reader:
    """Makes again what a ``Writer`` wrote."""

    def __init__(self, classes: Classes, factory: Factory) -> None:
        self.classes, self.factory = classes, factory
        self._done: dict[int, Any] = {}

    def __call__(self, plain: Any) -> Any:
        if not isinstance(plain, (list, dict)):
            return plain
        if id(plain) not in self._done:
            self._done[id(plain)] = self._read(plain)
        return self._done[id(plain)]

    def _read(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return self.all(plain)
        (tag, inner), *_ = plain.items()
        if tag not in READ:
            raise TypeError(f"{tag!r} is no kind of value that a checkpoint holds.")
        return READ[tag](inner, self)

    def all(self, plain: Iterable[Any]) -> list[Any]:
        return [self(item) for item in plain]

    def pairs(self, plain: Iterable[Any]) -> list[tuple[Any, Any]]:
        return [(self(k), self(v)) for k, v in plain]

"""Tensors, arrays and random generators: what they contain, noted at a price that fits their size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fed._compat.torch import OF_DYNAMO, gradient_hooks, is_wrapped
from lightning_fed.state.access import ContentAccess, memory_of
from lightning_fed.state.generators import GeneratorKind, generator_kind
from lightning_fed.state.nodes import Node, Step, same


@dataclass
class Limits:
    """How much is copied.

    Attributes:
        always: Up to so many bytes a tensor or array is copied each time, and whatever was written to it is undone.
        once: Up to so many bytes it is copied once, and again only where it was seen to change.
        total: The bytes of all such copies; what is beyond is watched and not copied.
        samples: Whether to look at some elements of what is not copied each time: torch counts most writes to a tensor,
            but not those to its ``.data``.
        flags: Whether to look after hooks and attributes of tensors, too.
        elements: Longer lists, dicts, ... are looked at as a whole, not element by element.
    """

    always: int = 1 << 20
    once: int = 64 << 20
    total: int = 256 << 20
    samples: bool = True
    flags: bool = True
    elements: int = 10_000


class Content(Node):
    """A tensor or an array: small ones are copied each time, larger ones when they change, huge ones watched.

    Attributes:
        copy: A copy of what it contained, or ``None``.
    """

    __slots__ = ("_limits", "_mark", "_reader", "copy")

    def __init__(self, thing: Any, parent: Node | None, step: Step, reader: ContentAccess, limits: Limits) -> None:
        super().__init__(thing, parent, step)
        self._reader, self._limits, self.copy = reader, limits, None
        self._mark: tuple[Any, ...] | None = None  # of what is small there is none

    def save(self) -> None:
        if self._mark is not None and not self.differs():
            return
        size, limits = memory_of(self.thing), self._limits
        if size <= limits.always:
            self.copy = self._reader.copy(self.thing)
            return
        if self.copy is not None or size <= min(limits.once, limits.total):
            limits.total -= 0 if self.copy is not None else size
            self.copy = self._reader.copy(self.thing)
        self._mark = self._reader.mark(self.thing, limits.samples)

    def differs(self) -> bool:
        if self._mark is None:
            return not self._reader.equal(self.thing, self.copy)
        return not alike(self._mark, self._reader.mark(self.thing, self._limits.samples))

    def read(self) -> Any:
        """Return a copy of what it contains now."""
        return self._reader.copy(self.thing)

    @property
    def is_lost(self) -> bool:
        """Whether it was written to and there is no copy to restore."""
        return self.copy is None and self.differs()

    def restore(self) -> None:
        if self.copy is not None and self.differs():
            self._reader.put(self.thing, self.copy)
            if self._mark is not None:
                self._mark = self._reader.mark(self.thing, self._limits.samples)


class TensorFlags(Node):
    """All of a tensor but its content: its memory, whether it is trained, hooks and attributes.

    Args:
        is_weight: Whether it is a weight, whose gradient comes and goes.
    """

    __slots__ = ("_data", "_gradient", "_has_gradient", "_hooks", "_pointer")

    def __init__(self, thing: Any, parent: Node | None, step: Step, is_weight: bool) -> None:
        super().__init__(thing, parent, step)
        self._has_gradient = thing.is_leaf and not is_weight

    def save(self) -> None:
        if self.saved is not None and not self.differs():
            return
        tensor: Tensor = self.thing
        self._pointer = _pointer(tensor)
        self._data = tensor.detach()
        self._gradient = tensor.grad if self._has_gradient else None
        self._hooks = [dict(hooks or ()) for hooks in _hooks(tensor)]
        self.saved = self.flags()

    def differs(self) -> bool:
        return self.is_changed() or (self._has_gradient and self.thing.grad is not self._gradient)

    def is_changed(self) -> bool:
        """Return whether something else than its gradient differs."""
        tensor: Tensor = self.thing
        requires_grad, attributes = self.saved
        return (
            tensor.requires_grad != requires_grad
            or _pointer(tensor) != self._pointer
            or bool((tensor.__dict__ or attributes) and not same(_attributes(tensor), attributes))
            or self.has_other_hooks()
        )

    def has_other_hooks(self) -> bool:
        """Return whether hooks were registered or removed."""
        on_gradients, accumulated = now = _hooks(self.thing)
        if not (on_gradients or accumulated):
            return any(self._hooks)
        return any(not same(hooks or {}, saved) for hooks, saved in zip(now, self._hooks, strict=True))

    def flags(self) -> tuple[bool, dict[str, Any]]:
        """Return whether it is trained, and its attributes, as they are now."""
        return self.thing.requires_grad, dict(_attributes(self.thing))

    def restore(self) -> None:
        if not self.differs():
            return
        tensor: Tensor = self.thing
        if _pointer(tensor) != self._pointer:
            tensor.data = self._data
        set_flags(tensor, *self.saved)
        if self._has_gradient:
            tensor.grad = self._gradient
        for hooks, saved in zip(_hooks(tensor), self._hooks, strict=True):
            if hooks is not None:  # in place: autograd holds this very dict
                hooks.clear()
                hooks.update(saved)


def set_flags(tensor: Tensor, requires_grad: bool, attributes: dict[str, Any]) -> None:
    """Give a tensor what ``TensorFlags.flags`` read."""
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    for name in _attributes(tensor).keys() - attributes.keys():
        del tensor.__dict__[name]
    tensor.__dict__.update(attributes)


def _attributes(tensor: Tensor) -> dict[str, Any]:
    held = tensor.__dict__
    return {name: value for name, value in held.items() if not name.startswith(OF_DYNAMO)} if held else held


def _hooks(tensor: Tensor) -> tuple[Any, Any]:
    return gradient_hooks(tensor)


def _pointer(tensor: Tensor) -> Any:
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.layout is torch.strided else None


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has content that can be copied and restored."""
    wrapped = is_wrapped(tensor)
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized or wrapped)


class Generator(Node):
    """A generator of random numbers."""

    __slots__ = ("kind",)

    def __init__(self, thing: Any, parent: Node | None, step: Step) -> None:
        super().__init__(thing, parent, step)
        kind = generator_kind(type(thing))
        assert kind is not None
        self.kind: GeneratorKind = kind

    def save(self) -> None:
        self.saved = self.kind.state(self.thing)

    def differs(self) -> bool:
        return not alike(self.kind.state(self.thing), self.saved)

    def restore(self) -> None:
        self.kind.load(self.thing, self.saved)


def alike(one: Any, other: Any) -> bool:
    """Return whether two states of generators, or two marks, are the same."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        if one.dtype.kind in "biu" and one.dtype == other.dtype and one.shape == other.shape:
            return one.tobytes() == other.tobytes()  # at a tenth of the price: they are integers
        return np.array_equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)

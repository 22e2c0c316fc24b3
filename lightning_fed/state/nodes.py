"""Things that may change: each remembers what it held, tells whether that is so still, and restores it."""

from __future__ import annotations

import re
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import is_, is_not
from typing import Any

Step = tuple[str, Any]
Child = tuple[Step, Any]


class Node:
    """Something that may change.

    Attributes:
        thing: The object itself.
        parent: The node that it was reached from; ``None`` for a root.
        step: How it was reached from there: a kind of step and a key.
        saved: What it held.
    """

    __slots__ = ("parent", "saved", "step", "thing")

    def __init__(self, thing: Any, parent: Node | None, step: Step) -> None:
        self.thing, self.parent, self.step = thing, parent, step
        self.saved: Any = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The way from a root."""
        return (*(() if self.parent is None else self.parent.steps), self.step)

    @property
    def path(self) -> str:
        """The way from a root, as one would write it."""
        written = "".join(_written(*step) for step in self.steps).lstrip(".")
        return re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", written)

    def children(self) -> Iterable[Child]:
        """Return what is reached from here, each with its step."""
        return ()

    def save(self) -> None:
        """Take note of what it holds now."""

    def differs(self) -> bool:
        """Return whether it holds something else than what was saved."""
        return False

    def restore(self) -> None:
        """Put back what was saved."""


def _written(kind: str, key: Any) -> str:
    return {"root": str(key), "attribute": f".{key}", "item": f"[{key!r}]"}.get(kind, f".<{kind} {key}>")


@dataclass(frozen=True, slots=True)
class Kind:
    """How containers of one kind are handled.

    Attributes:
        look: What a container holds, as a mapping or a sequence; not a copy if that can be helped.
        write: Makes a container hold what ``copy`` gave.
        step: The kind of step to what it holds.
        copy: Makes something that stays of what ``look`` gave.
    """

    look: Callable[[Any], Any]
    write: Callable[[Any, Any], None]
    step: str
    copy: Callable[[Any], Any] = dict


class Container(Node):
    """Something that holds other things: attributes, a dict, a list, a closure, ..."""

    __slots__ = ("kind",)

    def __init__(self, thing: Any, parent: Node | None, step: Step, kind: Kind) -> None:
        self.thing, self.parent, self.step, self.kind = thing, parent, step, kind  # often called: no call more
        self.saved: Any = None

    def children(self) -> Iterable[Child]:
        held, step = self.kind.look(self.thing), self.kind.step
        found = [((step, key), value) for key, value in (held.items() if isinstance(held, dict) else enumerate(held))]
        if self.kind is CLASS:  # what its functions lead to is another matter
            return [child for child in found if not isinstance(child[1], types.FunctionType)]
        return found

    def is_empty(self) -> bool:
        """Return whether it is a container in which nothing is."""
        return self.kind in (DICT, SEQUENCE, SET) and not self.thing

    def save(self) -> None:
        self.saved = self.kind.copy(self.kind.look(self.thing))

    def differs(self) -> bool:
        if self.kind is not ATTRIBUTES:
            return not same(self.kind.look(self.thing), self.saved)
        held, saved = self.thing.__dict__, self.saved  # most of them, asked twice a client: no call more
        return (
            len(held) != len(saved)
            or not all(map(is_, held.values(), saved.values()))
            or not all(map(is_, held, saved))
        )

    def restore(self) -> None:
        self.kind.write(self.thing, self.saved)

    @property
    def is_enclosed(self) -> bool:
        """Whether it was reached through a closure: then it belongs to the code around, which may collect in it."""
        return any(kind == "content" for kind, _ in self.steps)

    def has_only_grown(self) -> bool:
        """Return whether it is a container that holds all that it held, and more."""
        held = self.kind.look(self.thing)
        if self.kind is DICT:
            return all(key in held and held[key] is value for key, value in self.saved.items())
        if self.kind is SET:
            return bool(held >= self.saved)
        return self.kind is SEQUENCE and len(held) >= len(self.saved) and all(map(is_, held, self.saved))

    def changes(self) -> tuple[dict[Any, Any], list[Any]]:
        """Return what is in a mapping now and was not, or was another, and the keys of what is no longer there."""
        held, saved = self.kind.look(self.thing), self.saved
        new = {key: value for key, value in held.items() if key not in saved or saved[key] is not value}
        return new, [key for key in saved if key not in held]


def same(held: Any, saved: Any) -> bool:
    """Return whether two containers hold the very same things in the same order."""
    if len(held) != len(saved):
        return False
    if isinstance(held, dict):
        return all(map(is_, held, saved)) and all(map(is_, held.values(), saved.values()))  # in the same order, too
    if isinstance(held, (set, frozenset)):
        return bool(held == saved)
    return not any(map(is_not, held, saved))


def _write_attributes(thing: Any, saved: dict[str, Any]) -> None:
    held = thing.__dict__
    held.clear()
    held.update(saved)


def _write_dict(thing: Any, saved: dict[Any, Any]) -> None:
    base = OrderedDict if isinstance(thing, OrderedDict) else dict  # past what a subclass does at a change
    base.clear(thing)
    base.update(thing, saved)


def _write_sequence(thing: Any, saved: Any) -> None:
    base: Any = deque if isinstance(thing, deque) else list
    base.clear(thing)
    base.extend(thing, saved)


def _write_set(thing: set[Any], saved: Any) -> None:
    set.clear(thing)
    set.update(thing, saved)


def _slots(thing: Any) -> dict[str, Any]:
    names: list[str] = []
    for cls in type(thing).__mro__:
        own = cls.__dict__.get("__slots__", ())
        names += [own] if isinstance(own, str) else own
    names = [name for name in names if name not in ("__dict__", "__weakref__")]
    return {name: getattr(thing, name) for name in names if hasattr(thing, name)}


def _write_slots(thing: Any, saved: dict[str, Any]) -> None:
    for name in _slots(thing).keys() - saved.keys():
        object.__delattr__(thing, name)
    for name, value in saved.items():
        object.__setattr__(thing, name, value)


def _cell(thing: types.CellType) -> tuple[Any, ...]:
    try:
        return (thing.cell_contents,)
    except ValueError:  # not assigned yet
        return ()


def _write_cell(thing: types.CellType, saved: tuple[Any, ...]) -> None:
    if saved:
        thing.cell_contents = saved[0]
    else:
        del thing.cell_contents


def _class_data(thing: type) -> dict[str, Any]:
    """Return what a class holds for all its instances, and its methods as they are."""
    return {
        name: value
        for name, value in vars(thing).items()
        if not name.startswith(("__", "_abc_"))
        and (isinstance(value, types.FunctionType) or not hasattr(type(value), "__get__"))
        and not isinstance(value, type)
    }


def _write_class(thing: type, saved: dict[str, Any]) -> None:
    now = _class_data(thing)
    for name in now.keys() - saved.keys():
        delattr(thing, name)
    for name, value in saved.items():
        if name not in now or now[name] is not value:
            setattr(thing, name, value)


def _itself(thing: Any) -> Any:
    return thing


ATTRIBUTES = Kind(vars, _write_attributes, "attribute")
SLOTS = Kind(_slots, _write_slots, "attribute", _itself)
CLASS = Kind(_class_data, _write_class, "attribute", _itself)
DICT = Kind(_itself, _write_dict, "item")
SEQUENCE = Kind(_itself, _write_sequence, "item", tuple)
SET = Kind(_itself, _write_set, "element", frozenset)
CELL = Kind(_cell, _write_cell, "content", _itself)

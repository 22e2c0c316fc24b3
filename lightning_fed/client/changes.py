"""What the server changes between rounds, for the workers that have copies of module, options and callbacks.

A copy is found by its way from the roots, which is the same on both sides. What is sent of a container is what is new
in it; what it holds that the other side has, too, is sent as the way there.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from lightning_fed._compat.lightning import SET_ON_CALLBACKS, SET_ON_MODULES
from lightning_fed._compat.torchmetrics import SET_ON_METRICS
from lightning_fed.errors import ConfigurationError
from lightning_fed.state import nodes
from lightning_fed.state.access import write
from lightning_fed.state.content import Content, Generator, TensorFlags, set_flags
from lightning_fed.state.nodes import Container, Node, Step
from lightning_fed.state.snapshot import DataSnapshot, Snapshot
from lightning_fed.views import user_class

# What Lightning and torchmetrics set at the server, which means nothing to a client.
_SERVERS = SET_ON_MODULES | SET_ON_CALLBACKS | SET_ON_METRICS | {"_lightning_fed_hidden", "_here"}
_OPTIONS = frozenset({"isolation"})  # each process has one
_SETTINGS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_KINDS = {
    "attributes": nodes.ATTRIBUTES,
    "slots": nodes.SLOTS,
    "class": nodes.CLASS,
    "dict": nodes.DICT,
    "sequence": nodes.SEQUENCE,
    "set": nodes.SET,
    "cell": nodes.CELL,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
# One thing that has changed: the way to it, what kind of thing it is, and what it holds now.
_Change = tuple[tuple[Step, ...], str, Any]


class Changes:
    """Looks, each time that it is asked, for what has changed since it was asked last.

    Args:
        snapshot: What clients work with, but for their data.
        data: Their data.
    """

    def __init__(self, snapshot: Snapshot, data: DataSnapshot) -> None:
        self._snapshots: list[Snapshot] = [snapshot, data]

    def take(self) -> bytes | None:
        """Return what has changed, to be given to ``apply`` wherever there is a copy; ``None`` where nothing has.

        Raises:
            ConfigurationError: If what was put there cannot be sent.
        """
        changed = [change for snapshot in self._snapshots for change in _changes(snapshot)]
        if not changed:
            return None
        known = {id(node.thing): node for snapshot in self._snapshots for node in snapshot.nodes()}
        try:
            stream = io.BytesIO()
            _Pickler(stream, known).dump(changed)
        except Exception as error:
            names = ", ".join(sorted({_path(steps) for steps, _, _ in changed}))
            raise ConfigurationError(
                f"{names} changed between two rounds, and what is there now cannot be sent to the processes in which"
                f" clients train: {type(error).__name__}: {error}. Change it in a hook of the local fit, or write"
                " engine='in_process'."
            ) from error
        for snapshot in self._snapshots:
            snapshot.renew()
        return stream.getvalue()


def apply(changes: bytes, roots: Mapping[str, Any]) -> None:
    """Make the same changes to copies of the roots."""
    found: list[_Change] = _Unpickler(io.BytesIO(changes), roots).load()
    for thing, kind, now in [(_follow(roots, steps), kind, now) for steps, kind, now in found]:
        if kind == "flags":
            set_flags(thing, *now)
        elif kind == "content":
            write(thing, now)
        else:
            _write(thing, _KINDS[kind], now)


def _write(thing: Any, kind: nodes.Kind, now: Any) -> None:
    held = kind.look(thing)
    if isinstance(held, dict):
        new, gone, order = now
        now = {key: value for key, value in held.items() if key not in gone} | new
        if order is not None:
            now = {key: now[key] for key in order if key in now}
    kind.write(thing, now)


def _changes(snapshot: Snapshot) -> list[_Change]:
    found: list[_Change] = []
    is_data = isinstance(snapshot, DataSnapshot)
    for node in snapshot.changed():
        if any(kind.startswith("function ") for kind, _ in node.steps):
            continue  # what stands in the signature of a method is nobody's setting
        if (change := _change(node, is_data)) is not None:
            found.append((node.steps, *change))
    return found


def _change(node: Node, is_data: bool) -> tuple[str, Any] | None:
    """Return what kind of thing a node is, and what is there now; ``None`` where that is nothing to a client."""
    if isinstance(node, Generator):
        return None  # seeded for each client
    if isinstance(node, TensorFlags):
        if node.has_other_hooks():
            raise ConfigurationError(
                f"A hook on {node.path} was registered or removed between two rounds, which the processes in which"
                " clients train cannot be told: register it in `on_train_start` of a client callback, or write"
                " engine='in_process'."
            )
        return "flags", node.flags()
    if isinstance(node, Content):
        return "content", node.read()
    assert isinstance(node, Container)
    held = node.kind.look(node.thing)
    if not isinstance(held, dict):
        return _NAMES[node.kind], node.kind.copy(held)
    new, gone = node.changes()
    if is_data and node.kind is nodes.DICT:  # what the server has read, and keeps, is no setting
        new = {key: value for key, value in new.items() if key in node.saved or isinstance(value, _SETTINGS)}
    servers = _SERVERS if node.kind is nodes.ATTRIBUTES else _OPTIONS if node.parent is None else ()
    new = {key: value for key, value in new.items() if not (key in servers or _is_same(value, node.saved.get(key)))}
    gone = [key for key in gone if key not in servers]
    order = list(held) if node.kind is nodes.DICT and not _is_in_order(held, node.saved) else None
    return (_NAMES[node.kind], (new, gone, order)) if new or gone or order else None


def _is_in_order(held: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    """Return whether a dict is in the order that the other side's has, with what is new at its end."""
    known = [key for key in held if key in before]
    return known == [key for key in before if key in held] and list(held)[: len(known)] == known


def _is_same(now: Any, before: Any) -> bool:
    if type(now) is not type(before):
        return False
    if isinstance(now, Tensor):
        is_small = now.numel() <= 1024 and now.dtype == before.dtype and now.device == before.device
        return is_small and torch.equal(now, before) and now.requires_grad == before.requires_grad
    return isinstance(now, _SETTINGS) and bool(now == before)


def _path(steps: tuple[Step, ...]) -> str:
    node: Node | None = None
    for step in steps:
        node = Node(None, node, step)
    return "" if node is None else node.path


def _follow(roots: Mapping[str, Any], steps: tuple[Step, ...]) -> Any:
    thing: Any = None
    for kind, key in steps:
        if kind == "root":
            thing = roots[key]
        elif kind == "item":
            thing = thing[key]
        elif kind == "closure":
            thing = thing.__closure__[key]
        elif kind == "content":
            thing = thing.cell_contents
        elif kind == "component":
            thing = getattr(thing, key)()
        elif kind == "class":
            thing = user_class(thing).__mro__[key]
        else:
            held = getattr(thing, "__dict__", {})
            thing = held[key] if key in held else getattr(thing, key)
    return thing


class _Pickler(cloudpickle.Pickler):
    def __init__(self, stream: io.BytesIO, known: Mapping[int, Node]) -> None:
        super().__init__(stream, protocol=5)
        self._known = known

    def persistent_id(self, thing: Any) -> Any:
        node = self._known.get(id(thing))
        return None if node is None else node.steps


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, roots: Mapping[str, Any]) -> None:
        super().__init__(stream)
        self._roots = roots

    def persistent_load(self, steps: Any) -> Any:
        return _follow(self._roots, steps)

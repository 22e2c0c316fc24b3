"""A bounded walk from some objects to all that may change: attributes, containers, closures, tensors, generators."""

from __future__ import annotations

import functools
import random
import types
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from contextlib import ContextDecorator
from enum import Enum
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from lightning_fed._compat.lightning import TO_TRAINER
from lightning_fed._compat.torch import LOADERS_WORKERS
from lightning_fed.caching import cached
from lightning_fed.state import nodes
from lightning_fed.state.access import ARRAY, BYTES, SPARSE, TENSOR
from lightning_fed.state.code import of_class, of_function
from lightning_fed.state.content import Content, Generator, Limits, TensorFlags, is_plain
from lightning_fed.state.generators import generator_kind, is_global
from lightning_fed.state.nodes import Child, Container, Kind, Node, Step
from lightning_fed.state.packages import is_library, is_machinery
from lightning_fed.values.part import Part, TransformedPart
from lightning_fed.views import below

# Whoever holds so many objects holds a data set or a cache: the walk stops there.
MOST_NODES = 20_000
MOST_ELEMENTS = 1024  # of a tuple

_ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type(...), slice, range, types.ModuleType, torch.Size, Trainer}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format, types.BuiltinFunctionType, frozenset}
    | {random.SystemRandom}
)
# Attributes that lead back to the trainer, or to what a view hides.
_NOT_FOLLOWED = TO_TRAINER | {LOADERS_WORKERS}


class Passage(Node):
    """What cannot change itself and leads to things that may: a tuple, a function, a loader."""

    __slots__ = ("_children",)

    def __init__(self, thing: Any, parent: Node | None, step: Step, children: list[Child]) -> None:
        super().__init__(thing, parent, step)
        self._children = children

    def children(self) -> Iterable[Child]:
        return self._children


class Walk:
    """All that is reached from some objects, in the order in which it is found.

    Args:
        roots: Where to begin, by name.
        weights: The ids of the tensors whose content others look after.
        limits: How much of tensors and arrays is copied.

    Attributes:
        containers: Attributes, dicts, lists, ... in which something is.
        empty: Containers in which nothing is.
        contents: Tensors, arrays and generators.
        endless: Iterators, of which nobody can restore what was taken.
        unseen: What holds things that are not looked at.
    """

    def __init__(self, roots: Mapping[str, Any], weights: frozenset[int], limits: Limits) -> None:
        self.containers: list[Container] = []
        self.empty: list[Container] = []
        self.unseen: list[Node] = []
        self.contents: list[Node] = []
        self.endless: list[Node] = []
        self._weights, self._limits = weights, limits
        self._seen: dict[int, Any] = {}  # which also keeps them alive, so that no id comes twice
        self._todo: deque[tuple[Any, Node | None, Step]] = deque((root, None, ("root", n)) for n, root in roots.items())
        while self._todo and len(self.containers) < MOST_NODES:
            self._visit(*self._todo.popleft())
        if self._todo:
            self.unseen.append(Node(*self._todo[0]))

    def _visit(self, thing: Any, parent: Node | None, step: Step) -> None:
        if id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        kind = _BUILTIN.get(type(thing))
        if kind is not None and not thing:  # most of what a module holds
            self.empty.append(Container(thing, parent, step, kind))
            return
        if type(thing) is TensorDataset and len(thing.__dict__) == 1:  # most of what clients train on
            self._visit_tensors(thing, Container(thing, parent, step, nodes.ATTRIBUTES))
            return
        for node in self._nodes(thing, parent, step):
            if isinstance(node, Container):
                if node.is_empty():
                    self.empty.append(node)
                    continue
                self.containers.append(node)
            elif not isinstance(node, Passage):
                self.contents.append(node)
                continue
            if isinstance(node, Container) and self._is_closed(node):
                continue
            for child_step, child in node.children():
                if type(child) not in _ATOMS and child_step[1] not in _NOT_FOLLOWED and id(child) not in self._seen:
                    self._todo.append((child, node, child_step))

    def _visit_tensors(self, data: TensorDataset, node: Container) -> None:
        self.containers.append(node)
        tensors = Node(data.tensors, node, ("attribute", "tensors"))
        for i, tensor in enumerate(data.tensors):
            if id(tensor) not in self._seen:
                self._seen[id(tensor)] = tensor
                self.contents += self._of_tensor(tensor, tensors, ("item", i))

    def _is_closed(self, node: Container) -> bool:
        """Return whether it is not looked into: a set, whose elements have no path, or what is long as a data set."""
        held = node.kind.look(node.thing)
        if node.kind is not nodes.SET and (node.kind is nodes.ATTRIBUTES or len(held) <= self._limits.elements):
            return False
        some = islice(held.values() if isinstance(held, dict) else held, 8)
        if any(_sort(type(one))[0] not in ("", "class", "function") for one in some):
            self.unseen.append(node)
        return True

    def _nodes(self, thing: Any, parent: Node | None, step: Step) -> list[Node]:
        sort, kinds, classes = _sort(type(thing))
        if sort == "object":
            passage = [Passage(thing, parent, step, classes)] if classes else []
            return [*(Container(thing, parent, step, kind) for kind in kinds), *passage]
        if sort == "tensor":
            return self._of_tensor(thing, parent, step)
        if sort == "array":
            return self._of_array(thing, parent, step, kinds)
        if sort == "bytes":
            return [Content(thing, parent, step, BYTES, self._limits)]
        if sort == "generator":
            return [] if is_global(thing) else [Generator(thing, parent, step)]
        if sort == "class":
            if is_library(thing.__module__) or issubclass(thing, Enum):
                return []
            return [Container(thing, parent, step, nodes.CLASS), Passage(thing, parent, step, of_class(thing))]
        # That of a `@contextmanager` which decorates a function is never begun: each call makes its own.
        if sort == "endless" and not (parent and isinstance(parent.thing, ContextDecorator)):
            self.endless.append(Node(thing, parent, step))
        if sort == "unseen":
            self.unseen.append(Node(thing, parent, step))
        if sort == "function":
            return self._of_function(thing, parent, step)
        return [Passage(thing, parent, step, _passed(thing))] if sort == "passage" else []

    def _of_function(self, function: types.FunctionType, parent: Node | None, step: Step) -> list[Node]:
        if is_library(function.__module__):
            return []
        own = [Container(function, parent, step, nodes.ATTRIBUTES)]
        if not function.__dict__:  # an attribute may be the first that it gets
            own = [Container(function.__dict__, Node(function, parent, step), ("attribute", "__dict__"), nodes.DICT)]
        return [*own, Passage(function, parent, step, of_function(function))]

    def _of_array(self, values: Any, parent: Node | None, step: Step, kinds: list[Kind]) -> list[Node]:
        found: list[Node] = [Container(values, parent, step, kind) for kind in kinds]
        if values.flags.writeable:
            found.append(Content(values, parent, step, ARRAY, self._limits))
        if values.dtype == object and values.size <= self._limits.elements:
            found.append(Passage(values, parent, step, [(("item", i), one) for i, one in np.ndenumerate(values)]))
        return found

    def _of_tensor(self, tensor: Tensor, parent: Node | None, step: Step) -> list[Node]:
        is_weight = id(tensor) in self._weights
        found: list[Node] = [TensorFlags(tensor, parent, step, is_weight)] if self._limits.flags else []
        if not is_weight:
            if is_plain(tensor):
                found.append(Content(tensor, parent, step, TENSOR, self._limits))
            elif tensor.layout is torch.sparse_coo:
                found.append(Content(tensor, parent, step, SPARSE, self._limits))
            elif values := _VALUES.get(tensor.layout):
                found.append(Passage(tensor, parent, step, [(("component", values), getattr(tensor, values)())]))
        return found


# Other sparse tensors -> what gives the tensor of their values.
_VALUES = {torch.sparse_csr: "values", torch.sparse_csc: "values"}
_BUILTIN: dict[type, Kind] = {
    dict: nodes.DICT,
    OrderedDict: nodes.DICT,
    list: nodes.SEQUENCE,
    deque: nodes.SEQUENCE,
    set: nodes.SET,
}


@cached(4096)
def _sort(cls: type) -> tuple[str, list[Kind], list[Child]]:
    """Return how objects of a class are looked at; for those that hold things, as which containers, and its classes."""
    if issubclass(cls, Tensor):
        return "tensor", [], []
    if issubclass(cls, np.ndarray):
        return ("", [], []) if issubclass(cls, np.memmap) else ("array", _containers(cls), [])
    if issubclass(cls, (bytearray, array)):
        return "bytes", [], []
    if generator_kind(cls) is not None:
        return "generator", [], []
    if issubclass(cls, type):
        return "class", [], []
    if issubclass(cls, types.FunctionType):
        return "function", [], []
    if issubclass(cls, tuple) or cls in _PASSED:
        return "passage", [], []
    if cls.__module__.partition(".")[0] == "pandas" or issubclass(cls, (WeakKeyDictionary, WeakValueDictionary)):
        return "unseen", [], []
    if issubclass(cls, (*_ATOMS, Enum)) or is_machinery(cls):
        return "", [], []
    if hasattr(cls, "__next__"):
        return "endless", [], []
    return "object", _containers(cls), _own_classes(cls)


def _containers(cls: type) -> list[Kind]:
    builtin: dict[Kind, Any] = {
        nodes.DICT: dict,
        nodes.SEQUENCE: (list, deque),
        nodes.SET: set,
        nodes.CELL: types.CellType,
    }
    kinds = [kind for kind, base in builtin.items() if issubclass(cls, base)]
    if cls.__dictoffset__ and not (cls.__module__ in ("builtins", "collections") and issubclass(cls, (dict, deque))):
        kinds.append(nodes.ATTRIBUTES)
    if any(one.__dict__.get("__slots__") for one in cls.__mro__ if not is_library(one.__module__)):
        kinds.append(nodes.SLOTS)
    return kinds


def _own_classes(cls: type) -> list[Child]:
    """Return the classes of an object that are no library's."""
    mro = below(cls).__mro__
    return [(("class", i), one) for i, one in enumerate(mro) if not is_library(one.__module__)]


# Objects that hold nothing else that could change.
_PASSED: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__self__", "__func__"),
    functools.partial: ("func", "args", "keywords"),
    DataLoader: ("dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn", "generator"),
    Subset: ("dataset",),
    Part: ("dataset",),
    TransformedPart: ("dataset", "transform"),
    RandomSampler: ("generator",),
    SequentialSampler: (),
    BatchSampler: ("sampler",),
}


def _passed(thing: Any) -> list[Child]:
    """Return where a thing leads to that cannot change itself."""
    if isinstance(thing, tuple):
        return [] if len(thing) > MOST_ELEMENTS else [(("item", i), value) for i, value in enumerate(thing)]
    if type(thing) is DataLoader and _is_usual(thing):
        return [(("attribute", "dataset"), thing.dataset)]
    names = next(names for base, names in _PASSED.items() if type(thing) is base)
    return [(("attribute", name), getattr(thing, name)) for name in names]


def _is_usual(loader: DataLoader[Any]) -> bool:
    """Return whether a loader holds nothing of interest but its data set."""
    sampler: Any = loader.sampler
    return (
        loader.collate_fn is default_collate
        and loader.worker_init_fn is None
        and loader.generator is None
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_sampler.sampler is sampler
        and (type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and sampler.generator is None))
    )

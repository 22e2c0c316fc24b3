"""A bounded walk from some objects to all that may change: attributes, containers, closures, tensors, generators."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, default_collate

from lightning_fed.part import Part
from lightning_fed.state import nodes
from lightning_fed.state.content import ARRAY, TENSOR, Content, Generator, Limits, TensorFlags, is_plain
from lightning_fed.state.generators import generator_kind, is_global
from lightning_fed.state.nodes import Child, Container, Kind, Node, Step

# Whoever holds so many objects holds a data set or a cache: the walk stops there.
MOST_NODES = 20_000

_ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type(...), slice, range, types.ModuleType, torch.Size, Trainer}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format, types.BuiltinFunctionType, frozenset}
    | {random.SystemRandom}
)
# Attributes that lead back to the trainer, or to what a view hides.
_NOT_FOLLOWED = frozenset({"_trainer", "trainer", "_fabric", "_iterator"})
# Packages whose objects are machinery: no step's numbers are kept in them where they could be put back.
_MACHINERY = frozenset(
    {
        "flwr",
        "grpc",
        "ray",
        "logging",
        "threading",
        "_thread",
        "multiprocessing",
        "concurrent",
        "asyncio",
        "socket",
        "io",
    }
    | {"_io", "pathlib", "re", "datetime", "weakref", "inspect", "importlib", "typing", "abc", "ctypes", "queue"}
    | {"pyarrow", "pandas", "matplotlib", "rich", "tqdm", "wandb", "mlflow", "tensorboard", "triton", "sympy", "fsspec"}
)
_MACHINERY_WITHIN = (
    *("torch._", "torch.fx", "torch.distributed", "torch.jit", "torch.utils.tensorboard", "lightning.fabric"),
    *("lightning.pytorch.trainer", "lightning.pytorch.loggers", "lightning.pytorch.loops"),
    *("lightning.pytorch.strategies", "lightning.pytorch.profilers", "lightning.pytorch.accelerators"),
    *("lightning_fed.client", "lightning_fed.state", "lightning_fed.engines"),
)
# Packages whose classes and functions hold nothing that a client changes.
_LIBRARIES = frozenset({"torch", "torchvision", "torchmetrics", "lightning", "lightning_fed", "numpy"})


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
        weights: The ids of the tensors whose content is somebody else's matter.
        limits: How much of tensors and arrays is copied.

    Attributes:
        containers: Attributes, dicts, lists, ... in which something is.
        empty: Containers in which nothing is.
        contents: Tensors, arrays and generators.
        endless: Iterators, of which nobody can put back what was taken.
    """

    def __init__(self, roots: Mapping[str, Any], weights: frozenset[int], limits: Limits) -> None:
        self.containers: list[Container] = []
        self.empty: list[Container] = []
        self.contents: list[Node] = []
        self.endless: list[Node] = []
        self._weights, self._limits = weights, limits
        self._seen: dict[int, Any] = {}  # which also keeps them alive, so that no id comes twice
        self._todo: deque[tuple[Any, Node | None, Step]] = deque((root, None, ("root", n)) for n, root in roots.items())
        while self._todo and len(self.containers) < MOST_NODES:
            self._visit(*self._todo.popleft())

    def _visit(self, thing: Any, parent: Node | None, step: Step) -> None:
        if id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        kind = _BUILTIN.get(type(thing))  # type: ignore[arg-type]
        if kind is not None and not thing:  # most of what a module holds
            self.empty.append(Container(thing, parent, step, kind))
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
            for child_step, child in node.children():
                if type(child) not in _ATOMS and child_step[1] not in _NOT_FOLLOWED and id(child) not in self._seen:
                    self._todo.append((child, node, child_step))

    def _nodes(self, thing: Any, parent: Node | None, step: Step) -> list[Node]:
        sort, kinds, classes = _sort(type(thing))  # type: ignore[arg-type]
        if sort == "object":
            passage = [Passage(thing, parent, step, classes)] if classes else []
            return [*(Container(thing, parent, step, kind) for kind in kinds), *passage]
        if sort == "tensor":
            return self._of_tensor(thing, parent, step)
        if sort == "array":
            return [Content(thing, parent, step, ARRAY, self._limits)] if thing.flags.writeable else []
        if sort == "generator":
            return [] if is_global(thing) else [Generator(thing, parent, step)]
        if sort == "class":
            if _is_library(thing.__module__) or issubclass(thing, Enum):
                return []
            return [Container(thing, parent, step, nodes.CLASS), Passage(thing, parent, step, _drawn_by(thing))]
        if sort == "endless":
            self.endless.append(Node(thing, parent, step))
        return [Passage(thing, parent, step, _passed(thing))] if sort == "passage" else []

    def _of_tensor(self, tensor: Tensor, parent: Node | None, step: Step) -> list[Node]:
        found: list[Node] = [TensorFlags(tensor, parent, step)] if self._limits.flags else []
        if id(tensor) not in self._weights and is_plain(tensor):
            found.append(Content(tensor, parent, step, TENSOR, self._limits))
        return found


_BUILTIN: dict[type, Kind] = {
    dict: nodes.DICT,
    OrderedDict: nodes.DICT,
    list: nodes.SEQUENCE,
    deque: nodes.SEQUENCE,
    set: nodes.SET,
}


@lru_cache(maxsize=4096)
def _sort(cls: type) -> tuple[str, list[Kind], list[Child]]:
    """How objects of a class are looked at; for those that hold things, as which containers, and its classes."""
    if issubclass(cls, Tensor):
        return "tensor", [], []
    if issubclass(cls, np.ndarray):
        return "array" if cls is np.ndarray else "", [], []
    if generator_kind(cls) is not None:  # type: ignore[arg-type]
        return "generator", [], []
    if issubclass(cls, type):
        return "class", [], []
    if issubclass(cls, (tuple, types.FunctionType)) or cls in _PASSED:
        return "passage", [], []
    if issubclass(cls, (*_ATOMS, Enum)) or _is_machinery(cls):
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
    if cls.__dictoffset__ and cls.__module__ not in ("builtins", "collections"):
        kinds.append(nodes.ATTRIBUTES)
    if any(one.__dict__.get("__slots__") for one in cls.__mro__ if not _is_library(one.__module__)):
        kinds.append(nodes.SLOTS)
    return kinds


def _own_classes(cls: type) -> list[Child]:
    """The classes of an object that are no library's."""
    mro = getattr(cls, "_user_class", cls).__mro__
    return [(("class", i), one) for i, one in enumerate(mro) if not _is_library(one.__module__)]


def _drawn_by(cls: type) -> list[Child]:
    """The generators that a class's functions find around them: in a function that made the class, or in its module."""
    found = []
    for name, value in vars(cls).items():
        function = getattr(value, "__func__", value)
        if isinstance(function, types.FunctionType):
            found += [((f"function {name}", key), one) for key, one in _around(function) if _is_generator(one)]
    return found


def _around(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables that a function finds in its module."""
    names = (name for name in _names_in(function.__code__) if name in function.__globals__)
    yield from ((name, function.__globals__[name]) for name in names)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents


def _is_generator(value: Any) -> bool:
    return generator_kind(type(value)) is not None  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names_in(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


# Objects that hold nothing else that could change.
_PASSED: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__self__", "__func__"),
    functools.partial: ("func", "args", "keywords"),
    DataLoader: ("dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn", "generator"),
    Subset: ("dataset",),
    Part: ("dataset",),
    RandomSampler: ("generator",),
    SequentialSampler: (),
    BatchSampler: ("sampler",),
}


def _passed(thing: Any) -> list[Child]:
    """Where a thing leads to that cannot change itself."""
    if isinstance(thing, tuple):
        return [] if len(thing) > nodes.MOST_ELEMENTS else [(("item", i), value) for i, value in enumerate(thing)]
    if isinstance(thing, types.FunctionType):
        if _is_library(thing.__module__):
            return []
        drawn = [(("global", name), value) for name, value in _around(thing) if _is_generator(value)]
        return [*drawn, *((("closure", i), cell) for i, cell in enumerate(thing.__closure__ or ()))]
    if type(thing) is DataLoader and _is_usual(thing):
        return [(("attribute", "dataset"), thing.dataset)]
    names = next(names for base, names in _PASSED.items() if type(thing) is base)
    return [(("attribute", name), getattr(thing, name)) for name in names]


def _is_usual(loader: DataLoader[Any]) -> bool:
    """Whether a loader holds nothing of interest but its data set."""
    sampler: Any = loader.sampler
    return (
        loader.collate_fn is default_collate
        and loader.worker_init_fn is None
        and loader.generator is None
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_sampler.sampler is sampler
        and (type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and sampler.generator is None))
    )


@lru_cache(maxsize=4096)
def _is_library(module: str | None) -> bool:
    package = (module or "builtins").partition(".")[0]
    return package in _LIBRARIES or package in _MACHINERY or package in sys.stdlib_module_names - {"__main__"}


def _is_machinery(cls: type) -> bool:
    module = cls.__module__ or ""
    return module.partition(".")[0] in _MACHINERY or module.startswith(_MACHINERY_WITHIN)

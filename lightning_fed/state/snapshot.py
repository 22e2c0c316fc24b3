"""What some objects hold at one moment, to be restored later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_fed.state import nodes
from lightning_fed.state.access import memory_of
from lightning_fed.state.content import Content, Generator, Limits
from lightning_fed.state.generators import seeding_method
from lightning_fed.state.nodes import Container, Node, same
from lightning_fed.state.walk import Walk


@dataclass
class DataLimits(Limits):
    """For data sets, which are read and large, and looked at anew for each client."""

    always: int = 1 << 16
    once: int = 0
    samples: bool = False
    flags: bool = False
    elements: int = 1024


class Snapshot:
    """All that some objects hold, but for the content of weights.

    Args:
        roots: The objects, by name.
        weights: Gives the tensors whose content is not looked after.

    Attributes:
        grown: The ways to lists and dicts of the user's that held all that they had held, and more, when it was put
            back last.
    """

    limits = Limits

    def __init__(self, roots: Mapping[str, Any], weights: Callable[[], Iterable[Tensor]] = tuple) -> None:
        self._roots, self._weights = roots, weights
        self.grown: list[str] = []
        self._take()

    def _take(self) -> None:
        walk = Walk(self._roots, frozenset(map(id, self._weights())), self.limits())
        self.endless, self.unseen = walk.endless, walk.unseen
        self._containers, self._contents = walk.containers, walk.contents
        self._empty, self._emptied = walk.empty, [node.thing for node in walk.empty]
        self.generators = [node for node in walk.contents if isinstance(node, Generator)]
        self._self_seeding = [node for node in walk.containers if _seeds_itself(node)]
        for node in self.nodes():
            node.save()

    def nodes(self) -> list[Node]:
        """Return all that is looked after."""
        return [*self._containers, *self._empty, *self._contents]

    def renew(self) -> None:
        """Take note of what they hold now."""
        if any(self._emptied) or any(node.differs() for node in self._containers):
            self._take()
        else:
            for node in self._contents:
                node.save()

    def restore(self) -> None:
        """Put back what they held, and note what had ``grown``."""
        changed = [node for node in self._containers if node.differs()]
        if any(self._emptied):
            changed += [node for node in self._empty if node.thing]
        self.grown = [node.path for node in changed if type(node.thing) in (list, dict) and _is_longer(node)]
        for node in changed:
            if not self._stays(node):
                self._restore(node)
        for content in self._contents:
            content.restore()

    def _stays(self, node: Container) -> bool:
        """Return whether what is there now is what the code around collects."""
        return node.is_enclosed and node.has_only_grown()

    def _restore(self, node: Container) -> None:
        node.restore()

    def changed(self) -> list[Node]:
        """Return the nodes that hold something else now."""
        known: tuple[Node, ...] = (*self._containers, *self._contents)
        found = [node for node in known if node.differs()]
        return [*found, *(node for node in self._empty if node.thing)] if any(self._emptied) else found

    @property
    def lost(self) -> list[Content]:
        """What was written to and is too large to have been copied."""
        return [node for node in self._contents if isinstance(node, Content) and node.is_lost]

    @property
    def seeds_itself(self) -> bool:
        """Whether it holds objects that are seeded by a method of their own, with who knows what behind it."""
        return bool(self._self_seeding)

    @contextmanager
    def drawing(self, seed_of: Callable[[str], int]) -> Iterator[None]:
        """Seed all that they draw from in the block; after it their generators have the states of before."""
        for generator in self.generators:
            generator.save()
        self.seed(seed_of)
        try:
            yield
        finally:
            for generator in self.generators:
                generator.restore()

    def seed(self, seed_of: Callable[[str], int]) -> None:
        """Seed all that they draw random numbers from.

        Args:
            seed_of: Gives the seed of the generator that is found at a path.
        """
        for node in self._self_seeding:
            method = seeding_method(type(node.thing))
            assert method is not None
            method(node.thing, seed_of(node.path))
        for generator in self.generators:
            generator.kind.seed(generator.thing, seed_of(generator.path))


def _is_longer(node: Container) -> bool:
    return not node.is_enclosed and node.has_only_grown()


def _seeds_itself(node: Container) -> bool:
    return node.kind is nodes.ATTRIBUTES and seeding_method(type(node.thing)) is not None


class DataSnapshot(Snapshot):
    """A snapshot of data sets, loaders, samplers and transforms, made for each client: large tensors are only watched.

    What was read or opened in place of ``None`` meanwhile stays: a file handle, a large array, another data set. To do
    it again for each client would take long. All else is restored, lest what one client's data has taught (a scaler
    that was fitted, an augmented example that was kept) is found by the next.
    """

    limits = DataLimits

    def _stays(self, node: Container) -> bool:
        return node.kind is not nodes.DICT and super()._stays(node)

    def _restore(self, node: Container) -> None:
        if node.kind is not nodes.ATTRIBUTES:
            node.restore()
            return
        held = node.thing.__dict__
        read = {name for name, value in node.saved.items() if value is None and _is_read(held.get(name))}
        kept = {name: held[name] if name in read else value for name, value in node.saved.items()}
        if not same(held, kept):
            node.kind.write(node.thing, kept)


def _is_read(value: Any) -> bool:
    """Return whether an attribute that was set while reading looks like something that was read or opened."""
    if callable(getattr(value, "close", None)):
        return True
    if isinstance(value, (Tensor, np.ndarray)):
        return memory_of(value) > Limits.always
    try:
        return len(value) > DataLimits.elements
    except Exception:
        return False

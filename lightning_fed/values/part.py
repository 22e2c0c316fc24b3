"""A client's part of a data set that is dealt out: it shows the client's own examples, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_fed.errors import ClientError
from lightning_fed.seeding import random_states_kept, seed_all

# What a data set says of its classes, of which there may be as many as examples.
_OF_CLASSES = frozenset({"classes", "class_to_idx"})


class Part(Subset[Any]):
    """Some examples of a data set; its data for each example (``targets``, ``tensors``, ...) are there for these alone.

    What the data set says of itself otherwise (``classes``, ``transform``) is there as it is. Its methods are not: they
    would speak of all clients' examples. ``dataset`` and ``indices`` are those of a ``Subset``.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> Part(TensorDataset(torch.arange(10)), [2, 5]).tensors
    (tensor([2, 5]),)
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        value = getattr(self.dataset, name)
        if callable(value) and not hasattr(value, "__len__") and not isinstance(value, torch.nn.Module):
            raise AttributeError(
                f"{type(self.dataset).__name__}.{name} speaks of the examples of all clients; a client's data set has"
                f" {len(self)} of them. What is needed is in its items, or in attributes with one entry an example."
            )
        return value if name in _OF_CLASSES else own(value, self.indices, len(self.dataset))  # type: ignore[arg-type]


class TransformedPart(Part):
    """A client's part whose examples go through a function of the client's own, each the same whenever it is read.

    What the function draws from Python's, NumPy's and torch's generators (on the CPU) is the example's own, and theirs
    go on as if nothing had been drawn. It may write into the example's tensors. What the data set has for each example
    beside its items is not there: it is as it was before the function.

    Args:
        dataset: The whole data set.
        indices: The client's examples.
        transform: From an example to an example.
        seed_of: Gives the seed of an example, by its index in the whole data set.

    >>> noisy = TransformedPart(range(5), [2, 4], lambda x: x + float(torch.rand(())), lambda index: index)
    >>> noisy[1] == noisy[1] != noisy[0] + 2
    True
    """

    def __init__(
        self,
        dataset: Any,
        indices: Sequence[int],
        transform: Callable[[Any], Any],
        seed_of: Callable[[int], int],
    ) -> None:
        super().__init__(dataset, indices)
        self.transform, self.seed_of = transform, seed_of

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return some examples, read at once where the data set can."""
        examples = super().__getitems__(indices)
        with random_states_kept(devices=False):  # once for all, for it takes longer than a seed
            return [self._transformed(index, one) for index, one in zip(indices, examples, strict=True)]

    def _transformed(self, index: int, example: Any) -> Any:
        seed_all(self.seed_of(self.indices[index]), devices=False)
        changed = self.transform(_copied(example))
        if changed is None:
            raise ClientError(
                f"has a transform that gave None for example {self.indices[index]}: Partition(transform=...) gives a"
                " client's function, and that has to return the example."
            )
        return changed

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name not in _OF_CLASSES and value is not getattr(self.dataset, name):
            raise AttributeError(
                f"{type(self.dataset).__name__}.{name} is as it was before Partition(transform=...): take the examples"
                " from the data set's items."
            )
        return value


def _copied(example: Any) -> Any:
    """Return an example with tensors and arrays that are no view of the data."""
    if isinstance(example, Tensor):
        return example.clone()
    if isinstance(example, np.ndarray):
        return example.copy()
    if type(example) in (tuple, list):
        return type(example)(map(_copied, example))
    return {key: _copied(value) for key, value in example.items()} if type(example) is dict else example


def own(value: Any, indices: Sequence[int], count: int) -> Any:
    """Return what is left for some examples of what has an entry for each of ``count``; else the thing itself.

    Args:
        value: A tensor, an array, a list or tuple, or a tuple of these.
        indices: The examples.
        count: How many there are in all.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        is_each = value.ndim > 0 and len(value) == count
        return value[torch.as_tensor(indices, dtype=torch.int64).numpy()] if is_each else value
    if isinstance(value, (list, tuple)):
        if len(value) == count:
            return type(value)(value[i] for i in indices) if type(value) in (list, tuple) else value
        if isinstance(value, tuple) and value and all(isinstance(one, (Tensor, np.ndarray)) for one in value):
            return tuple(own(one, indices, count) for one in value)
    return value

"""A client's part of a data set that is dealt out: it shows the client's own examples, and nobody else's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

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

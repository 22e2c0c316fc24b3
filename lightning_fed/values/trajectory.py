"""Tensors of one step after another: in memory, and beyond a budget in a temporary file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import SEEK_END
from tempfile import SpooledTemporaryFile

import torch
from torch import Tensor

from lightning_fed.values.weights import Weights

# How many bytes stay in memory.
BUDGET = 256 * 2**20


class Trajectory:
    """Tensors by name at each step: added one step after the other, and read in that order, as often as one likes.

    Args:
        budget: How many bytes are held in memory; with more all are in a temporary file, where ``tempfile`` makes them
            (``TMPDIR``).

    >>> steps = Trajectory()
    >>> steps.append({"w": torch.tensor([1.0, 2.0])})
    >>> steps.append({})
    >>> list(steps)
    [{'w': tensor([1., 2.])}, {}]
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self._file = SpooledTemporaryFile(max_size=budget)  # noqa: SIM115 - it lives as long as this
        self._steps: list[tuple[int, dict[str, tuple[torch.dtype, torch.Size]]]] = []

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Add a step."""
        self._file.seek(0, SEEK_END)
        start = self._file.tell()
        for tensor in tensors.values():
            self._file.write(_bytes_of(tensor.detach().to("cpu").contiguous()))
        self._steps.append((start, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}))

    def __iter__(self) -> Iterator[Weights]:
        """Give each step's tensors, new ones on the CPU."""
        for start, forms in self._steps:
            self._file.seek(start)
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in forms.items()}
            for tensor in tensors.values():
                self._file.readinto(_bytes_of(tensor))
            yield tensors

    def close(self) -> None:
        """Forget all of it."""
        self._file.close()
        self._steps = []


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's own bytes."""
    return tensor.flatten().view(torch.uint8).numpy().data

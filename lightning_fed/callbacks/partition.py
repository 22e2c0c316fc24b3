"""Deals the user's train set out among clients with flwr-datasets' partitioners."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_fed import checks
from lightning_fed._compat.flwr_datasets import num_partitions, partition_by
from lightning_fed.callbacks.base import PartitionOwner
from lightning_fed.callbacks.columns import label_column, require_one_way, values_by
from lightning_fed.callbacks.dealt import Dealt
from lightning_fed.callbacks.distribution import draw_labels, draw_sizes
from lightning_fed.callbacks.natural import Natural
from lightning_fed.callbacks.pictures import new_figure
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for, seeded
from lightning_fed.values.data import ClientLoaders, in_memory, require_sliceable, slice_loader
from lightning_fed.values.part import Part, TransformedPart

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# With fewer examples a client, starting worker processes takes longer than reading.
_WORTH_WORKERS = 5000


class Partition(PartitionOwner):
    """Deals the train set out among clients; works on any map-style dataset, of torch or Hugging Face.

    The partitioner runs over a table of labels, shuffled with the run's seed, so no example is read or decoded. Each
    client gets a loader like the user's own over its examples, in the order of the dataset. Data that is apart already
    (by speaker, by hospital) is taken as it is with ``by=``.

    Args:
        partitioner: Any partitioner of ``flwr_datasets.partitioner``, or a number of clients for an IID partition.
        val_fraction: The part of each client's examples held out for its client-side evaluation, in ``[0, 1)``, rounded
            to whole examples; a client always keeps at least one example to train on.
        labels: The label of each example, in the dataset's order, or a function of the dataset that gives them. Needed
            only where they are found neither in ``.targets``, ``.labels``, a column, nor the last tensor. Every example
            has one where the partitioner asks for it.
        cache: Keep what was read of a client in memory, transformed, and read it no more. Only for transforms without
            randomness. Each worker process keeps those of the clients that it served.
        by: In place of a partitioner, what tells the clients apart, one value for each example: the name of a column or
            attribute of the train set, a list, array or tensor, or a function of the dataset that gives one. Each value
            is a client; clients are numbered in the order of the values (numbers by size, texts by their characters),
            whatever the seed. ``client_names`` tells whose data is which.
        min_examples: With ``by``: values with fewer examples, held-out ones included, are left out, and a line says how
            many. The numbers close ranks.
        transform: Makes clients' features differ: a function of a client's index that gives the function which its
            examples go through, as the dataset gives them, held-out ones included; ``None`` for none. What that draws
            without a generator of its own is the same for an example in every round, on every engine and after a
            resume. With ``cache`` it is called once for each example, else each time that one is read.

    Raises:
        ConfigurationError: If an argument is out of its range.

    >>> from flwr_datasets.partitioner import DirichletPartitioner
    >>> skewed = Partition(DirichletPartitioner(num_partitions=10, partition_by="label", alpha=0.3), val_fraction=0.1)
    >>> skewed.num_clients
    10
    >>> from torch.utils.data import DataLoader
    >>> speakers = Partition(by=["Romeo", "Juliet", "Romeo", "Nurse"])
    >>> speakers.prepare(DataLoader(range(4)), seed=0)
    >>> speakers.client_names
    ['Juliet', 'Nurse', 'Romeo']
    >>> speakers.indices(2)
    array([0, 2])
    """

    deals_out = True

    def __init__(
        self,
        partitioner: Partitioner | int | None = None,
        val_fraction: float = 0.0,
        labels: Sequence[Any] | torch.Tensor | Callable[[Any], Any] | None = None,
        cache: bool = False,
        *,
        by: str | Sequence[Any] | torch.Tensor | Callable[[Any], Any] | None = None,
        min_examples: int = 1,
        transform: Callable[[int], Callable[[Any], Any] | None] | None = None,
    ) -> None:
        require_one_way(partitioner, by, min_examples)
        if transform is not None and (isinstance(transform, torch.nn.Module) or not callable(transform)):
            raise ConfigurationError(_NO_TRANSFORM.format(checks.as_typed(transform)))
        if checks.is_number(partitioner, whole=True):
            from flwr_datasets.partitioner import IidPartitioner

            partitioner = IidPartitioner(int(partitioner))
        if not (checks.is_number(val_fraction) and 0 <= val_fraction < 1):
            raise ConfigurationError(f"Partition(val_fraction={val_fraction!r}) must be in [0, 1).")
        self.partitioner: Any = partitioner
        self.by, self.min_examples = by, min_examples
        self.val_fraction = val_fraction
        self._labels, self.cache, self.transform = labels, cache, transform
        self._read: dict[tuple[str, int], Any] = {}
        self._loader: Any = None
        self._dealt: Natural | Dealt | None = None
        self._seed = 0

    @property
    def num_clients(self) -> int:
        """How many clients there are; some partitioners know it only once they saw the data."""
        if (count := num_partitions(self.partitioner)) is not None:
            return count
        if self._dealt is None:
            who = self._call() if self.partitioner is None else type(self.partitioner).__name__
            raise ConfigurationError(f"{who} knows its number of clients only once it saw the data.")
        return self._dealt.num_partitions

    @property
    def client_names(self) -> list[Any] | None:
        """The value of each client, by its number, once the data is dealt out; ``None`` without ``by``."""
        return self._dealt.names if isinstance(self._dealt, Natural) else None

    def prepare(self, loader: object, seed: int) -> None:
        """See ``PartitionOwner``.

        Raises:
            ConfigurationError: If the loader cannot be sliced, the partitioner does not fit the data, or nobody's
                ``val_fraction`` is one example.
        """
        self._loader, self._seed, self._read = require_sliceable(loader), seed, {}
        self._dealt, dataset = None, self._loader.dataset
        if self.by is not None:
            self._dealt = self._natural(dataset)
        else:
            self._dealt = Dealt(self.partitioner, dataset, self._labels, seed)
        self._require_held_out()
        each = len(self._loader.dataset) / self.num_clients
        if self._loader.num_workers and each < _WORTH_WORKERS:
            rank_zero_warn(
                f"DataLoader(num_workers={self._loader.num_workers}) starts that many processes for every client and"
                f" round, to read about {each:.0f} examples each time: num_workers=0 is likely faster."
            )

    def _call(self) -> str:
        by = f"by={self.by!r}" if isinstance(self.by, str) else "by=..."
        return f"Partition({by}{'' if self.min_examples == 1 else f', min_examples={self.min_examples}'})"

    def _natural(self, dataset: Any) -> Natural:
        dealt = Natural(values_by(dataset, self.by), self.min_examples, self._call())
        if dealt.left_out:
            rank_zero_info(
                f"{self._call()}: {dealt.left_out} of {dealt.left_out + len(dealt.names)} clients have fewer examples"
                f" and are left out, with {dealt.examples_left_out} of {len(dataset)} examples."
            )
        return dealt

    def _require_held_out(self) -> None:
        """Check that some client has an example to evaluate on, where that is asked for."""
        clients = range(self.num_clients)
        if not self.val_fraction or any(len(self.split(client)[1]) for client in clients):
            return
        most = max(len(self.indices(client)) for client in clients)
        instead = f"s. Write val_fraction={math.ceil(500 / most) / 1000} or more"
        if most == 1:
            instead = ", which it trains on. Write val_fraction=0"
        raise ConfigurationError(
            f"Partition(val_fraction={self.val_fraction!r}) holds nothing out: the largest client has {most}"
            f" example{instead}, or deal out fewer clients."
        )

    def indices(self, client: int) -> np.ndarray[Any, Any]:
        """Return all examples of a client, training and held out: indices into the dataset, int64, ascending."""
        if self._dealt is None:
            raise ConfigurationError("The data has not been dealt out yet: call trainer.fit, or partition.prepare.")
        return self._dealt.indices(client)

    def split(self, client: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return a client's training and held-out examples: indices into the dataset, int64, ascending."""
        own = self.indices(client)
        held_out = self._held_out(len(own))
        if not held_out:
            return own, own[:0]
        chosen = np.zeros(len(own), dtype=bool)
        chosen[np.random.default_rng(seed_for(self._seed, "val", client=client)).permutation(len(own))[:held_out]] = (
            True
        )
        return own[~chosen], own[chosen]

    def client(self, client: int, *, round: int) -> ClientLoaders:
        """See ``PartitionOwner``."""
        train, val = (part.tolist() for part in self.split(client))
        seed = seed_for(self._seed, "loader", round=round, client=client)
        return ClientLoaders(
            # After round 1 Lightning starts a fit with two passes; in round 1 the draws are those of a plain Trainer.
            train=self._loader_of("train", client, train, seed=seed, keep_workers=round > 1),
            val=self._loader_of("val", client, val, seed=seed, shuffle=False) if val else None,
        )

    def _loader_of(self, which: str, client: int, indices: list[int], **how: Any) -> Any:
        part = self._read.get((which, client))
        if part is None:
            part = self._part(client, indices)
            if self.cache:
                part = self._read[which, client] = in_memory(self._loader, part)
        return slice_loader(self._loader, indices, part=part, **how)

    def _part(self, client: int, indices: list[int]) -> Part:
        if self.transform is None:
            return Part(self._loader.dataset, indices)
        with seeded(seed_for(self._seed, "transform", client=client)):
            transform = self.transform(client)
        if transform is None:
            return Part(self._loader.dataset, indices)
        if not callable(transform):
            raise ConfigurationError(_NO_TRANSFORM.format(f"..., which gave {checks.as_typed(transform)} for {client}"))
        return TransformedPart(self._loader.dataset, indices, transform, partial(_seed_of, self._seed, client))

    def can_evaluate(self) -> bool:
        """Return whether anything is held out."""
        return self.val_fraction > 0

    @property
    def knows_sizes(self) -> bool:
        """Whether no table has to be made for each client."""
        return self._dealt is not None and self._dealt.knows_sizes

    def size_of(self, client: int) -> int:
        """Return the number of training examples of a client."""
        own = len(self.indices(client)) if self._dealt is None else self._dealt.size_of(client)
        return own - self._held_out(own)

    def _held_out(self, own: int) -> int:
        return min(int(self.val_fraction * own + 0.5), max(own - 1, 0))

    def plot(self, path: str | os.PathLike[str] | None = None, **how: Any) -> Figure:
        """Draw what each client has, in a picture of its own.

        Args:
            path: Where to save the picture, if anywhere.
            **how: As ``draw`` takes them.

        Raises:
            ConfigurationError: If the data has not been dealt out, or has no labels.
        """
        figure = new_figure(6.4, 4.2)
        self.draw(figure.add_subplot(), **how)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def draw(
        self, axes: Axes, *, title: str = "Examples of each client", legend: bool = True, percent: bool = False
    ) -> None:
        """Draw how many examples of each label each client has; with ``by``, where there are no labels, how many.

        A label has the same colour in all pictures of a data set, so partitions can be drawn side by side.

        Args:
            axes: Where to draw.
            title: What stands above it.
            legend: Whether to name the labels, if they are at most 40, at the right of the axes.
            percent: Draw parts of each client's examples in place of their number.

        Raises:
            ConfigurationError: If the data has not been dealt out, or has no labels.
        """
        own = [self.indices(client) for client in range(self.num_clients)]
        labels = label_column(self._loader.dataset, self._labels, partition_by(self.partitioner))
        if labels is None and self.by is None:
            raise ConfigurationError("Partition.plot() found no labels: pass them, Partition(..., labels=...).")
        if labels is None:
            draw_sizes(axes, [len(indices) for indices in own])
        else:
            draw_labels(axes, labels, own, legend=legend, percent=percent)
        axes.set_title(title)


_NO_TRANSFORM = (
    "Partition(transform={}): write a function of a client's index that gives the function which the client's examples"
    " go through: transform=lambda client: lambda example: ..., or None for a client whose examples stay as they are."
)


def _seed_of(seed: int, client: int, example: int) -> int:
    return seed_for(seed, f"transform/{example}", client=client)

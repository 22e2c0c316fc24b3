"""A data set that a partitioner of flwr-datasets has dealt out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_fed._compat.flwr_datasets import partition_by
from lightning_fed.callbacks.columns import LABEL_NAMES, columns_of
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

_INDEX = "lightning-fed-index"


class Dealt:
    """Which examples a partitioner gives to whom: it runs over a table of labels, shuffled with the run's seed.

    Args:
        partitioner: The user's, which stays without data.
        dataset: A map-style dataset.
        labels: The labels as the user gave them, or ``None``.
        seed: The run's seed.

    Attributes:
        partitioner: One like the user's that has the table.

    Raises:
        ConfigurationError: If the partitioner does not fit the data.
    """

    def __init__(self, partitioner: Partitioner, dataset: Any, labels: Any, seed: int) -> None:
        if partitioner.is_dataset_assigned():
            raise ConfigurationError("Partition was given a partitioner that has a dataset already; give it a new one.")
        from datasets import Dataset
        from flwr_datasets.partitioner import IidPartitioner

        columns = columns_of(dataset, labels, partition_by(partitioner))
        _require_labels(partitioner, columns)
        order = np.random.default_rng(seed_for(seed, "partition")).permutation(len(dataset))
        self.partitioner = copy.deepcopy(partitioner)
        self.partitioner.dataset = Dataset.from_dict({_INDEX: order, **{name: c[order] for name, c in columns.items()}})
        self._cache: dict[int, np.ndarray[Any, Any]] = {}
        self._iid = order if type(partitioner) is IidPartitioner else None
        self._shares = divmod(len(order), self.num_partitions) if self._iid is not None else (0, 0)
        try:
            self.indices(0)
            if self.num_partitions > len(dataset):
                raise ValueError(f"{self.num_partitions} clients are too many, some would have none.")
        except (KeyError, ValueError, AttributeError, AssertionError) as error:
            raise ConfigurationError(_explain(partitioner, error, len(dataset), list(columns))) from error

    @property
    def num_partitions(self) -> int:
        """How many clients there are."""
        return self.partitioner.num_partitions

    def indices(self, client: int) -> np.ndarray[Any, Any]:
        """Return a client's examples: indices, int64, ascending."""
        if client not in self._cache:
            self._cache[client] = np.sort(self._dealt(client))
        return self._cache[client]

    @property
    def knows_sizes(self) -> bool:
        """Whether ``size_of`` makes no table for each client."""
        return self._iid is not None

    def size_of(self, client: int) -> int:
        """Return how many examples a client has."""
        if self._iid is None or client in self._cache:
            return len(self.indices(client))
        part = self._slice(client)
        return part.stop - part.start

    def _dealt(self, client: int) -> np.ndarray[Any, Any]:
        if self._iid is None:
            return np.asarray(self.partitioner.load_partition(client)[_INDEX][:], dtype=np.int64)
        return self._iid[self._slice(client)]

    def _slice(self, client: int) -> slice:
        """Return the part that an IidPartitioner takes; to cut a table by it takes a millisecond a client."""
        assert self._iid is not None
        each, more = self._shares
        begin = each * client + min(client, more)
        return slice(begin, begin + each + (client < more))


def _explain(partitioner: Partitioner, error: Exception, examples: int, columns: list[str]) -> str:
    name, wanted = type(partitioner).__name__, partition_by(partitioner)
    if wanted is not None and wanted not in columns:
        return (
            f"{name}(partition_by={wanted!r}): the training set has no column {wanted!r}; it has"
            f" {columns or 'no labels that can be found'}. Name one of these, or pass the labels:"
            " Partition(..., labels=...)."
        )
    hint = ""
    if "attempts" in str(error):
        hint = " Two ways out: a larger alpha, or a smaller min_partition_size (0 lets clients go without examples)."
    return f"{name} cannot deal out {examples} examples: {error}{hint}"


def _require_labels(partitioner: Partitioner, columns: dict[str, np.ndarray[Any, Any]]) -> None:
    """Check that every example has what the partitioner deals by."""
    wanted = partition_by(partitioner)
    column = columns.get(wanted, np.zeros(0)) if isinstance(wanted, str) else np.zeros(0)
    if column.dtype.kind not in "Of":
        return
    missing = [i for i, label in enumerate(column.tolist()) if label is None or label != label]
    if missing:
        raise ConfigurationError(
            f"{type(partitioner).__name__}(partition_by={wanted!r}): {len(missing)} of {len(column)} training"
            f" examples have no {'label' if wanted in LABEL_NAMES else repr(wanted)} (the first is example"
            f" {missing[0]}). Leave them out of the data set with torch.utils.data.Subset, or give each a label:"
            " Partition(..., labels=...)."
        )

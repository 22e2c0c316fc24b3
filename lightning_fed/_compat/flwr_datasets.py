"""What partitioners of flwr-datasets tell of themselves before they saw data."""

from __future__ import annotations

from typing import Any


def num_partitions(partitioner: Any) -> int | None:
    """Return how many clients a partitioner deals out to, where it was told; asking it itself opens the data."""
    count = getattr(partitioner, "_num_partitions", None)
    return count if isinstance(count, int) else None


def partition_by(partitioner: Any, default: Any = None) -> Any:
    """Return the column by which a partitioner deals out."""
    return getattr(partitioner, "_partition_by", default)

"""What torchmetrics keeps private and a federation needs: a metric's states, and how they add up."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric

# What a metric keeps of the value that it computed.
SET_ON_METRICS = frozenset({"_computed", "_forward_cache"})


def reductions(metric: Metric) -> dict[str, Any]:
    """Return how the states of several processes become one, by name."""
    return metric._reductions


def defaults(metric: Metric) -> dict[str, Any]:
    """Return the states of a metric that saw nothing, by name."""
    return metric._defaults


def updates(metric: Metric) -> int:
    """Return how many times a metric was updated."""
    return int(metric._update_count)


def computed(metric: Metric) -> Any:
    """Return the value that a metric has computed and keeps, or ``None``."""
    return metric._computed


def as_updated(metric: Metric, times: int) -> None:
    """Let a metric whose states were set compute a value of them."""
    metric._update_count = times
    metric._computed = None

"""Pictures of what each client has: its data, its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawn_labels(partitioner: Any, label: str, wanted: dict[str, Any]) -> Figure:
    """Draw how many examples of each label each client has.

    Args:
        partitioner: One that has its data, or what has its attributes.
        label: The column with the labels.
        wanted: As ``flwr_datasets.visualization.plot_label_distributions`` takes them.
    """
    from flwr_datasets.visualization import plot_label_distributions

    few = len(set(partitioner.dataset[label])) <= 10
    defaults = {"legend": True, "verbose_labels": False, "cmap": "tab10" if few else None}
    figure, axes, _ = plot_label_distributions(partitioner, label, **{**defaults, **wanted})
    axes.set_title(wanted.get("title", "Examples of each client, by label"))
    axes.set_xlabel("client")
    return figure


def drawn_sizes(sizes: Sequence[int]) -> Figure:
    """Draw how many examples each client has."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.bar(range(len(sizes)), sizes)
    axes.set(title="Examples of each client", xlabel="client", ylabel="examples")
    return figure


def drawn_over_clients(metrics: Mapping[str, tuple[Sequence[float], float | None]]) -> Figure:
    """Draw metrics over clients, from the lowest value to the highest, each with its deciles; one panel a name.

    Args:
        metrics: By name the values of the clients, those that are NaN left out, and the value over all their data.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.5 * max(1, len(metrics)), 4), layout="constrained")
    for i, (name, (given, merged)) in enumerate(metrics.items(), 1):
        values = sorted(value for value in given if not math.isnan(value))
        axes = figure.add_subplot(1, len(metrics), i)
        axes.plot(range(1, len(values) + 1), values, marker="." if len(values) < 50 else None, label="each client")
        if values:
            # A quantile lies on the line between two clients: in its middle the median.
            parts = np.linspace(0, 1, 11)
            places, heights = 1 + parts * (len(values) - 1), np.quantile(values, parts)
            axes.plot(places[1:-1], heights[1:-1], "D", color="C1", markersize=5, label="deciles")
            axes.plot(places[5], heights[5], "D", color="C3", markersize=8, label=f"median {heights[5]:.4g}")
        if merged is not None and not math.isnan(merged):
            axes.axhline(merged, color="grey", linestyle="--", linewidth=1, label=f"all data together {merged:.4g}")
        axes.set(xlabel="clients, from the lowest to the highest", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure

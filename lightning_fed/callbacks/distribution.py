"""Pictures of what each client has: its data, its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_fed.callbacks.pictures import new_figure, number_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# So many labels have an entry in the legend, and so many of them stand in one column.
_NAMED, _IN_A_COLUMN = 40, 12


def draw_labels(
    axes: Axes, labels: np.ndarray[Any, Any], own: Sequence[np.ndarray[Any, Any]], *, legend: bool, percent: bool
) -> None:
    """Draw a bar for each client, a colour for each label.

    Args:
        axes: Where to draw.
        labels: The label of each example, (n,).
        own: The examples of each client, as indices.
        legend: Whether to name the labels beside the axes.
        percent: Draw parts of each client's examples, of which 100 are all.
    """
    if labels.dtype == object:  # some are missing, or they are of several kinds: as they are they have no order
        labels = labels.astype(str)
    names, labels = np.unique(labels, return_inverse=True)
    heights: Any = np.array([np.bincount(labels[indices], minlength=len(names)) for indices in own])
    if percent:
        heights = 100 * heights / np.maximum(heights.sum(axis=1, keepdims=True), 1)
    tops = heights.cumsum(axis=1)
    for i, (name, color) in enumerate(zip(names, _palette(len(names)), strict=True)):
        bottom = tops[:, i] - heights[:, i]
        bars = axes.bar(range(len(own)), heights[:, i], _width(len(own)), bottom, color=color, label=str(name))
        for bar in bars:  # one without height, on top of the others, would be the end of the axis
            bar.sticky_edges.y[:] = [0]
    _dress(axes, len(own), "examples (%)" if percent else "examples")
    if legend and len(names) <= _NAMED:
        keys, texts = axes.get_legend_handles_labels()
        columns = math.ceil(len(names) / _IN_A_COLUMN)
        # From the top down, as the bars are.
        axes.legend(keys[::-1], texts[::-1], title="label", ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """Draw how many examples each client has."""
    axes.bar(range(len(sizes)), sizes, _width(len(sizes)))
    _dress(axes, len(sizes), "examples")


def _palette(labels: int) -> Sequence[Any]:
    """Return a colour for each label, the same whichever clients have it."""
    from matplotlib import colormaps

    if labels > 20:
        return list(colormaps["turbo"](np.linspace(0, 1, labels)))
    return [colormaps["tab10" if labels <= 10 else "tab20"](i) for i in range(labels)]


def _width(clients: int) -> float:
    return 0.8 if clients <= 40 else 1.0  # gaps of less than a pixel here and there look like data


def _dress(axes: Axes, clients: int, what: str) -> None:
    axes.set(xlabel="client", ylabel=what)
    number_ticks(axes.xaxis, whole=True)
    if clients <= 15:  # each has its number
        axes.set_xticks(range(clients))
    number_ticks(axes.yaxis)


def drawn_over_clients(metrics: Mapping[str, tuple[Sequence[float], float | None]]) -> Figure:
    """Draw metrics over clients, from the lowest value to the highest, each with its deciles; one panel a name.

    Args:
        metrics: By name the values of the clients, those that are NaN left out, and the value over all their data.
    """
    figure = new_figure(5.5 * max(1, len(metrics)), 4)
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
        axes.set(title=f"{name} of each client", xlabel="clients, from the lowest to the highest", ylabel=name)
        number_ticks(axes.xaxis, whole=True)
        number_ticks(axes.yaxis)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure

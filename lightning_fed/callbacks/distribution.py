"""Pictures of what each client has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

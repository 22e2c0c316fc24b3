"""What a test of each client gave: a row a client, the value over all their data, and the spread over clients."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_fed.callbacks.distribution import drawn_over_clients
from lightning_fed.callbacks.history import asked_for, curves
from lightning_fed.values.text_table import as_table, cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Columns of the table that are no metrics.
COLUMNS = ("client", "num_examples")
# So many clients have a line each in the printed table.
_SHOWN = 20


class Spread(NamedTuple):
    """How a metric is spread over clients, each counting once, whatever its number of examples.

    Attributes:
        minimum: The lowest value.
        deciles: The nine values below which 10%, 20%, ... 90% of the clients are, by ``numpy.quantile``: linear between
            the clients' sorted values. The fifth is the median.
        maximum: The highest value.
    """

    minimum: float
    deciles: tuple[float, ...]
    maximum: float


@dataclass
class ClientResults:
    """The results of ``FederatedTrainer.test_clients``.

    Attributes:
        rows: One dict a client, by number: ``client``, ``num_examples`` and the client's metrics.
        merged: One value a name over all clients' data: torchmetrics objects by their states, plain numbers weighted by
            examples.
        left_out: The clients that have no data to test on.

    >>> rows = [{"client": i, "num_examples": 10 * (i + 1), "test_acc": 0.5 + 0.1 * i} for i in range(3)]
    >>> results = ClientResults(rows, {"test_acc": 0.6333})
    >>> print(results)
    3 clients, 60 test examples
    <BLANKLINE>
    metric    clients     all     min     10%     50%     90%     max
    test_acc        3  0.6333  0.5000  0.5200  0.6000  0.6800  0.7000
    <BLANKLINE>
    client  num_examples  test_acc
         0            10    0.5000
         1            20    0.6000
         2            30    0.7000
    >>> round(results.spread("test_acc").deciles[4], 4)
    0.6
    """

    rows: list[dict[str, Any]]
    merged: dict[str, float]
    left_out: list[int] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All metrics' names, sorted."""
        return sorted({*self.merged, *(name for row in self.rows for name in row)} - {*COLUMNS})

    def __getitem__(self, name: str) -> list[float]:
        """One metric of the clients that have it, in their order.

        Raises:
            KeyError: If no client has it; it names those there are.
        """
        values = [row[name] for row in self.rows if name in row]
        if name in COLUMNS or not values:
            raise KeyError(f"No client has {name!r}; there are {self.names}.")
        return values

    def spread(self, name: str) -> Spread:
        """Return how a metric is spread over the clients that have it, without those whose value is NaN.

        Raises:
            KeyError: If no client has it.
        """
        values = [value for value in self[name] if not math.isnan(value)]
        if not values:
            return Spread(math.nan, (math.nan,) * 9, math.nan)
        quantiles = np.quantile(np.asarray(values, dtype=np.float64), np.linspace(0, 1, 11)).tolist()
        return Spread(quantiles[0], tuple(quantiles[1:-1]), quantiles[-1])

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table, one line a client."""
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *self.names])
            writer.writeheader()
            writer.writerows(self.rows)

    def __str__(self) -> str:
        examples, without = sum(row["num_examples"] for row in self.rows), len(self.left_out)
        head = f"{len(self.rows):,} clients, {examples:,} test examples"
        parts = [head + (f"; {without:,} more have no data to test on" if without else "")]
        if self.names:
            columns = ["metric", "clients", "all", "min", "10%", "50%", "90%", "max"]
            parts.append(as_table([columns, *map(self._line, self.names)], left=1))
        if len(self.rows) <= _SHOWN:
            columns = [*COLUMNS, *self.names]
            parts.append(as_table([columns, *([cell(row.get(name)) for name in columns] for row in self.rows)]))
        return "\n\n".join(parts)

    def _line(self, name: str) -> list[str]:
        values, merged = [row[name] for row in self.rows if name in row], cell(self.merged.get(name))
        known = sum(not math.isnan(value) for value in values)
        if not known:
            return [name, "0", merged, *[""] * 5]
        low, deciles, high = self.spread(name)
        return [name, str(known), merged, *map(cell, (low, deciles[0], deciles[4], deciles[8], high))]

    def plot(self, path: str | os.PathLike[str] | None = None, names: Sequence[str] | str | None = None) -> Figure:
        """Draw each metric over the clients, from the lowest to the highest, with its deciles; one panel a name.

        Args:
            path: Where to save the picture, if anywhere.
            names: The metrics to draw, or one; by default all whose name speaks of a loss or an accuracy, else all.

        Raises:
            KeyError: If no client has one of ``names``.
        """
        chosen = asked_for(names, curves(self.names))
        figure = drawn_over_clients({name: (self[name], self.merged.get(name)) for name in chosen})
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

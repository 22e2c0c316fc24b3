"""Every round's metrics as a table, and their curves."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed._compat.lightning import results_of
from lightning_fed.callbacks.base import ClientReport, FederatedCallback, Stage
from lightning_fed.callbacks.pictures import new_figure, number_ticks
from lightning_fed.values.metrics import logged_names
from lightning_fed.values.text_table import as_table, cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_fed.trainer import FederatedTrainer

T = TypeVar("T")
Row = dict[str, float]

# Columns of the two tables that are no metrics.
_OF_ROUNDS = ("round",)
_OF_CLIENTS = ("round", "stage", "client", "num_examples")


class History(FederatedCallback):
    """Keeps a row of metrics for each round; part of the checkpoint, so a resumed run has the whole table.

    A row has ``round``, what the clients logged in training under the user's names, their own evaluation as
    ``clients/<name>``, and the server's validation under the user's names (in rounds that validate). Of a name that is
    both the validation's value is kept, as in ``callback_metrics``.

    Args:
        per_client: Also keep what each client reports, in ``clients``.

    Attributes:
        rows: One dict a round.
        clients: With ``per_client``, one dict a client, round and stage: ``round``, ``stage``, ``client``,
            ``num_examples`` and the client's metrics.

    >>> from lightning_fed import FederatedTrainer
    >>> from torch.utils.data import DataLoader
    >>> from lightning_fed.testing import ToyModule, toy_data
    >>> quiet = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    >>> trainer = FederatedTrainer(max_rounds=2, num_clients=3, callbacks=[history := History()], logger=False, **quiet)
    >>> trainer.fit(ToyModule(), DataLoader(toy_data(24), batch_size=8))
    >>> [row["round"] for row in history.rows]
    [1, 2]
    """

    def __init__(self, per_client: bool = False) -> None:
        self.per_client = per_client
        self.rows: list[Row] = []
        self.clients: list[dict[str, Any]] = []
        self._from_clients: set[str] = set()
        self._evaluates = False
        self._said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this is a fit: ``test(ckpt_path="best")`` restores callbacks, too."""
        self._evaluates = stage != "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new table for a new fit; a resumed one goes on with its own."""
        # Not the epoch: with a checkpoint saved at the end of validation it still is the round that was done.
        done = trainer.global_step
        self.rows = [row for row in self.rows if row["round"] <= done]
        self.clients = [row for row in self.clients if row["round"] <= done]

    def on_client_end(self, trainer: FederatedTrainer, round: int, stage: Stage, report: ClientReport) -> None:
        """Keep a client's own numbers, if asked to."""
        if self.per_client:
            row = {"round": round, "stage": stage, "client": report.client, "num_examples": report.num_examples}
            self.clients.append({**row, **self._metrics(report.metrics, _OF_CLIENTS)})

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Start the round's row."""
        self.rows.append({"round": round})
        self._take_round(metrics)

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        """Complete the round's row with what callbacks after this one added to the metrics."""
        self._take_round(trainer.round_metrics)

    def _take_round(self, metrics: Mapping[str, float]) -> None:
        found = self._metrics(metrics, _OF_ROUNDS)
        self.rows[-1].update(found)
        self._from_clients.update(found)

    def _metrics(self, logged: Mapping[str, T], columns: Sequence[str]) -> dict[str, T]:
        """Return what is logged, without names that are columns of the table."""
        taken = [name for name in columns if name in logged]
        if new := [name for name in taken if name not in self._said]:
            self._said.update(new)
            rank_zero_warn(
                f"History does not show the logged {', '.join(map(repr, new))}: it has a column of its own with that"
                " name. Log it under another."
            )
        return {name: value for name, value in logged.items() if name not in taken}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the server's validation to the round's row."""
        if self.rows and not trainer.sanity_checking and trainer.state.fn == "fit":
            # Of a name that clients logged, too, Lightning has the later value, which is that of the validation.
            self._from_clients -= logged_names(results_of(trainer))
            kept = {name: value for name, value in trainer.callback_metrics.items() if name not in self._from_clients}
            own = {name: float(value) for name, value in self._metrics(kept, _OF_ROUNDS).items()}
            self.rows[-1] = {**self.rows[-1], **own}

    def state_dict(self) -> dict[str, Any]:
        """Return the table, and which of its columns are the clients'."""
        rows, clients = (
            [{name: _plain(v) for name, v in row.items()} for row in table] for table in (self.rows, self.clients)
        )
        return {"rows": rows, "clients": clients, "from_clients": sorted(self._from_clients)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the table back in a fit; testing a checkpoint leaves that of the run alone."""
        if self._evaluates:
            return
        self.rows, self.clients = list(state_dict["rows"]), list(state_dict["clients"])
        self._from_clients = set(state_dict["from_clients"])

    @property
    def names(self) -> list[str]:
        """All metrics' names, sorted."""
        return sorted({name for row in self.rows for name in row} - {"round"})

    def __getitem__(self, name: str) -> list[float]:
        """One metric over the rounds that have it.

        Raises:
            KeyError: If no round has it; it names those there are.
        """
        if name not in self.names:
            raise KeyError(f"History has no {name!r}; it has {self.names}.")
        return [row[name] for row in self.rows if name in row]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table, one line a round."""
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["round", *self.names])
            writer.writeheader()
            writer.writerows(self.rows)

    def __str__(self) -> str:
        names = ["round", *self.names]
        return as_table([names, *([cell(row.get(name)) for name in names] for row in self.rows)])

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        names: Sequence[str] | str | None = None,
        x: str = "round",
    ) -> Figure:
        """Draw the curves, one panel a quantity: the clients' average and the server's own, side by side.

        Args:
            path: Where to save the picture, if anywhere.
            names: The metrics to draw, or one; by default all whose name speaks of a loss or an accuracy, else all.
            x: What they are drawn over: the rounds, or a metric, such as ``"time/virtual"`` (``DeviceSpeed``).

        Raises:
            KeyError: If no round has one of ``names``, or ``x``.
        """
        chosen = asked_for(names, [name for name in curves(self.names) if name != x])
        for name in {*chosen, x} - {"round"}:
            self[name]
        panels: dict[str, list[str]] = {}
        for name in chosen:
            panels.setdefault(_quantity(name), []).append(name)
        figure = new_figure(5.5 * max(1, len(panels)), 4)
        for i, (quantity, members) in enumerate(sorted(panels.items()), 1):
            axes = figure.add_subplot(1, len(panels), i)
            for name in members:
                rows = [row for row in self.rows if name in row and x in row]
                label = f"{name} ({'over clients' if name in self._from_clients else 'server'})"
                marker = "." if len(rows) < 50 else None
                axes.plot([row[x] for row in rows], [row[name] for row in rows], label=label, marker=marker)
            axes.set(title=f"{quantity} by {x}", xlabel=x, ylabel=quantity)
            number_ticks(axes.xaxis, whole=x == "round")
            number_ticks(axes.yaxis)
            axes.grid(alpha=0.3)
            axes.legend()
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def _plain(value: Any) -> Any:
    """Return what a callback added may be a number of NumPy or a tensor, which a checkpoint would not give back."""
    return value.item() if hasattr(value, "item") else value


def curves(names: list[str]) -> list[str]:
    """Return those that a picture shows: all whose name speaks of a loss or an accuracy, else all."""
    usual = [name for name in names if _quantity(name) in ("loss", "accuracy") and not name.endswith("_step")]
    return usual or names


def asked_for(names: Sequence[str] | str | None, usual: list[str]) -> list[str]:
    """Return what a picture shall show: the names that were given, or the usual ones."""
    if names is None:
        return usual
    return [names] if isinstance(names, str) else list(names)


def _quantity(name: str) -> str:
    last = name.rsplit("/", 1)[-1].lower()
    if "loss" in last:
        return "loss"
    return "accuracy" if "acc" in last else last

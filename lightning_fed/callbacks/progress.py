"""Progress: bars that show the round, the clients done of the cohort and the global metrics; or a line a round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from rich import get_console

from lightning_fed._compat.lightning import LightningRichBar, show_metrics
from lightning_fed.callbacks.base import ClientReport, FederatedCallback, Stage
from lightning_fed.errors import ClientError

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class RoundProgress(FederatedCallback):
    """What both bars share: a bar's length is the cohort, and a client's reply moves it."""

    _done = _total = 0
    _what = ""

    def on_round_start(self, trainer: FederatedTrainer, round: int, stage: Stage, cohort: Sequence[int]) -> None:
        """Start a bar for the cohort."""
        self._done, self._total = 0, len(cohort)
        of = f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""
        self._what = f"Round {round}{of} {'training' if stage == 'train' else 'evaluating'}"
        self.show(self._what, 0, len(cohort))

    def on_client_end(self, trainer: FederatedTrainer, round: int, stage: Stage, report: ClientReport) -> None:
        """Count a client that is done."""
        self._done += 1
        self.show(self._what, self._done)

    def on_client_error(self, trainer: FederatedTrainer, round: int, stage: Stage, error: ClientError) -> None:
        """Count a client that failed, and is done, too."""
        self._done += 1
        self.show(self._what, self._done)

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Fill the bar: those who had nothing to evaluate on are done, too."""
        if self._done < self._total:
            self.show(self._what, self._total)

    def show(self, what: str, done: int, total: int | None = None) -> None:
        """Draw ``done`` clients of ``total`` (unchanged if ``None``)."""
        raise NotImplementedError


class TQDMRoundBar(RoundProgress, TQDMProgressBar):
    """Lightning's TQDM bar with clients in place of batches."""

    def show(self, what: str, done: int, total: int | None = None) -> None:
        """See ``RoundProgress``."""
        bar = self.train_progress_bar
        if total is not None:
            bar.set_description(what, refresh=False)
            bar.reset(total)
        bar.n = done
        bar.refresh()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the round's metrics; the clients have moved the bar."""
        self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))


class RichRoundBar(RoundProgress, LightningRichBar):
    """Lightning's Rich bar with clients in place of batches."""

    def describe_round(self, current_epoch: int) -> str:
        """Return what stands before the bar."""
        return f"Round {current_epoch + 1}"  # until the cohort is known

    def show(self, what: str, done: int, total: int | None = None) -> None:
        """See ``RoundProgress``."""
        if self.progress is None or self.train_progress_bar_id is None:
            return
        changed: dict[str, Any] = {"completed": done}
        if total is not None:
            changed.update(total=total, description=what)
        self.progress.update(self.train_progress_bar_id, **changed)
        self.refresh()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the round's metrics; the clients have moved the bar."""
        show_metrics(self, trainer, pl_module)
        self.refresh()


class RoundPrinter(FederatedCallback, ProgressBar):
    """Prints a plain line a round, for a log file; the default where Rich cannot draw.

    Args:
        max_metrics: How many metrics a line shows at most.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[RoundPrinter(max_metrics=3)])
    """

    def __init__(self, max_metrics: int = 12) -> None:
        super().__init__()
        self.max_metrics = max_metrics
        self._enabled = True
        self._done: dict[Stage, list[int]] = {}
        self._of_clients: set[str] = set()
        self._own: dict[str, float] = {}
        self._began = 0.0

    def enable(self) -> None:
        """Let it print."""
        self._enabled = True

    def disable(self) -> None:
        """Let it print nothing."""
        self._enabled = False

    def on_round_start(self, trainer: FederatedTrainer, round: int, stage: Stage, cohort: Sequence[int]) -> None:
        """Begin a round, or its evaluation."""
        if stage == "train":
            self._done, self._own, self._began = {}, {}, time.monotonic()
        self._done[stage] = [0, len(cohort)]

    def on_client_end(self, trainer: FederatedTrainer, round: int, stage: Stage, report: ClientReport) -> None:
        """Count a client."""
        self._done[stage][0] += 1

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Keep the server's own metrics."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._of_clients.update(trainer.round_metrics)
            own = trainer.callback_metrics.items()
            self._own = {name: float(value) for name, value in own if name not in self._of_clients}

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Print the round."""
        if self._enabled:
            self.print(self.line(trainer), flush=True)

    def line(self, trainer: Any) -> str:
        """Return the line of the round that ends."""
        of = f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""
        doing = {"train": "trained", "evaluate": "evaluated"}
        counts = ", ".join(f"{done} of {total} {doing[stage]}" for stage, (done, total) in self._done.items())
        metrics = [f"{name} {value:.4g}" for name, value in {**trainer.round_metrics, **self._own}.items()]
        more = [f"{len(metrics) - self.max_metrics} more"] if len(metrics) > self.max_metrics else []
        seconds = f"{time.monotonic() - self._began:.1f} s"
        return "  ".join([f"Round {trainer.current_round}{of}: {counts}", seconds, *metrics[: self.max_metrics], *more])


def is_terminal() -> bool:
    """Return whether Rich can draw a bar where the program writes to: in a terminal, or by ipywidgets in a notebook."""
    console = get_console()
    draws = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    return draws and not console.is_dumb_terminal

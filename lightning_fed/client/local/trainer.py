"""A client's trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import Metric

from lightning_fed._compat.lightning import (
    loop_results,
    results_of,
    running_hook,
)
from lightning_fed._compat.quick_trainer import QuickTrainer
from lightning_fed.client.local.as_configured import AsConfigured, held_by
from lightning_fed.client.local.elapsed import TrainerInARun
from lightning_fed.client.local.fast_loop import use_fast_loops
from lightning_fed.client.local.isolation import LocalData
from lightning_fed.client.local.logged import LoggedValues, use_logged_values
from lightning_fed.client.local.shown import shown
from lightning_fed.client.local.work import LocalWork
from lightning_fed.values.data import gathering
from lightning_fed.values.metrics import MetricState, catch_later
from lightning_fed.views import overrides

# How many arguments of ``log`` may stand without a name: those before ``enable_graph``.
_IN_ORDER = 5


def how_logged(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return all that ``self.log`` was told besides the value."""
    return args, {name: value for name, value in kwargs.items() if name not in ("name", "value", "batch_size")}


class LocalTrainer(TrainerInARun, QuickTrainer):
    """A client's trainer. On a client ``self.trainer.current_round`` and ``self.trainer.client_id`` exist.

    Args:
        work: What the client works on.
        fast_dev_run: Whether the run is one, which the user's code may ask. That alone: Lightning's would end the fit.
        **kwargs: As ``Trainer``.

    Attributes:
        as_configured: Optimizers and schedulers as ``configure_optimizers`` gave them.
        personal: The module's names of the parameters that are the client's own, which do not travel.
        frozen: Of those that nobody trains, which do not travel, likewise.
    """

    callbacks: list[Callback]

    def __init__(self, work: LocalWork, fast_dev_run: int | bool = False, **kwargs: Any) -> None:
        self.task, self.loaders = work.task, work.loaders
        staying = work.options.staying
        self.personal, self.frozen = staying.personal_parameters, staying.frozen_parameters
        self.as_configured = AsConfigured()
        self._catch: tuple[Callable[[], list[MetricState]], list[Any]] | None = None
        self.computed: set[str] = set()
        self.module_metrics = [child for child in work.module.modules() if isinstance(child, Metric)]
        self.logs_its_way = overrides(work.module, LightningModule, "log")
        super().__init__(work.plan, work.task.round - 1, work.options.log_dir, **kwargs)
        self.fast_dev_run = fast_dev_run
        self._logs_fast = use_fast_loops(self)
        self.data: LocalData | None = None
        self.strategy.setup_optimizers = partial(self._set_up_optimizers, self.strategy.setup_optimizers)  # type: ignore[method-assign]
        self.strategy.process_dataloader = self._take  # type: ignore[assignment, method-assign]
        use_logged_values(self)

    def _take(self, loader: Any) -> Any:
        """Return what becomes of a loader that Lightning has asked for."""
        if self.data is not None:
            self.data.take(loader)
        return gathering(loader)

    def _set_up_optimizers(self, set_up: Any, trainer: Trainer) -> None:
        module = self.lightning_module
        self.as_configured.keep(module, held_by(module))
        set_up(trainer)
        self.as_configured.keep(module, [*self.optimizers, *(config.scheduler for config in self.lr_scheduler_configs)])

    def release(self, module: LightningModule) -> None:
        """Let go at once what is large: a trainer's reference cycles would keep it until a garbage collection."""
        self.task = replace(self.task, weights={}, state=None, received={}, memory={})
        self.callbacks.clear()
        module.zero_grad(set_to_none=True)
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def keep_logged(self, module: LightningModule) -> None:
        """Keep what was logged in the epoch that is just ending, before Lightning resets it."""
        self._catch = catch_later(self, module, self.computed), [*(results_of(self) or {}).values()]
        self.__dict__.pop("caught", None)

    @cached_property
    def caught(self) -> list[MetricState]:
        """What was logged in the epoch that ended last; but for the fit's last one nobody asks."""
        if self._catch is None:
            return []
        states, (unlogged, on_bar) = self._catch[0](), shown(self._catch[1])
        return [replace(s, logged=s.name not in unlogged, on_bar=s.name in on_bar) for s in states]

    def report(self, states: Sequence[MetricState]) -> None:
        """Report something of the fit's own beside what the module has logged."""
        self.caught += states

    @contextmanager
    def naming(self, is_computed: bool) -> Iterator[None]:
        """Note the names under which a log of the user's own, in the block, logs a value computed from a metric."""
        known = {*(results_of(self) or ())} if is_computed else set()
        yield
        if is_computed:
            self.computed.update(
                result.meta.name for key, result in (results_of(self) or {}).items() if key not in known
            )

    def log_again(self, module: Any, name: str, value: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Log in a training step what Lightning has checked before; ``False`` where it has not."""
        if not self._logs_fast or not self.training:
            return False
        values: LoggedValues = loop_results(self.fit_loop.epoch_loop)
        return values.log_again(module, name, value, how_logged(args, kwargs), kwargs.get("batch_size"))

    def remember_log(self, module: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Take note of what Lightning has checked."""
        special = any(kwargs.get(name) for name in ("enable_graph", "metric_attribute"))
        if self.training and len(args) <= _IN_ORDER and not special:
            values: LoggedValues = loop_results(self.fit_loop.epoch_loop)
            values.remember(module, running_hook(module), name, how_logged(args, kwargs))

    @property
    def current_round(self) -> int:
        """The round, from 1."""
        return self.task.round

    @property
    def client_id(self) -> int:
        """The client's index, from 0."""
        return self.task.client

    @property
    def sets_up(self) -> bool:
        """Whether this fit is the first to see the module, and sets it up."""
        return self.task.set_up

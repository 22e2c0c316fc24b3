"""The trainer of many vectorized clients, and the view under which it sees the module.

Hooks, loops, optimizers and schedulers are those of one local fit; the user's step runs under vmap, over the clients of
a ``Stack``. What cannot be done for all clients at once raises ``NotStackable``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torchmetrics import Metric

from lightning_fed._compat.lightning import ResultMetric, results_of, running_hook, set_running_hook
from lightning_fed.client.local.fast_loop import takes_index
from lightning_fed.client.local.method import begin, methods_among
from lightning_fed.client.local.run import LocalHooks
from lightning_fed.client.local.trainer import LocalTrainer
from lightning_fed.client.local.views import ClientView
from lightning_fed.client.local.work import LocalTask
from lightning_fed.client.vectorized.compiled_step import CompiledStep
from lightning_fed.client.vectorized.data import StackedBatch
from lightning_fed.client.vectorized.log import Entry, Logged, StackedLog
from lightning_fed.client.vectorized.optimization import StackedOptimization
from lightning_fed.client.vectorized.rng import NotStackable
from lightning_fed.client.vectorized.step_function import Here
from lightning_fed.client.vectorized.step_watch import StepWatch
from lightning_fed.client.vectorized.weights import Stack, clip_each_by_norm
from lightning_fed.values.metrics import MetricState
from lightning_fed.views import user_class

_Outcome = tuple[list[Tensor], list[Entry], list[Tensor]]


class CohortView(ClientView):
    """A module as many clients see it at once."""

    trainer: CohortTrainer
    _here: Here  # while a step is compiled

    def training_step(self, batch: list[StackedBatch], batch_idx: int) -> Tensor:
        # Each client's gradient is in its row of the gradient of the sum.
        totals = self.trainer.run_step("training_step", batch, batch_idx)
        return torch.stack(totals).sum() if len(totals) > 1 else totals[0]

    def validation_step(self, batch: list[StackedBatch], batch_idx: int) -> None:
        self.trainer.run_step("validation_step", batch, batch_idx)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            self._here.logged[name] = _number(value)
        else:
            self.trainer.note(name, value, args, kwargs)

    def _lightning_fed_log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log by Lightning's own ``log``, which checks the arguments."""
        LightningModule.log(self, name, value, *args, **kwargs)  # type: ignore[arg-type]


class CohortTrainer(LocalTrainer):
    """The trainer of many clients at once."""

    stack: Stack
    tasks: Sequence[LocalTask]
    compiled: CompiledStep | None = None
    is_trial = False

    _watches = False
    _noted: list[tuple[Entry, Tensor]] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps: dict[str, Any] = {}
        self._batch: Any = None
        self.fit_loop.epoch_loop.automatic_optimization.__class__ = StackedOptimization
        self.precision_plugin.clip_grad_by_norm = clip_each_by_norm  # type: ignore[method-assign]

    @property
    def client_id(self) -> int:
        """Raises:
        NotStackable: There are many clients.
        """
        raise NotStackable("it reads trainer.client_id")

    @property
    def train_dataloader(self) -> Any:
        """Raises:
        NotStackable: In a step: it is none of the clients' own.
        """
        self._refuse_in_step("train_dataloader")
        return super().train_dataloader

    @property
    def callback_metrics(self) -> Any:
        """Raises:
        NotStackable: In a step: they are none of the clients' own.
        """
        self._refuse_in_step("callback_metrics")
        return super().callback_metrics

    @property
    def global_step(self) -> int:
        """Raises:
        NotStackable: In a step of an evaluation: clients may have trained on more or fewer batches.
        """
        if not self.training:
            self._refuse_in_step("global_step")
        return super().global_step

    def _refuse_in_step(self, name: str) -> None:
        if self._noted is not None:
            raise NotStackable(f"it reads trainer.{name}")

    @cached_property
    def each_caught(self) -> list[list[MetricState]]:
        """What each client logged in the epoch that ended last; only of the last one anybody asks."""
        return self.stacked_log.of_last_epoch()

    @cached_property
    def stacked_log(self) -> StackedLog:
        """What the clients log in an epoch."""
        return StackedLog(self.stack.size, self._check)

    @cached_property
    def _watch(self) -> StepWatch:
        return StepWatch(self.stack, self.lightning_module)

    def _begin_watch(self) -> None:
        if not self._watches:
            self._watch.begin()
            self._watches = True

    def run_step(self, name: str, batch: list[StackedBatch], batch_idx: int) -> list[Tensor]:
        """Run the user's step for all clients, and log what it logs; give sums of their losses."""
        step = self._step(name)
        self._begin_watch()
        totals, logged = [], []
        for part in batch:
            total, entries, values = self._compiled(step, part, batch_idx) or self._mapped(step, part, batch_idx)
            totals += total
            logged.append(Logged(part.rows, entries, values))
            if self.is_trial:
                self._watch.check()
        self.stacked_log.add(logged)
        return totals

    def run_update(self, batch: list[StackedBatch], batch_idx: int) -> bool:
        """Run the user's training step and SGD's as one compiled one, where that can be done."""
        part, update, module = batch[0], self._optimization.update, self.lightning_module
        if self.compiled is None or part.rows is not None or not self.compiled.can_update(update):
            return False
        self._begin_watch()
        ran = self.compiled.run(self.stack, self._step("training_step"), part.batch, batch_idx, update)
        if ran is None:
            return False
        for parameter, gradient in ran.gradients:
            parameter.grad = gradient
        set_running_hook(module, "training_step")
        self.stacked_log.add([Logged(None, ran.entries, ran.values)])
        set_running_hook(module, None)
        return True

    @property
    def _optimization(self) -> StackedOptimization:
        optimization = self.fit_loop.epoch_loop.automatic_optimization
        assert isinstance(optimization, StackedOptimization)
        return optimization

    def _step(self, name: str) -> Any:
        """Return the user's step, as a function of module, batch and its index."""
        if name not in self._steps:
            function = getattr(user_class(self.lightning_module), name)
            self._steps[name] = function if takes_index(function) else partial(_without_index, function)
        return self._steps[name]

    def _mapped(self, step: Any, part: StackedBatch, batch_idx: int) -> _Outcome:
        module = self.lightning_module
        entries: list[Entry] = []

        def one(own: Any) -> list[Tensor]:
            self._batch, self._noted = own, []
            try:
                given, noted = step(module, own, batch_idx), self._noted
            finally:
                self._noted = None
            entries[:] = [entry for entry, _ in noted]
            loss = [_loss(given)] if self.training else []
            return [*loss, *(value for _, value in noted)]

        values = self.stack.call(one, part.batch, part.rows)
        if not self.training:
            return [], entries, values
        total = values.pop(0).sum()
        if self.compiled is not None and part.rows is None:
            self.compiled.learn(self.stack, part.batch, entries, total)
        return [total], entries, values

    def _compiled(self, step: Any, part: StackedBatch, batch_idx: int) -> _Outcome | None:
        if self.compiled is None or part.rows is not None or not self.training:
            return None
        if self.compiled.can_update(self._optimization.update):  # but this one has to run as written
            return None
        ran = self.compiled.run(self.stack, step, part.batch, batch_idx)
        if ran is None:
            return None
        is_taken = ran.are_apart and self._optimization.takes(ran.gradients)
        return [ran.loss if is_taken else ran.differentiable()], ran.entries, ran.values

    def note(self, name: str, value: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Take note of a call of ``self.log``.

        Raises:
            NotStackable: If it is not in a step, or logs a metric object.
        """
        if self._noted is None:
            raise NotStackable(f"it logs {name!r} outside of its step")
        if isinstance(value, Metric):
            raise NotStackable(f"it logs the torchmetrics object {name!r} in its step")
        size = kwargs.get("batch_size")
        entry = Entry(name, args, kwargs, extract_batch_size(self._batch) if size is None else size)
        self._noted.append((entry, _number(value)))

    def _check(self, entry: Entry, value: Tensor) -> ResultMetric:
        module: Any = self.lightning_module  # under the view of this file
        module._lightning_fed_log(entry.name, value, *entry.args, **{"batch_size": 1, **entry.kwargs})
        return results_of(self)[f"{running_hook(module)}.{entry.name}"]

    def _take(self, loader: Any) -> Any:
        return loader  # the clients' own, which it goes through, have been noted

    def release(self, module: LightningModule) -> None:
        """Do as ``LocalTrainer``, and restore the module's own weights."""
        super().release(module)
        self.stack.restore()
        self._optimization.release()
        self._batch, self.tasks = None, ()
        self.__dict__.pop("_watch", None)
        for loader in (self.loaders.train, self.loaders.val):
            if loader is not None:
                loader.release()

    def keep_logged(self, module: LightningModule) -> None:
        """Keep what each client logged in the epoch that is just ending.

        Raises:
            NotStackable: If the epoch's steps changed or drew what is not each client's own.
        """
        self._watch.check()
        self._watches = False
        self.stacked_log.end_epoch()
        self.__dict__.pop("each_caught", None)

    def report(self, states: Sequence[MetricState]) -> None:
        """Report it for each client."""
        for caught in self.each_caught:
            caught += states


def _without_index(step: Any, module: LightningModule, batch: Any, batch_idx: int) -> Any:
    return step(module, batch)


def _number(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))


def _loss(given: Any) -> Tensor:
    loss = given.get("loss") if isinstance(given, dict) else given
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise NotStackable(f"its training_step gives {type(loss).__name__} and not a loss")
    return loss.reshape(())


class CohortHooks(LocalHooks):
    """As ``LocalHooks``; installs the stacked weights once optimizers are made, and before anything else sees them."""

    def begin(self, trainer: LocalTrainer, module: LightningModule) -> None:
        """See ``LocalHooks``."""
        assert isinstance(trainer, CohortTrainer)
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            raise NotStackable("its ReduceLROnPlateau follows each client's own metric")
        begin(methods_among(trainer.callbacks), module, trainer.tasks)
        trainer.stack.install(trainer.optimizers, compiled=trainer.compiled is not None)

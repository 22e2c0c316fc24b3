"""Many clients' local fits as one Lightning fit over stacked weights: it knows the Trainer and not Flower.

Hooks, loops, optimizers and schedulers are those of one local fit; ``CohortView`` runs the user's step under vmap, over
the clients of a ``Stack``. What cannot be done for all clients at once raises ``NotStackable``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_fed.client.local_run import (
    LocalHooks,
    LocalOptions,
    LocalResult,
    build_trainer,
    call,
    let_go,
    local_run,
    start_at_epoch,
)
from lightning_fed.client.local_trainer import ClientView, LocalTask, LocalTrainer, how_logged
from lightning_fed.client.stack import NotStackable, Stack, clip_each_by_norm, share_weights
from lightning_fed.client.stacked_data import Part, StackedLoader
from lightning_fed.client.streams import Streams
from lightning_fed.data import ClientLoaders, count_examples
from lightning_fed.metrics import MetricState, catch_each, scalar
from lightning_fed.seeding import seed_for


@dataclass
class _Entry:
    """One call of ``self.log`` under vmap."""

    name: str
    value: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_size: int | None


class CohortView(ClientView):
    """A module as many clients see it at once."""

    trainer: CohortTrainer

    def training_step(self, batch: list[Part], batch_idx: int) -> Tensor:
        # Each client's gradient is in its row of the gradient of the sum.
        return torch.cat(self.trainer.run_step(super().training_step, batch, batch_idx)).sum()  # type: ignore[misc]

    def validation_step(self, batch: list[Part], batch_idx: int) -> None:
        self.trainer.run_step(super().validation_step, batch, batch_idx)  # type: ignore[misc]

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.trainer.note(name, value, args, kwargs)

    def log_once(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's own ``log``, which checks the arguments."""
        LightningModule.log(self, name, value, *args, **kwargs)  # type: ignore[arg-type]


class CohortTrainer(LocalTrainer):
    """The trainer of many clients at once."""

    stack: Stack

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.each_caught: list[list[MetricState]] = []
        self._log: list[_Entry] | None = None
        self._takes_index: bool | None = None
        self._logged: dict[str, tuple[Any, _ResultMetric]] = {}
        self.precision_plugin.clip_grad_by_norm = clip_each_by_norm  # type: ignore[method-assign]

    @property
    def client_id(self) -> int:
        """Raises:
        NotStackable: There are many clients.
        """
        raise NotStackable("it reads trainer.client_id")

    def run_step(self, step: Any, batch: list[Part], batch_idx: int) -> list[Tensor]:
        """Runs the user's step for all clients, and logs what it logs; gives its losses."""
        if self._takes_index is None:
            self._takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        takes_index = self._takes_index
        losses, logged = [], []
        for part in batch:
            names: list[_Entry] = []

            def one(own: Any, names: list[_Entry] = names) -> list[Tensor]:
                self._batch, self._log = own, []
                try:
                    given = step(own, batch_idx) if takes_index else step(own)
                finally:
                    names[:], self._log = self._log, None
                loss = [_loss(given)] if self.training else []
                return [*loss, *(_value(entry) for entry in names)]

            values = self.stack.call(one, part.batch, part.rows)
            if self.training:
                losses.append(values.pop(0))
            logged.append((part.rows, names, values))
        self._take_in(logged)
        return losses

    def note(self, name: str, value: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Takes note of a call of ``self.log``.

        Raises:
            NotStackable: If it is not in a step, or logs a metric object.
        """
        if self._log is None:
            raise NotStackable(f"it logs {name!r} outside of its step")
        if isinstance(value, Metric):
            raise NotStackable(f"it logs the torchmetrics object {name!r} in its step")
        size = kwargs.get("batch_size")
        self._log.append(_Entry(name, value, args, kwargs, extract_batch_size(self._batch) if size is None else size))

    def _take_in(self, logged: list[tuple[Tensor | None, list[_Entry], list[Tensor]]]) -> None:
        rows, first, values = logged[0]
        if rows is None:
            for entry, value in zip(first, values, strict=True):
                self._update(entry, value, entry.batch_size)
            return
        if any([e.name for e in names] != [e.name for e in first] for _, names, _ in logged):
            raise NotStackable("what it logs depends on the batch")
        for i, entry in enumerate(first):
            value, sizes = (
                torch.empty(self.stack.size, dtype=values[i].dtype, device=values[i].device),
                torch.empty(self.stack.size),
            )
            for rows, names, own in logged:
                value[rows], sizes[rows] = own[i].detach(), float(names[i].batch_size or 1)
            self._update(entry, value, sizes.to(value.device))

    def _update(self, entry: _Entry, value: Tensor, batch_size: Any) -> None:
        if value.dim() != 1:
            raise NotStackable(f"it logs {entry.name!r} with more than one number")
        how = how_logged(entry.args, entry.kwargs)
        known, result = self._logged.get(entry.name, (None, None))
        if result is None or known != how:
            self.lightning_module.log_once(  # type: ignore[operator]
                entry.name, value[0].detach(), *entry.args, **{"batch_size": 1, **entry.kwargs}
            )
            hook = self.lightning_module._current_fx_name
            assert self._results is not None
            result = _stacked(self._results[f"{hook}.{entry.name}"], value)
            self._logged[entry.name] = how, result
        result.update(value.detach(), batch_size)

    def keep_logged(self, module: LightningModule) -> None:
        """Keeps what each client logged in the epoch that is just ending."""
        self.each_caught = catch_each([result for _, result in self._logged.values()], self.stack.size)
        self._logged = {}


def _loss(given: Any) -> Tensor:
    loss = given.get("loss") if isinstance(given, dict) else given
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise NotStackable(f"its training_step gives {type(loss).__name__} and not a loss")
    return loss.reshape(())


def _value(entry: _Entry) -> Tensor:
    return entry.value.detach() if isinstance(entry.value, Tensor) else torch.tensor(float(entry.value))


def _stacked(result: _ResultMetric, like: Tensor) -> _ResultMetric:
    """A result metric like Lightning's, with a value for each client."""
    stacked = _ResultMetric(result.meta, is_tensor=True)
    stacked.value = stacked.value.to(like.device).expand(len(like)).clone()
    return stacked


class CohortHooks(LocalHooks):
    """As ``LocalHooks``; puts the stacked weights on once optimizers are made, and before anything else sees them."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, CohortTrainer)
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            raise NotStackable("its ReduceLROnPlateau follows each client's own metric")
        trainer.stack.put_on(trainer.optimizers)
        super().on_train_start(trainer, pl_module)


def vectorized_fit(
    module: LightningModule,
    datamodule: LightningDataModule | None,
    loaders: Sequence[ClientLoaders],
    tasks: Sequence[LocalTask],
    options: LocalOptions,
    draws: bool,
) -> list[LocalResult]:
    """Trains clients with equally many batches as one; else as ``local_fit``.

    Args:
        module: As in ``local_fit``.
        datamodule: As in ``local_fit``.
        loaders: Each client's data.
        tasks: Each client's task, of one round.
        options: As in ``local_fit``.
        draws: Whether steps draw random numbers, as Dropout does.

    Raises:
        NotStackable: If it cannot be done; the module is as it was.
    """
    first_epoch = options.first_epoch(tasks[0].round)
    callbacks: list[Callback] = [CohortHooks(options, first_epoch), *options.method_callbacks()]
    with local_run(module, datamodule, tasks[0], "train", CohortView):
        trainer = _cohort_trainer(module, loaders, tasks, options, callbacks, "train", draws)
        start_at_epoch(trainer, first_epoch)
        try:
            call(trainer.fit, trainer, module, datamodule, train=True)
            weights = trainer.stack.results()
        finally:
            let_go(trainer, module)
            trainer.stack.take_off()
        return [
            LocalResult(own, int(one.num_examples or 0), _scalars(states), states)
            for own, one, states in zip(weights, loaders, trainer.each_caught, strict=True)
        ]


def vectorized_evaluate(
    module: LightningModule,
    datamodule: LightningDataModule | None,
    loaders: Sequence[ClientLoaders],
    tasks: Sequence[LocalTask],
    options: LocalOptions,
    draws: bool,
) -> list[LocalResult]:
    """Validates clients with equally many batches as one; takes the arguments of ``vectorized_fit``.

    Raises:
        NotStackable: If it cannot be done, or the clients have not been sent the same weights.
    """
    if not share_weights([task.weights for task in tasks]):
        raise NotStackable("clients evaluate weights of their own")
    with local_run(module, datamodule, tasks[0], "evaluate", CohortView):
        trainer = _cohort_trainer(module, loaders, tasks, options, [LocalHooks(options, 0)], "evaluate", draws)
        start_at_epoch(trainer, options.first_epoch(tasks[0].round + 1) - 1)
        call(trainer.validate, trainer, module, datamodule, train=False)
        return [
            LocalResult({}, count_examples(one.val) or 0, _scalars(states), states)
            for one, states in zip(loaders, trainer.each_caught, strict=True)
        ]


def _cohort_trainer(
    module: LightningModule,
    loaders: Sequence[ClientLoaders],
    tasks: Sequence[LocalTask],
    options: LocalOptions,
    callbacks: Sequence[Callback],
    stage: str,
    draws: bool,
) -> CohortTrainer:
    trainer = build_trainer(tasks[0], ClientLoaders(), module, options, callbacks, stage != "train", CohortTrainer)
    assert isinstance(trainer, CohortTrainer)
    seeds = [seed_for(task.seed, stage, round=task.round, client=task.client) for task in tasks]
    streams = Streams(seeds, trainer.strategy.root_device)
    trainer.stack = Stack(module, [task.weights for task in tasks], streams, draws)
    if stage == "train":
        trainer.loaders.train = StackedLoader([one.train for one in loaders], streams)
    else:
        trainer.loaders.val = StackedLoader([one.val for one in loaders], streams)
    return trainer


def _scalars(states: list[MetricState]) -> dict[str, float]:
    values = {state.name: scalar(state) for state in states}
    return {name: value for name, value in values.items() if value is not None}

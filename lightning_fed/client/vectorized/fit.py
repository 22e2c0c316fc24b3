"""Many clients' local fits as one Lightning fit over stacked weights: it knows the Trainer and not Flower."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lightning_fed.client.local.elapsed import stand_after, start_at_epoch
from lightning_fed.client.local.examples import examples_in
from lightning_fed.client.local.isolation import LocalData
from lightning_fed.client.local.run import (
    LocalHooks,
    LocalOptions,
    LocalResult,
    build_trainer,
    call,
    local_run,
)
from lightning_fed.client.local.trainer import LocalTask
from lightning_fed.client.vectorized.compiled_step import CompiledStep
from lightning_fed.client.vectorized.data import StackedLoader
from lightning_fed.client.vectorized.rng import NotStackable, Streams
from lightning_fed.client.vectorized.trainer import CohortHooks, CohortTrainer, CohortView
from lightning_fed.client.vectorized.weights import Stack, share_weights
from lightning_fed.values.data import ClientLoaders
from lightning_fed.values.metrics import MetricState, scalar


@dataclass
class StackOptions:
    """How clients are run vectorized.

    Attributes:
        draws: Whether their steps draw random numbers, as Dropout does.
        compiled: The module's compiled training step, or ``None``.
        is_trial: Whether to look for draws that are nobody's own, and for attributes that a step sets.
    """

    draws: bool = False
    compiled: CompiledStep | None = None
    is_trial: bool = False


def vectorized_fit(
    module: LightningModule,
    datamodule: LightningDataModule | None,
    loaders: Sequence[ClientLoaders],
    tasks: Sequence[LocalTask],
    options: LocalOptions,
    how: StackOptions,
) -> list[LocalResult]:
    """Trains clients with equally many batches as one stacked model; else as ``local_fit``.

    Args:
        module: As in ``local_fit``.
        datamodule: As in ``local_fit``.
        loaders: Each client's data.
        tasks: Each client's task, of one round.
        options: As in ``local_fit``.
        how: How they are run.

    Raises:
        NotStackable: If it cannot be done; the module is as it was.
    """
    first_epoch = options.first_epoch(tasks[0].round)
    callbacks: list[Callback] = [CohortHooks(options, first_epoch), *options.method_callbacks()]
    with local_run(module, datamodule, tasks[0], options, "train", CohortView) as data:
        trainer = _cohort_trainer(module, loaders, tasks, options, callbacks, "train", how, data)
        trainer.compiled = how.compiled
        start_at_epoch(trainer, first_epoch)
        try:
            with nullcontext() if how.compiled is None else how.compiled.configured():
                call(trainer.fit, trainer, module, datamodule, train=True)
            trainer.stack.streams.check()
            weights = trainer.stack.results()
        finally:
            trainer.let_go(module)
        counts = [examples_in(one.train, trainer.num_training_batches) or 0 for one in loaders]
        return [
            LocalResult(own, count, _scalars(states), states)
            for own, count, states in zip(weights, counts, trainer.each_caught, strict=True)
        ]


def vectorized_evaluate(
    module: LightningModule,
    datamodule: LightningDataModule | None,
    loaders: Sequence[ClientLoaders],
    tasks: Sequence[LocalTask],
    options: LocalOptions,
    how: StackOptions,
) -> list[LocalResult]:
    """Validates clients with equally many batches as one stacked model; takes the arguments of ``vectorized_fit``.

    Raises:
        NotStackable: If it cannot be done, or the clients have not been sent the same weights.
    """
    if not share_weights([task.weights for task in tasks]):
        raise NotStackable("clients evaluate weights of their own")
    with local_run(module, datamodule, tasks[0], options, "evaluate", CohortView) as data:
        trainer = _cohort_trainer(module, loaders, tasks, options, [LocalHooks(options, 0)], "evaluate", how, data)
        stand_after(trainer, module, tasks[0].round, loaders[0].train)
        call(trainer.validate, trainer, module, datamodule, train=False)
        trainer.let_go(module)
        (batches,) = trainer.validate_loop.max_batches
        return [
            LocalResult({}, examples_in(one.val, batches) or 0, _scalars(states), states)
            for one, states in zip(loaders, trainer.each_caught, strict=True)
        ]


def _cohort_trainer(
    module: LightningModule,
    loaders: Sequence[ClientLoaders],
    tasks: Sequence[LocalTask],
    options: LocalOptions,
    callbacks: Sequence[Callback],
    stage: str,
    how: StackOptions,
    data: LocalData,
) -> CohortTrainer:
    trainer = build_trainer(tasks[0], ClientLoaders(), module, options, callbacks, stage != "train", CohortTrainer)
    assert isinstance(trainer, CohortTrainer)
    trainer.is_trial = how.is_trial
    seeds = [task.seed_of(stage)("") for task in tasks]
    streams = Streams(seeds, trainer.strategy.root_device)
    trainer.stack = Stack(module, [task.weights for task in tasks], streams, how.draws)
    own = [one.train if stage == "train" else one.val for one in loaders]
    for client, (loader, task) in enumerate(zip(own, tasks, strict=True)):
        snapshot = data.take(loader, task.seed_of(stage))
        if snapshot.seeds_itself:
            raise NotStackable("its transforms are seeded by a method of their own")
        streams.hold(client, snapshot.generators)
    setattr(trainer.loaders, "train" if stage == "train" else "val", StackedLoader(own, streams))
    return trainer


def _scalars(states: list[MetricState]) -> dict[str, float]:
    values = {state.name: scalar(state) for state in states}
    return {name: value for name, value in values.items() if value is not None}

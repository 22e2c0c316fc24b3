"""Many clients' local fits as one Lightning fit over stacked weights: it knows the Trainer and not Flower."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from lightning.pytorch import Callback

from lightning_fed.client.local.elapsed import stand_after, start_at_epoch
from lightning_fed.client.local.examples import examples_in
from lightning_fed.client.local.isolation import LocalData
from lightning_fed.client.local.method import ended, methods_among
from lightning_fed.client.local.run import (
    LocalHooks,
    LocalResult,
    build_trainer,
    call,
    local_run,
)
from lightning_fed.client.local.work import LocalWork
from lightning_fed.client.vectorized.compiled_step import CompiledStep
from lightning_fed.client.vectorized.data import StackedLoader
from lightning_fed.client.vectorized.rng import NotStackable, Streams
from lightning_fed.client.vectorized.trainer import CohortHooks, CohortTrainer, CohortView
from lightning_fed.client.vectorized.weights import Stack
from lightning_fed.values.data import ClientLoaders
from lightning_fed.values.metrics import MetricState, scalar
from lightning_fed.values.weights import share_weights


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


def vectorized_fit(works: Sequence[LocalWork], how: StackOptions) -> list[LocalResult]:
    """Train clients with equally many batches as one stacked model; else as ``local_fit``.

    Args:
        works: What each client works on, in one round; they differ in loaders and task alone.
        how: How they are run.

    Raises:
        NotStackable: If it cannot be done; the module is as it was.
    """
    work = _of_all(works)
    callbacks: list[Callback] = [CohortHooks(work.options, work.first_epoch), *work.options.method_callbacks()]
    with local_run(work, "train", CohortView) as data:
        trainer = _cohort_trainer(work, works, callbacks, "train", how, data)
        trainer.compiled = how.compiled
        start_at_epoch(trainer, work.first_epoch)
        try:
            with nullcontext() if how.compiled is None else how.compiled.configured():
                call(trainer, work, "fit")
            trainer.stack.streams.check()
            weights = trainer.stack.results()
        finally:
            trainer.release(work.module)
        counts = [examples_in(one.loaders.train, trainer.num_training_batches) or 0 for one in works]
        kept = ended(methods_among(callbacks), len(works))
        return [
            LocalResult(own, count, _scalars(states), states, sent=sent, memory=memory)
            for own, count, states, (sent, memory) in zip(weights, counts, trainer.each_caught, kept, strict=True)
        ]


def vectorized_evaluate(works: Sequence[LocalWork], how: StackOptions) -> list[LocalResult]:
    """Validate clients with equally many batches as one stacked model; arguments as ``vectorized_fit``.

    Raises:
        NotStackable: If it cannot be done, or the clients have not been sent the same weights.
    """
    if not share_weights([one.task.weights for one in works]):
        raise NotStackable("clients evaluate weights of their own")
    work = _of_all(works)
    with local_run(work, "evaluate", CohortView) as data:
        trainer = _cohort_trainer(work, works, [LocalHooks(work.options, 0)], "evaluate", how, data)
        stand_after(trainer, work.module, work.task.round, works[0].loaders.train)
        call(trainer, work, "validate")
        trainer.release(work.module)
        (batches,) = trainer.validate_loop.max_batches
        return [
            LocalResult({}, examples_in(one.loaders.val, batches) or 0, _scalars(states), states)
            for one, states in zip(works, trainer.each_caught, strict=True)
        ]


def _of_all(works: Sequence[LocalWork]) -> LocalWork:
    """Return what the clients work on as one: the first one's task, and loaders that are yet to be stacked."""
    return replace(works[0], loaders=ClientLoaders())


def _cohort_trainer(
    work: LocalWork,
    works: Sequence[LocalWork],
    callbacks: Sequence[Callback],
    stage: str,
    how: StackOptions,
    data: LocalData,
) -> CohortTrainer:
    trainer = build_trainer(CohortTrainer, work, callbacks, validates=stage == "evaluate")
    trainer.is_trial = how.is_trial
    seeds = [one.task.seed_of(stage)("") for one in works]
    streams = Streams(seeds, trainer.strategy.root_device)
    trainer.tasks = [one.task for one in works]
    trainer.stack = Stack(work.module, [one.task.weights for one in works], streams, how.draws)
    own = [one.loaders.train if stage == "train" else one.loaders.val for one in works]
    for client, (loader, one) in enumerate(zip(own, works, strict=True)):
        snapshot = data.take(loader, one.task.seed_of(stage))
        if snapshot.seeds_itself:
            raise NotStackable("its transforms are seeded by a method of their own")
        streams.hold(client, snapshot.generators)
    if stage == "train":
        work.loaders.train = StackedLoader(own, streams)
    else:
        work.loaders.val = StackedLoader(own, streams)
    return trainer


def _scalars(states: list[MetricState]) -> dict[str, float]:
    values = {state.name: scalar(state) for state in states}
    return {name: value for name, value in values.items() if value is not None}

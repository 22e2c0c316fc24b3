"""One client's work as a real Lightning fit: it knows the Trainer and not Flower."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fed.client.local.catch_up import left_behind
from lightning_fed.client.local.elapsed import stand_after, start_at_epoch
from lightning_fed.client.local.examples import CountExamples, examples_in, nothing_to_train_on
from lightning_fed.client.local.fit_state import FitState
from lightning_fed.client.local.isolation import quiet, restoring
from lightning_fed.client.local.method import ended, methods_among
from lightning_fed.client.local.run import (
    Called,
    LocalHooks,
    LocalResult,
    build_trainer,
    call,
    explain_monitor,
    local_run,
    logged_numbers,
    restore_optimizers,
)
from lightning_fed.client.local.trainer import LocalTrainer
from lightning_fed.client.local.views import ClientDataView, ClientView, TestView, client_view
from lightning_fed.client.local.work import LocalWork
from lightning_fed.seeding import seed_for, seeded
from lightning_fed.state.snapshot import DataSnapshot
from lightning_fed.values import weights
from lightning_fed.views import viewed_as


def set_up(work: LocalWork) -> None:
    """Set the module up in a process that has no server, in a fit of no epochs.

    Apart from local fits: what building draws must not shift a fit's draws, and what is built must stay.
    """
    module, datamodule = work.module, work.datamodule
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if datamodule is not None:
            stack.enter_context(restoring([DataSnapshot({"datamodule": datamodule})]))
            stack.enter_context(viewed_as(datamodule, ClientDataView))
        stack.enter_context(viewed_as(module, client_view(module)))
        stack.enter_context(seeded(seed_for(work.task.seed, "setup")))
        bare = replace(work, task=replace(work.task, set_up=True), options=replace(work.options, callbacks=()))
        trainer = build_trainer(LocalTrainer, bare, [])
        stack.callback(restore_optimizers, module)
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 0, -1
        call(trainer, bare, "fit")
        trainer.release(module)
    module.trainer = None


def local_fit(work: LocalWork) -> LocalResult:
    """Train the module on one client's data, from the round's weights, and leave it as it was but for its weights.

    Args:
        work: What the client works on.

    Raises:
        ClientError: If the client has no batch to train on, or a scheduler monitors what clients do not log.
    """
    if examples_in(work.loaders.train) == 0:
        raise nothing_to_train_on(work.loaders.train)
    hooks = LocalHooks(work.options, work.first_epoch)
    result, state = _trained(work, hooks)
    if hooks.hand_steps is not None and hooks.hand_steps.misled(state.by_hand):
        # Now it is known how the user's code steps schedules: once more, from the right place.
        rates = FitState.load(work.task.state).rates
        again = replace(work.task, state=FitState(by_hand=state.by_hand, rates=rates).dump())
        return local_fit(replace(work, task=again))
    return result


def _trained(work: LocalWork, hooks: LocalHooks) -> tuple[LocalResult, FitState]:
    """Return what one fit gives, and what it leaves to the client's next one."""
    module, loaders, counter = work.module, work.loaders, CountExamples()
    of_methods = work.options.method_callbacks()
    callbacks: list[Callback] = [hooks, *of_methods]
    if examples_in(loaders.train) is None:
        callbacks.append(counter)
    with local_run(work, "train") as data:
        trainer = build_trainer(LocalTrainer, work, callbacks)
        trainer.data = data
        start_at_epoch(trainer, work.first_epoch)
        try:
            call(trainer, work, "fit")
        except MisconfigurationException as error:
            raise explain_monitor(error, trainer) or error from None
        state = left_behind(trainer, work.options.client_state, hooks.hand_steps)
        notes: list[str] = []
        if hooks.hand_rates is not None:
            state.rates, notes = hooks.hand_rates.left(), hooks.hand_rates.notes
        trainer.release(module)
        examples = examples_in(loaders.train, trainer.num_training_batches) or counter.count
        if not examples or trainer.limit_train_batches == 0:
            raise nothing_to_train_on(trainer.train_dataloader, trainer.limit_train_batches)
        [(sent, memory)] = ended(methods_among(callbacks))
        return LocalResult(
            weights.read(module),
            examples,
            logged_numbers(trainer),
            trainer.caught,
            state.dump(),
            trainer.task.callback_states,
            notes,
            sent,
            memory,
            callbacks=of_methods,
        ), state


def local_evaluate(work: LocalWork) -> LocalResult:
    """Validate the round's weights on one client's held-out data; ``num_examples`` is 0 where it has none.

    Args:
        work: What the client works on.
    """
    return _evaluated(work, "validate", "evaluate") if work.loaders.has_val() else LocalResult({}, 0, {}, [])


def local_test(work: LocalWork, limit: int | float | None) -> LocalResult:
    """Test a client's weights on its own test data; ``num_examples`` is 0 where that has no batch.

    Args:
        work: What the client works on; its ``loaders.val`` are those with the test data, unless it has a datamodule.
        limit: As a Trainer's ``limit_test_batches``.
    """
    return _evaluated(work, "test", "test", TestView, limit_test_batches=limit)


def _evaluated(
    work: LocalWork, what: Called, purpose: str, view: type[ClientView] | None = None, **limits: int | float | None
) -> LocalResult:
    loaders, counter = work.loaders, CountExamples()
    callbacks: list[Callback] = [LocalHooks(work.options, 0)]
    if examples_in(loaders.val) is None:
        callbacks.append(counter)
    with local_run(work, purpose, view) as data:
        trainer = build_trainer(LocalTrainer, work, callbacks, validates=True, **limits)
        trainer.data = data
        stand_after(trainer, work.module, work.task.round, loaders.train)
        call(trainer, work, what)
        trainer.release(work.module)
        loop = trainer.test_loop if what == "test" else trainer.validate_loop
        examples = examples_in(loaders.val, sum(loop.max_batches)) or counter.count
        return LocalResult({}, examples, logged_numbers(trainer), trainer.caught)

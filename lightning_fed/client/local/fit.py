"""One client's work as a real Lightning fit: it knows the Trainer and not Flower."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fed.client.local.catch_up import left_behind
from lightning_fed.client.local.elapsed import stand_after, start_at_epoch
from lightning_fed.client.local.examples import CountExamples, examples_in, nothing_to_train_on
from lightning_fed.client.local.fit_state import FitState
from lightning_fed.client.local.isolation import put_back, quiet
from lightning_fed.client.local.run import (
    LocalHooks,
    LocalOptions,
    LocalResult,
    build_trainer,
    call,
    explain_monitor,
    local_run,
    put_back_optimizers,
    scalars,
)
from lightning_fed.client.local.trainer import LocalTask
from lightning_fed.client.local.views import ClientDataView, client_view
from lightning_fed.seeding import seed_for, seeded
from lightning_fed.state.snapshot import DataSnapshot
from lightning_fed.values import weights
from lightning_fed.values.data import ClientLoaders
from lightning_fed.views import laid_over


def set_up(
    module: LightningModule,
    datamodule: LightningDataModule | None,
    loaders: ClientLoaders,
    task: LocalTask,
    options: LocalOptions,
) -> None:
    """Sets the module up in a process that has no server, in a fit of no epochs; takes the arguments of ``local_fit``.

    Apart from local fits: what building draws must not shift a fit's draws, and what is built must stay.
    """
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if datamodule is not None:
            stack.enter_context(put_back([DataSnapshot({"datamodule": datamodule})]))
            stack.enter_context(laid_over(datamodule, ClientDataView))
        stack.enter_context(laid_over(module, client_view(module)))
        stack.enter_context(seeded(seed_for(task.seed, "setup")))
        bare = replace(options, callbacks=())
        trainer = build_trainer(replace(task, set_up=True), loaders, module, bare, [])
        stack.callback(put_back_optimizers, module)
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 0, -1
        call(trainer.fit, trainer, module, datamodule, train=True)
        trainer.let_go(module)
    module.trainer = None


def local_fit(
    module: LightningModule,
    datamodule: LightningDataModule | None,
    loaders: ClientLoaders,
    task: LocalTask,
    options: LocalOptions,
) -> LocalResult:
    """Trains ``module`` on one client's data, from the round's weights, and leaves it as it was but for its weights.

    Args:
        module: The module; the server's own within one process.
        datamodule: The server's datamodule, whose hooks apply to the client's batches, or ``None``.
        loaders: The client's data.
        task: Client, round, seed and weights.
        options: What all local fits have in common.

    Raises:
        ClientError: If the client has no batch to train on, or a scheduler monitors what clients do not log.
    """
    known, counter = examples_in(loaders.train), CountExamples()
    if known == 0:
        raise nothing_to_train_on(loaders.train)
    first_epoch = options.first_epoch(task.round)
    hooks = LocalHooks(options, first_epoch)
    callbacks: list[Callback] = [hooks, *options.method_callbacks()]
    if known is None:
        callbacks.append(counter)
    with local_run(module, datamodule, task, options, "train", own=loaders.datamodule) as data:
        trainer = build_trainer(task, loaders, module, options, callbacks, datamodule=datamodule)
        trainer.data = data
        start_at_epoch(trainer, first_epoch)
        try:
            call(trainer.fit, trainer, module, datamodule, train=True)
        except MisconfigurationException as error:
            raise explain_monitor(error, trainer) or error from None
        state = left_behind(trainer, options.client_state, hooks.hand_steps)
        notes: list[str] = []
        if hooks.hand_rates is not None:
            state.rates, notes = hooks.hand_rates.left(), hooks.hand_rates.notes
        trainer.let_go(module)
        examples = examples_in(loaders.train, trainer.num_training_batches) or counter.count
        if not examples or trainer.limit_train_batches == 0:
            raise nothing_to_train_on(trainer.train_dataloader, trainer.limit_train_batches)
        kept = state.dump(), trainer.task.callback_states
        result = LocalResult(weights.read(module), examples, scalars(trainer), trainer.caught, *kept, notes)
    if hooks.hand_steps is not None and hooks.hand_steps.misled(state.by_hand):
        # Now it is known how the user's code steps schedules: once more, from the right place.
        rates = FitState.load(task.state).rates
        again = replace(task, state=FitState(by_hand=state.by_hand, rates=rates).dump())
        return local_fit(module, datamodule, loaders, again, options)
    return result


def local_evaluate(
    module: LightningModule,
    datamodule: LightningDataModule | None,
    loaders: ClientLoaders,
    task: LocalTask,
    options: LocalOptions,
) -> LocalResult:
    """Validates the round's weights on one client's held-out data; ``num_examples`` is 0 where it has none.

    Takes the arguments of ``local_fit``.
    """
    if not loaders.has_val():
        return LocalResult({}, 0, {}, [])
    callbacks: list[Callback] = [LocalHooks(options, 0)]
    counter = CountExamples()
    if examples_in(loaders.val) is None:
        callbacks.append(counter)
    with local_run(module, datamodule, task, options, "evaluate", own=loaders.datamodule) as data:
        trainer = build_trainer(task, loaders, module, options, callbacks, validates=True, datamodule=datamodule)
        trainer.data = data
        stand_after(trainer, module, task.round, loaders.train)
        call(trainer.validate, trainer, module, datamodule, train=False)
        trainer.let_go(module)
        examples = examples_in(loaders.val, sum(trainer.validate_loop.max_batches)) or counter.count
        return LocalResult({}, examples, scalars(trainer), trainer.caught)

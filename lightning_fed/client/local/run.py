"""What all local runs of clients have in common: options, hooks, trainer, and what is restored at the end."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_fed._compat.lightning import trainer_of
from lightning_fed.client.local.catch_up import catch_up
from lightning_fed.client.local.fit_state import FitState
from lightning_fed.client.local.hand_rates import HandRates, finetunes
from lightning_fed.client.local.hand_steps import HandSteps
from lightning_fed.client.local.isolation import (
    LocalData,
    quiet,
    restore_handlers,
    restoring,
    signal_handlers,
)
from lightning_fed.client.local.method import begin, methods_among
from lightning_fed.client.local.own_callbacks import CallbackStates, keeps_state, own_copies
from lightning_fed.client.local.trainer import LocalTrainer
from lightning_fed.client.local.views import BuildingClientView, ClientDataView, ClientView, OwnDataView, client_view
from lightning_fed.client.local.work import LocalOptions, LocalWork
from lightning_fed.errors import ClientError
from lightning_fed.seeding import seed_all
from lightning_fed.state.snapshot import DataSnapshot
from lightning_fed.values import weights
from lightning_fed.values.metrics import MetricState
from lightning_fed.values.weights import Weights
from lightning_fed.views import viewed_as

Kind = TypeVar("Kind", bound=LocalTrainer)
# What a client's trainer is called for.
Called = Literal["fit", "validate", "test"]


@dataclass
class LocalResult:
    """What came of it.

    Attributes:
        weights: The client's own copy.
        num_examples: What its loaders yield in an epoch.
        numbers: The numbers that it logged, by name.
        metrics: The states of all that it logged.
        state: What it keeps of optimizers and schedulers.
        callback_states: What it keeps of its callbacks.
        notes: What is to be said to the user.
        sent: What goes to the server's methods, by ``"method/name"``.
        memory: What it keeps of its methods, likewise.
        own: The weights of the second model that it keeps.
        callbacks: Those that methods had in the fit.
    """

    weights: Weights
    num_examples: int
    numbers: dict[str, float]
    metrics: list[MetricState]
    state: bytes | None = None
    callback_states: bytes | None = None
    notes: list[str] = field(default_factory=list)
    sent: Weights = field(default_factory=dict)
    memory: Weights = field(default_factory=dict)
    own: Weights = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()


class LocalHooks(Callback):
    """What a local fit does at Lightning's hooks, besides the user's own.

    Attributes:
        hand_steps: Counts how the module steps schedules by hand, where that has to be known.
        hand_rates: Watches learning rates that are set by hand, where the next fit does not know them.
    """

    hand_steps: HandSteps | None = None
    hand_rates: HandRates | None = None

    def __init__(self, options: LocalOptions, first_epoch: int) -> None:
        self.options, self.first_epoch = options, first_epoch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, LocalTrainer)
        self._refuse_unfrozen(pl_module)
        self.begin(trainer, pl_module)
        kept = FitState.load(trainer.task.state)
        self.hand_steps = catch_up(trainer, self.options.client_state, kept)
        if self.options.client_state == "global" and trainer.plan.rounds != 1 and not finetunes(trainer):
            self.hand_rates = HandRates(trainer, kept.rates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_unfrozen(pl_module)

    def _refuse_unfrozen(self, module: LightningModule) -> None:
        """Check that nothing trains of which the next client gets the values of the run's start."""
        frozen = self.options.staying.frozen_parameters
        for name, parameter in module.named_parameters() if frozen else ():
            if parameter.requires_grad and name in frozen:
                raise ClientError(
                    f"trains {name!r}, which was frozen when the run began, so with TrainableOnly() it does not travel."
                    " Let it stay frozen, unfreeze it before fit, or leave TrainableOnly out.",
                    tensor=name,
                )

    def begin(self, trainer: LocalTrainer, module: LightningModule) -> None:
        """Give methods what they begin with; optimizers are made, and nobody else has seen the module yet."""
        begin(methods_among(trainer.callbacks), module, [trainer.task])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = self.options.epochs_of(getattr(trainer, "current_round"))  # noqa: B009
        if epochs and trainer.current_epoch + 1 == self.first_epoch + epochs:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, LocalTrainer)
        if trainer.validating and trainer.state.fn == "validate":
            trainer.keep_logged(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, LocalTrainer)
        trainer.keep_logged(pl_module)


def logged_numbers(trainer: LocalTrainer) -> dict[str, float]:
    """Return the client's own values of what it logged in the run's last epoch; not of its local validation."""
    names = {state.name for state in trainer.caught}
    return {name: float(v) for name, v in trainer.callback_metrics.items() if name in names and v.numel() == 1}


def build_trainer(
    kind: type[Kind], work: LocalWork, callbacks: Sequence[Callback], validates: bool = False, **limits: Any
) -> Kind:
    """Return a trainer of a ``kind`` for one local run, with ``callbacks`` before the user's own.

    Args:
        kind: Its class.
        work: What the client works on.
        callbacks: The run's own.
        validates: Whether the run is an evaluation.
        **limits: Arguments of a Trainer, beside those that the user gave for clients.
    """
    options = work.options
    callbacks = [*callbacks, *own_copies(options.callbacks, work.module, work.datamodule)]
    if stateful := [callback for callback in callbacks if keeps_state(callback)]:
        callbacks.append(CallbackStates(stateful))
    is_silent = not validates and not (options.local_validation and work.loaders.has_val())
    trainer = kind(
        work,
        callbacks=callbacks,
        # Modules that write to self.logger.experiment go on working; what they write goes nowhere.
        logger=DummyLogger(),
        log_every_n_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **_limited(work, is_silent),
        **limits,
    )
    if is_silent:
        trainer.limit_val_batches = 0  # which overfit_batches sets, too
    return trainer


def _limited(work: LocalWork, is_silent: bool) -> dict[str, Any]:
    """Return the user's arguments for a client's trainer, with the run's limits; a silent one does not validate."""
    # The epochs of the whole run, as current_epoch counts them; LocalHooks end the fit after the round's.
    plan = work.plan
    limit = {"max_epochs": plan.limits()[0], "max_steps": plan.steps or -1}
    return {**copy.deepcopy(work.options.trainer), **limit, **({"limit_val_batches": 0} if is_silent else {})}


def call(trainer: LocalTrainer, work: LocalWork, what: Called) -> None:
    """Call ``trainer.fit``, ``trainer.validate`` or ``trainer.test`` with the client's data."""
    try:
        if what == "fit":
            trainer.fit(work.module, **data_of(work, train=True))
        else:
            getattr(trainer, what)(work.module, verbose=False, **data_of(work, train=False))
    except SystemExit as error:
        # Lightning answers Ctrl-C in a fit with sys.exit(1); to the server it must still be Ctrl-C.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def data_of(work: LocalWork, train: bool) -> dict[str, Any]:
    """Return the client's data as the arguments of ``fit``, or of ``validate`` and ``test``."""
    loaders = work.loaders
    if loaders.datamodule is not None:
        return {"datamodule": loaders.datamodule}
    if work.datamodule is not None:
        return {"datamodule": work.datamodule}
    if not train:
        return {"dataloaders": loaders.val}
    # None would mean the module's own val_dataloader, which is the server's.
    val = loaders.val
    if val is None and is_overridden("validation_step", work.module, LightningModule):
        val = []
    return {"train_dataloaders": loaders.train, "val_dataloaders": val}


@contextmanager
def local_run(work: LocalWork, purpose: str, view: type[ClientView] | None = None) -> Iterator[LocalData]:
    """Prepare module, data and process for a run, and restore all but weights after it; random states are the caller's.

    Gives what the run's loaders go through when Lightning asks for them.
    """
    module, datamodule, isolation = work.module, work.datamodule, work.options.isolation
    seed_of, handlers = work.task.seed_of(purpose), signal_handlers()
    data = LocalData(seed_of, isolation)
    with ExitStack() as stack:
        stack.callback(restore_handlers, handlers)
        stack.enter_context(quiet())
        held = stack.enter_context(isolation.around(module, datamodule))
        stack.callback(isolation.say_grown, data.snapshots)
        stack.enter_context(restoring(data.snapshots))
        stack.push(partial(_without_gradients, module))
        stack.callback(restore_optimizers, module)
        if (own := work.loaders.datamodule) is not None:
            stack.enter_context(restoring([DataSnapshot({"datamodule": own})]))
            stack.enter_context(viewed_as(own, OwnDataView))
        elif datamodule is not None:
            stack.enter_context(viewed_as(datamodule, ClientDataView))
        view = view or client_view(module)
        stack.enter_context(viewed_as(module, view))
        if not issubclass(view, BuildingClientView):
            weights.load(module, work.task.weights)
        for snapshot in held:
            snapshot.seed(seed_of)
        seed_all(seed_of(""))
        yield data


def _without_gradients(module: LightningModule, kind: type[BaseException] | None, *_: Any) -> None:
    """Clear the gradients that a run that failed has left; those of others their trainer has released."""
    if kind is not None:
        module.zero_grad(set_to_none=True)


def restore_optimizers(module: LightningModule) -> None:
    """Make optimizers and schedulers that the module may keep what they were before its run."""
    trainer = trainer_of(module)
    if isinstance(trainer, LocalTrainer):
        trainer.as_configured.restore()


class MissingMetric(ClientError):
    """A scheduler follows a metric that its client does not log."""


def explain_monitor(error: MisconfigurationException, trainer: LocalTrainer) -> MissingMetric | None:
    """Return a better error where a scheduler monitors what clients do not log."""
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and str(config.monitor) in str(error):
            return missing_metric(config, trainer)
    return None


def missing_metric(config: LRSchedulerConfig, trainer: Trainer) -> MissingMetric:
    """Say of a scheduler that its metric is not there, and what to write."""
    way_out = (
        "monitor what it logs"
        if trainer.limit_val_batches
        else "clients do not validate while they train. Write FederatedTrainer(local_validation=True) with"
        " Partition(..., val_fraction=...), or monitor what training_step logs"
    )
    return MissingMetric(
        f"has a {type(config.scheduler).__name__} that monitors {config.monitor!r}, which its local fit does not log:"
        f" {way_out}: {sorted(trainer.callback_metrics)}."
    )

"""One client's work as a real Lightning fit: it knows the Trainer and not Flower."""

from __future__ import annotations

import copy
import io
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerPLType
from torch import Tensor
from torchmetrics import Metric

from lightning_fed import weights
from lightning_fed.data import ClientLoaders, count_examples
from lightning_fed.errors import ClientError
from lightning_fed.metrics import MetricState, catch
from lightning_fed.seeding import seed_for, seeded
from lightning_fed.views import View, laid_over
from lightning_fed.weights import Weights

ClientState = Literal["reset", "carry", "global"]


@dataclass
class LocalOptions:
    """What all local fits of a run have in common.

    Attributes:
        trainer: Arguments for each client's ``Trainer``.
        epochs: Local epochs a round, or ``None`` where ``steps`` counts.
        steps: Local optimizer steps a round, or ``None``.
        callbacks: The user's client callbacks, copied for each fit.
        method_callbacks: Builds the callbacks that federated methods bring, outermost first.
        client_state: What becomes of optimizers and schedulers from round to round.
        local_validation: Whether a fit validates on the client's held-out part.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = 1
    steps: int | None = None
    callbacks: Sequence[Callback] = ()
    method_callbacks: Callable[[], Sequence[Callback]] = list
    client_state: ClientState = "reset"
    local_validation: bool = False

    def first_epoch(self, round: int) -> int:
        """The number of the first epoch of a round: a client's epochs count on from round to round."""
        return (round - 1) * (self.epochs or 1)


@dataclass
class LocalTask:
    """What one client does in one round."""

    client: int
    round: int
    seed: int
    weights: Weights
    state: bytes | None = None
    set_up: bool = True


@dataclass
class LocalResult:
    """What came of it; ``weights`` are the client's own copy."""

    weights: Weights
    num_examples: int
    scalars: dict[str, float]
    metrics: list[MetricState]
    state: bytes | None = None


class ClientView(View):
    """A module as a client sees it: all training hooks are the user's, set-up and checkpoints are not the client's."""

    trainer: LocalTrainer

    def prepare_data(self) -> None:
        if self.trainer.sets_up:
            super().prepare_data()  # type: ignore[misc]

    def setup(self, stage: str) -> None:
        # The server has set the same module up; doing it again would build new layers and read the data anew.
        if self.trainer.sets_up:
            super().setup(stage)  # type: ignore[misc]

    def teardown(self, stage: str) -> None:
        pass

    def configure_callbacks(self) -> list[Callback]:
        # They act at the server: a ModelCheckpoint from here would write checkpoints for every client.
        return []

    def configure_model(self) -> None:
        super().configure_model()  # type: ignore[misc]
        weights.load(self, self.trainer.task.weights)  # type: ignore[arg-type]

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()  # type: ignore[misc]
        # The last moment: the module has logged, and Lightning has not reset yet.
        self.trainer.caught = catch(self.trainer, self, self.trainer.computed)  # type: ignore[arg-type]

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, Tensor) and any(value is metric._computed for metric in self.trainer.module_metrics):
            self.trainer.computed.add(name)
        super().log(name, value, *args, **kwargs)  # type: ignore[misc]


class ClientDataView(View):
    """The server's datamodule as a client sees it: set up already, and with the client's loaders."""

    trainer: LocalTrainer

    def prepare_data(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        pass

    def teardown(self, stage: str) -> None:
        pass

    def train_dataloader(self) -> Any:
        return self.trainer.loaders.train

    def val_dataloader(self) -> Any:
        return [] if self.trainer.loaders.val is None else self.trainer.loaders.val


class LocalTrainer(Trainer):
    """A client's trainer. On a client ``self.trainer.current_round`` and ``self.trainer.client_id`` exist."""

    def __init__(self, task: LocalTask, loaders: ClientLoaders, module: LightningModule, **kwargs: Any) -> None:
        self.task, self.loaders = task, loaders
        self.caught: list[MetricState] = []
        self.computed: set[str] = set()
        self.module_metrics = [child for child in module.modules() if isinstance(child, Metric)]
        with _quiet():
            super().__init__(**kwargs)

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


class LocalHooks(Callback):
    """What a local fit does at Lightning's hooks, besides the user's own."""

    def __init__(self, options: LocalOptions, first_epoch: int) -> None:
        self.options, self.first_epoch = options, first_epoch
        self.seen = 0
        self.handlers = _handlers()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _restore_handlers(self.handlers)
        assert isinstance(trainer, LocalTrainer)
        if trainer.task.state is not None:
            _load_fit_state(trainer, trainer.task.state)
        elif self.options.client_state == "global":
            _advance_schedulers(trainer, self.first_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.first_epoch:
            self.seen += _batch_size(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _restore_handlers(self.handlers)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, LocalTrainer)
        if trainer.validating and trainer.state.fn == "validate":
            trainer.caught = catch(trainer, pl_module, trainer.computed)


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
        ClientError: If the client has no examples, or a scheduler monitors what clients do not log.
    """
    if loaders.num_examples == 0:
        raise ClientError(
            "has no training examples. Deal out fewer clients or larger parts (min_partition_size= of the partitioner),"
            " or let it fail: FaultTolerance(min_results=...)."
        )
    first_epoch = options.first_epoch(task.round)
    hooks = LocalHooks(options, first_epoch)
    with _local_run(module, datamodule, task, "train"):
        trainer = _build_trainer(task, loaders, module, options, [hooks, *options.method_callbacks()])
        _start_at_epoch(trainer, first_epoch)
        try:
            _call(trainer.fit, trainer, module, datamodule, train=True)
        except MisconfigurationException as error:
            raise _explain_monitor(error, trainer) or error from None
        state = _save_fit_state(trainer) if options.client_state == "carry" else None
        _let_go(trainer, module)
        examples = loaders.num_examples
        if examples is None:
            examples = count_examples(trainer.train_dataloader) or hooks.seen
        scalars = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        return LocalResult(weights.read(module), examples, scalars, trainer.caught, state)


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
    if loaders.datamodule is None and loaders.val is None:
        return LocalResult({}, 0, {}, [])
    with _local_run(module, datamodule, task, "evaluate"):
        trainer = _build_trainer(task, loaders, module, options, [LocalHooks(options, 0)], validates=True)
        _call(trainer.validate, trainer, module, datamodule, train=False)
        loader = trainer.val_dataloaders
        examples = sum(count_examples(one) or 0 for one in (loader if isinstance(loader, list) else [loader]))
        scalars = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        return LocalResult({}, examples, scalars, trainer.caught)


def _build_trainer(
    task: LocalTask,
    loaders: ClientLoaders,
    module: LightningModule,
    options: LocalOptions,
    callbacks: Sequence[Callback],
    validates: bool = False,
) -> LocalTrainer:
    first = options.first_epoch(task.round)
    limit = {"max_epochs": -1, "max_steps": options.steps} if options.steps else {"max_epochs": first + options.epochs}  # type: ignore[operator]
    arguments = {**copy.deepcopy(options.trainer), **limit}
    if not (options.local_validation or validates):
        arguments["limit_val_batches"] = 0
    return LocalTrainer(
        task,
        loaders,
        module,
        callbacks=[*callbacks, *copy.deepcopy(list(options.callbacks))],
        # Modules that write to self.logger.experiment go on working; what they write goes nowhere.
        logger=DummyLogger(),
        log_every_n_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **arguments,
    )


def _start_at_epoch(trainer: Trainer, epoch: int) -> None:
    for progress in (trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_progress.total):
        progress.ready = progress.started = progress.processed = progress.completed = epoch  # type: ignore[attr-defined]


def _call(
    run: Callable[..., Any],
    trainer: LocalTrainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    train: bool,
) -> None:
    loaders = trainer.loaders
    data: dict[str, Any]
    if loaders.datamodule is not None:
        data = {"datamodule": loaders.datamodule}
    elif datamodule is not None:
        data = {"datamodule": datamodule}
    elif train:
        data = {"train_dataloaders": loaders.train, "val_dataloaders": loaders.val}
    else:
        data = {"dataloaders": loaders.val}
    if not train:
        data["verbose"] = False
    try:
        with _quiet():
            run(module, **data)
    except SystemExit as error:
        # Lightning answers Ctrl-C in a fit with sys.exit(1); to the server it must still be Ctrl-C.
        raise KeyboardInterrupt from error


@contextmanager
def _local_run(
    module: LightningModule, datamodule: LightningDataModule | None, task: LocalTask, purpose: str
) -> Iterator[None]:
    """Views, seeds, signal handlers and the module's own state, all put back at the end."""
    handlers = _handlers()
    with ExitStack() as stack:
        stack.callback(_restore_handlers, handlers)
        stack.enter_context(_own_state_kept(module))
        if datamodule is not None:
            stack.enter_context(_attributes_kept(datamodule))
            stack.enter_context(laid_over(datamodule, ClientDataView))
        stack.enter_context(laid_over(module, ClientView))
        stack.enter_context(seeded(seed_for(task.seed, purpose, round=task.round, client=task.client)))
        yield


@contextmanager
def _own_state_kept(module: LightningModule) -> Iterator[None]:
    """Puts back all that is not in the state dict: attributes, modes, frozen flags, buffers that are not saved."""
    attributes = [(child, dict(child.__dict__)) for child in module.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    saved = module.state_dict().keys()
    unsaved = [(b, b.detach().clone()) for name, b in module.named_buffers() if name not in saved]
    device = module.device
    try:
        yield
    finally:
        module.zero_grad(set_to_none=True)
        for child, state in attributes:
            child.__dict__.clear()
            child.__dict__.update(state)
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
        # Lightning leaves a module on the CPU when a fit ends.
        if any(parameter.device != device for parameter in module.parameters()):
            module.to(device)
        with torch.no_grad():
            for buffer, value in unsaved:
                buffer.copy_(value)


@contextmanager
def _attributes_kept(datamodule: LightningDataModule) -> Iterator[None]:
    state = dict(datamodule.__dict__)
    try:
        yield
    finally:
        datamodule.__dict__.clear()
        datamodule.__dict__.update(state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning from telling the same about every client's trainer."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _handlers() -> dict[int, Any]:
    """The server's signal handlers: a client must not swallow a SIGTERM, nor leave Ctrl-C ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def _restore_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _batch_size(batch: Any) -> int:
    while isinstance(batch, (list, tuple, dict)) and batch:
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch) if isinstance(batch, Tensor) and batch.dim() else 1


def _explain_monitor(error: MisconfigurationException, trainer: LocalTrainer) -> ClientError | None:
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and str(config.monitor) in str(error):
            return ClientError(
                f"has a {type(config.scheduler).__name__} that monitors {config.monitor!r}, which its local fit does not"
                f" log: clients do not validate while they train. Write FederatedTrainer(local_validation=True) with"
                f" Partition(..., val_fraction=...), or monitor what training_step logs: {sorted(trainer.callback_metrics)}."
            )
    return None


def _schedulers(trainer: Trainer) -> list[LRSchedulerPLType]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _save_fit_state(trainer: Trainer) -> bytes:
    state = {
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in _schedulers(trainer)],
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _load_fit_state(trainer: Trainer, saved: bytes) -> None:
    # It never left the client; even so only tensors and plain values are read.
    state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    for optimizer, own in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    for scheduler, own in zip(_schedulers(trainer), state["schedulers"], strict=True):
        scheduler.load_state_dict(own)


def _advance_schedulers(trainer: Trainer, epochs: int) -> None:
    """Brings schedules to where the global round is, as if the client had trained in all rounds before."""
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            raise ClientError(
                "has a ReduceLROnPlateau, which has no schedule to take from the global round: write"
                " FederatedTrainer(client_state='carry')."
            )
        steps = epochs if config.interval == "epoch" else epochs * int(trainer.num_training_batches)
        for _ in range(steps // config.frequency):
            config.scheduler.step()  # type: ignore[call-arg]


def _let_go(trainer: Trainer, module: LightningModule) -> None:
    """A trainer is full of reference cycles: what is large is let go at once, not at the next garbage collection."""
    module.zero_grad(set_to_none=True)
    for optimizer in trainer.optimizers:
        optimizer.state.clear()

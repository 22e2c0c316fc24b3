"""A client's trainer without what Lightning does for a program's one trainer, and would do anew for every client."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops import fit_loop
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import setup
from lightning.pytorch.trainer import trainer as lightning_trainer
from lightning.pytorch.trainer.configuration_validator import _verify_loop_configurations
from lightning.pytorch.trainer.connectors import callback_connector
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource, _request_dataloader
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import argparse
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_fed._compat.signatures import signatures_known

# The modules that Lightning has verified for a fit, each with what it depends on.
_verified: MutableMapping[LightningModule, bool] = WeakKeyDictionary()


class QuickTrainer(Trainer):
    """A trainer that is one of many: it looks for no cluster, heeds no signals, resumes nothing, and leaves its device.

    Args:
        plugins: As ``Trainer``.
        **kwargs: As ``Trainer``.
    """

    def __init__(self, plugins: Sequence[Any] | None = None, **kwargs: Any) -> None:
        with _nothing_looked_for():
            _without_environment(self, plugins=_on_its_own(plugins), profiler=_NoProfiler(), **kwargs)
        self.strategy.teardown = _stay  # type: ignore[method-assign]
        self.accelerator.setup = _is_set_up  # type: ignore[method-assign]
        self._checkpoint_connector.resume_end = _nothing_resumed  # type: ignore[method-assign]
        self._checkpoint_connector._select_ckpt_path = _no_checkpoint  # type: ignore[method-assign]
        # Signals are the server's: a client that heard SIGTERM, too, would break the round off.
        self._signal_connector.register_signal_handlers = _leave_signals  # type: ignore[method-assign]

    @property
    def training(self) -> bool:
        """Whether it trains. Lightning asks a dozen times a step, and its own compares strings."""
        return self.state.stage is RunningStage.TRAINING

    @training.setter
    def training(self, value: bool) -> None:
        assert Trainer.training.fset is not None  # type: ignore[attr-defined]
        Trainer.training.fset(self, value)  # type: ignore[attr-defined]

    def _run(self, model: LightningModule, *args: Any, **kwargs: Any) -> Any:
        with signatures_known():
            return self._run_verified(model, *args, **kwargs)

    def _run_verified(self, model: LightningModule, *args: Any, **kwargs: Any) -> Any:
        if self.state.fn is not TrainerFn.FITTING or _verified.get(model) is not model.automatic_optimization:
            return super()._run(model, *args, **kwargs)
        # To read the signatures of a module's steps takes as long as a small step.
        lightning_trainer._verify_loop_configurations = _is_verified
        try:
            return super()._run(model, *args, **kwargs)
        finally:
            lightning_trainer._verify_loop_configurations = _verify_loop_configurations

    def _run_stage(self) -> Any:
        if not self.training:
            return super()._run_stage()
        _verified[self.lightning_module] = self.lightning_module.automatic_optimization
        # For a sanity check that a client never makes, Lightning keeps and puts back all random states of all devices.
        lightning_trainer.isolate_rng = nullcontext  # type: ignore[assignment]
        fit_loop._request_dataloader = _requested
        try:
            return super()._run_stage()
        finally:
            lightning_trainer.isolate_rng, fit_loop._request_dataloader = isolate_rng, _request_dataloader

    def _run_sanity_check(self) -> None:
        lightning_trainer.isolate_rng = isolate_rng  # what comes next may be the user's


class _NoProfiler(PassThroughProfiler):
    """Lightning's own makes a context for each of the twenty-odd calls of a step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self._nothing


@contextmanager
def _nothing_looked_for() -> Iterator[None]:
    """Leave out a quarter of a small fit: the search for other packages' callbacks, for devices, and a tip."""
    left_out: list[tuple[Any, str, Any]] = [
        (callback_connector, "_load_external_callbacks", lambda group: []),
        (setup, "_log_device_info", lambda trainer: None),
    ]
    if hasattr(logger_connector, "rank_zero_info"):  # since Lightning 2.6
        left_out.append((logger_connector, "rank_zero_info", lambda tip: None))
    before = [getattr(module, name) for module, name, _ in left_out]
    for module, name, nothing in left_out:
        setattr(module, name, nothing)
    try:
        yield
    finally:
        for (module, name, _), there in zip(left_out, before, strict=True):
            setattr(module, name, there)


def _without_environment(trainer: Trainer, **kwargs: Any) -> None:
    """Construct a trainer without the look for variables of the environment, which would name its class."""
    init = Trainer.__init__
    if init.__globals__ is vars(argparse):  # and nobody has put something around it
        init = init.__wrapped__  # type: ignore[attr-defined]
    init(trainer, **kwargs)


def _on_its_own(plugins: Sequence[Any] | None) -> list[Any]:
    """Plugins, and an environment of one process, for which Lightning looks for a cluster each time."""
    given = list(plugins or ())
    return given if any(isinstance(one, ClusterEnvironment) for one in given) else [*given, LightningEnvironment()]


def _is_verified(trainer: Trainer) -> None:
    """In place of Lightning's look at the module, for a client's fit that is not the first; any other gets its own."""
    lightning_trainer._verify_loop_configurations = _verify_loop_configurations


def _requested(data_source: _DataLoaderSource) -> Any:
    """As Lightning's, which watches how loaders are made also where nothing but one that is there is returned."""
    return _request_dataloader(data_source) if data_source.is_module() else data_source.dataloader()


def _leave_signals() -> None:
    """In place of Lightning's function that installs a trainer's own signal handlers."""


def _stay() -> None:
    """In place of the strategy's teardown, which moves module and optimizers to the CPU after every client."""


def _is_set_up(trainer: Trainer) -> None:
    """In place of the accelerator's setup, which frees the device's cached memory before every client."""


def _nothing_resumed() -> None:
    """In place of the end of Lightning's resuming, which does so, too: a client's fit has no checkpoint."""


def _no_checkpoint(*args: Any, **kwargs: Any) -> None:
    """In place of Lightning's choice, which on SLURM is the checkpoint that a requeued server finds."""

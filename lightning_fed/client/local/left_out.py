"""What of Lightning's a client's trainer does without: each function stands in place of one of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import setup
from lightning.pytorch.trainer.connectors import callback_connector
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource, _request_dataloader


class NoProfiler(PassThroughProfiler):
    """Lightning's own makes a context for each of the twenty-odd calls of a step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self._nothing


@contextmanager
def nothing_looked_for() -> Iterator[None]:
    """A server's trainer looks for callbacks of other packages and for devices to tell of: a quarter of a small fit."""
    look_for, tell = callback_connector._load_external_callbacks, setup._log_device_info
    callback_connector._load_external_callbacks = lambda group: []
    setup._log_device_info = lambda trainer: None
    try:
        yield
    finally:
        callback_connector._load_external_callbacks, setup._log_device_info = look_for, tell


def requested(data_source: _DataLoaderSource) -> Any:
    """As Lightning's, which watches how loaders are made also where nothing but one that is there is handed over."""
    return _request_dataloader(data_source) if data_source.is_module() else data_source.dataloader()


def leave_signals() -> None:
    """In place of Lightning's function that installs a trainer's own signal handlers."""


def stay() -> None:
    """In place of the strategy's teardown, which moves module and optimizers to the CPU after every client."""


def is_set_up(trainer: Trainer) -> None:
    """In place of the accelerator's setup, which frees the device's cached memory before every client."""


def nothing_resumed() -> None:
    """In place of the end of Lightning's resuming, which does so, too: a client's fit has no checkpoint."""


def no_checkpoint(*args: Any, **kwargs: Any) -> None:
    """In place of Lightning's choice, which on SLURM is the checkpoint that a requeued server finds."""


def on_its_own(plugins: Sequence[Any] | None) -> list[Any]:
    """Plugins, and an environment of one process, for which Lightning looks for a cluster each time."""
    given = list(plugins or ())
    return given if any(isinstance(one, ClusterEnvironment) for one in given) else [*given, LightningEnvironment()]

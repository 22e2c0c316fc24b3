"""Which callback works where: at the server once a round, or on the clients with their batches and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, ProgressBar

from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.client.local.method import LocalMethod, methods_among
from lightning_fed.views import overrides, users_own

ON_GRADIENTS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
ON_BATCHES = ("on_train_batch_start", "on_train_batch_end")
_ON_HELD_OUT = ("on_validation_batch_start", "on_validation_batch_end")

# Lightning's own that act on training, which happens on the clients, without writing one of these hooks.
_LOCAL = ("GradientAccumulationScheduler", "BaseFinetuning", "ModelPruning", "SpikeDetection")
_NOWHERE = ("StochasticWeightAveraging", "WeightAveraging", "LearningRateFinder", "BatchSizeFinder")
# Packages whose hooks say nothing: Ray Tune writes every one, and acts at those that were asked for.
_KNOWN_PACKAGES = ("lightning", "pytorch_lightning", "ray")
# By name: they are imported where the user does.
_OF_SWEEPS = {("optuna_integration", "PyTorchLightningPruningCallback"), ("ray", "TuneCallback")}
# What these do at their hooks is the server's, once a round.
_SERVERS = (FederatedCallback, ProgressBar, Checkpoint)


def written(callback: Callback, hooks: Iterable[str]) -> list[str]:
    """Return which hooks a callback overrides: those of Lightning's own making, and Ray's, are not among them."""
    there = {*dir(type(callback)), *vars(callback)}  # what mock makes answers to every hook, and means none of them
    found = [hook for hook in hooks if hook in there and overrides(callback, Callback, hook)]
    return [hook for hook in found if _package(users_own(callback, hook)) not in _KNOWN_PACKAGES]


def reports_to_a_sweep(callback: Callback) -> bool:
    """Return whether a callback is one with which Optuna or Ray Tune follow a trial."""
    return any((_package(kind), kind.__name__) in _OF_SWEEPS for kind in type(callback).__mro__)


def _package(of: Any) -> str:
    return str(getattr(of, "__module__", "")).partition(".")[0]


def _is_one_of(callback: Callback, names: Sequence[str]) -> bool:
    return any(isinstance(callback, getattr(lightning_callbacks, name, ())) for name in names)


def replaces_loop(callback: Callback) -> bool:
    """Return whether a callback replaces the training loop, which no round can give it."""
    return _is_one_of(callback, _NOWHERE)


def is_local(callback: Callback) -> bool:
    """Return whether a callback is one of Lightning's that act on local training alone."""
    return _is_one_of(callback, _LOCAL)


def acts_on_clients(callback: Callback) -> bool:
    """Return whether a module's callback acts where the clients are: on local training, batches or gradients."""
    hooks = (*ON_GRADIENTS, *ON_BATCHES, *_ON_HELD_OUT)
    return is_local(callback) or (not isinstance(callback, _SERVERS) and bool(written(callback, hooks)))


def misplaced(callbacks: Sequence[Callback], client_callbacks: Sequence[Callback]) -> list[str]:
    """Return a sentence for each callback that cannot do its work where it was put."""
    faults = []
    faults += [
        f"{type(one).__name__} is a LocalMethod: it belongs to the method whose FederatedCallback.local_callbacks()"
        " returns it, and works nowhere else."
        for one in methods_among((*callbacks, *client_callbacks))
    ]
    callbacks = [callback for callback in callbacks if not isinstance(callback, LocalMethod)]
    for callback in callbacks:
        name = type(callback).__name__
        if is_local(callback):
            faults.append(f"{name} acts on training, which the clients do: write client_callbacks=[{name}(...)].")
        elif not isinstance(callback, _SERVERS) and (hooks := written(callback, ON_GRADIENTS)):
            faults.append(
                f"{name} writes {' and '.join(hooks)}, and gradients are the clients': write"
                f" client_callbacks=[{name}(...)]."
            )
    for callback in client_callbacks:
        name = type(callback).__name__
        if isinstance(callback, FederatedCallback):
            faults.append(f"{name} is a federated callback: write callbacks=[...], not client_callbacks.")
        elif isinstance(callback, (Checkpoint, ProgressBar)):
            what = "saves checkpoints" if isinstance(callback, Checkpoint) else "shows progress"
            faults.append(
                f"client_callbacks=[{name}(...)]: it {what} of the run, at the server: write callbacks=[...]."
            )
    for callback in (*callbacks, *client_callbacks):
        if replaces_loop(callback):
            faults.append(
                f"{type(callback).__name__} replaces the training loop (an epoch of its own over the train loader, or"
                " trial steps), which a round cannot give it: leave it out."
            )
    return faults


def monitors_of_a_part(callbacks: Sequence[Callback], prefix: str) -> list[str]:
    """Return each callback that stops, saves or prunes by a metric of this prefix, as its user wrote it."""
    return [
        f"{type(callback).__name__}(monitor={monitor!r})"
        for callback in callbacks
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)) or reports_to_a_sweep(callback)
        if (monitor := str(getattr(callback, "monitor", None))).startswith(prefix)
    ]


def once_a_round(callbacks: Sequence[Callback]) -> list[str]:
    """Return a sentence for each of the user's callbacks at the server that may expect batches."""
    said = []
    for callback in callbacks:
        hooks = [] if isinstance(callback, _SERVERS) else written(callback, ON_BATCHES)
        if hooks:
            name = type(callback).__name__
            said.append(
                f"{name} writes {' and '.join(hooks)}: at the server that comes once a round, with no batch. Where it"
                f" is meant for training batches write client_callbacks=[{name}(...)]; what is meant once a round goes"
                " into on_train_epoch_end."
            )
    return said

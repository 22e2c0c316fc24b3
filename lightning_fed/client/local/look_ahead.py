"""What ``configure_optimizers`` gives, looked at before the first round: what cannot work is said then, and once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_fed._compat.lightning import attach_data, configure_model, prepare_data, tear_down, verify_loops
from lightning_fed.client.local.catch_up import without_place
from lightning_fed.client.local.examples import examples_in
from lightning_fed.client.local.fit import local_fit
from lightning_fed.client.local.run import (
    MissingMetric,
    build_trainer,
    data_of,
    local_run,
    missing_metric,
)
from lightning_fed.client.local.schedules import stands_still
from lightning_fed.client.local.trainer import LocalTrainer
from lightning_fed.client.local.work import LocalWork
from lightning_fed.errors import ConfigurationError
from lightning_fed.values.data import ClientLoaders
from lightning_fed.values.weights import read

# After so many batches a metric that a schedule follows should be there; else a whole local fit has to tell.
_BATCHES = 2


@dataclass
class LookAhead:
    """Looks at the optimizers and schedulers that the first client would have. Nothing that it does stays.

    Attributes:
        work: What the first client works on in the first round, without its data.
        data: ``data(client, round)`` gives a client's loaders; asked only where ``configure_optimizers`` needs them.
    """

    work: LocalWork
    data: Callable[[int, int], ClientLoaders]

    def look(self) -> None:
        """Look.

        Raises:
            ConfigurationError: If a schedule follows a metric and has no place in the global round, or cannot see it.
            Exception: What ``configure_optimizers``, and Lightning of what it gives, raises in a plain ``Trainer``.
        """
        options = self.work.options
        if options.rounds != 1 and any(isinstance(callback, ModelPruning) for callback in options.callbacks):
            rank_zero_warn(
                "ModelPruning begins anew on a client in each round: it does not know what it has pruned before, so"
                " sparsity does not grow from round to round as it would in one long fit."
            )
        _say_left_out(self.work.module)
        try:
            follows_metric = self._look(None)
        except ConfigurationError:
            raise
        except Exception:
            # Perhaps for want of data. It is opened only now: it may be large, and is not needed in this process.
            if (loaders := self._loaders()) is None:
                return
            follows_metric = self._look(loaders)
        if follows_metric and self._missing(quickly=True) and (missing := self._missing(quickly=False)):
            raise ConfigurationError(f"A client {missing}")

    def _look(self, loaders: ClientLoaders | None) -> bool:
        """Return whether a schedule follows a metric; say what is to be said of the others."""
        options = self.work.options
        with self._configured(loaders) as trainer:
            configs = trainer.lr_scheduler_configs
            if options.rounds != 1 and options.client_state == "global" and (placeless := without_place(configs)):
                raise ConfigurationError(f"configure_optimizers gives {placeless}.")
            if options.rounds != 1 and options.client_state == "reset" and configs:
                if options.steps is not None or any(config.interval == "step" for config in configs):
                    trainer.fit_loop.setup_data()
                still = {type(config.scheduler).__name__ for config in configs if stands_still(trainer, config)}
                _say_still(sorted(still))
            return any(config.reduce_on_plateau for config in configs)

    def _loaders(self) -> ClientLoaders | None:
        try:
            loaders = self.data(self.work.task.client, self.work.task.round)
        except Exception:  # that is the client's own, when its turn comes
            return None
        return None if examples_in(loaders.train) == 0 else loaders

    @contextmanager
    def _configured(self, loaders: ClientLoaders | None) -> Iterator[LocalTrainer]:
        """Return the first client's trainer, as far as a fit has got when optimizers are made."""
        work = self.work if loaders is None else replace(self.work, loaders=loaders)
        with local_run(work, "train") as data:
            trainer = build_trainer(LocalTrainer, work, list(work.options.method_callbacks()))
            trainer.data = data
            trainer.state.fn, trainer.state.status, trainer.training = TrainerFn.FITTING, TrainerStatus.RUNNING, True
            trainer.strategy.connect(work.module)
            attach_data(trainer, work.module, **data_of(work, train=True))
            if loaders is None:
                trainer.fit_loop.setup_data = _closed  # type: ignore[method-assign]
            with catch_warnings():  # a fit gives them, too
                simplefilter("ignore")
                verify_loops(trainer)
            prepare_data(trainer)
            try:
                configure_model(trainer)
                trainer.strategy.setup(trainer)
                yield trainer
            finally:
                tear_down(trainer)

    def _missing(self, quickly: bool) -> MissingMetric | None:
        """Return what a local fit says of a metric that a schedule follows, and does not find.

        Args:
            quickly: On a few batches, and without the user's client callbacks, which may note what they see.
        """
        options = self.work.options
        if quickly:
            limit = options.trainer.get("limit_train_batches")
            few = {"limit_train_batches": min(limit, _BATCHES) if type(limit) is int else _BATCHES}
            options = replace(options, callbacks=(), trainer={**options.trainer, **few})
        methods = options.method_callbacks
        options = replace(options, method_callbacks=lambda: [*methods(), _Insists()])
        if (loaders := self._loaders()) is None:
            return None
        try:
            local_fit(replace(self.work, loaders=loaders, options=options))
        except MissingMetric as error:
            return error
        except Exception:  # that is the client's own, when its turn comes
            pass
        return None


class _Insists(Callback):
    """Insists that a metric which a schedule follows has been there by the end, whether that is strict or not."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor not in trainer.callback_metrics:
                raise missing_metric(config, trainer)


def _closed(*_: Any) -> None:
    raise RuntimeError("the client's data has not been opened")


def _say_left_out(module: LightningModule) -> None:
    """Name parameters that train and do not travel: what a client makes of them is gone with its fit."""
    if names := left_out(module):
        rank_zero_warn(
            f"{', '.join(names)}: {type(module).__name__}.state_dict() leaves out what trains. Weights travel by the"
            " state dict, so each local fit begins with the value that it has now, and it never learns from round to"
            " round. Put it into the state dict, or freeze it: requires_grad_(False)."
        )


@torch.no_grad()
def left_out(module: nn.Module) -> list[str]:
    """Return the parameters that train and are not in the module's state dict, by name."""
    state = read(module, copy=False)
    held = {_memory_of(tensor) for tensor in state.values()}
    train = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    candidates = [(name, p) for name, p in train if p.numel() and name not in state and _memory_of(p) not in held]
    names, before = [], {name: tensor.clone() for name, tensor in state.items()} if candidates else {}
    for name, parameter in candidates:  # a state dict may have copies under other names
        value = parameter.clone()
        parameter.copy_(value == 0)
        if all(torch.equal(tensor, before[entry]) for entry, tensor in read(module, copy=False).items()):
            names.append(name)
        parameter.copy_(value)
    return names


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _say_still(names: list[str]) -> None:
    if names:
        rank_zero_warn(
            f"client_state='reset' begins schedules anew each round, and within a round {' and '.join(names)} never"
            " changes the learning rate. Leave client_state out, and schedules follow the global round, or write"
            " client_state='carry' to keep them with the client."
        )

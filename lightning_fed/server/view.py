"""The server view of a module: to Lightning an epoch is a round.

In this view a training batch is one federated round and the optimizer's step takes the aggregated weights over. The
user's training hooks rest: they run on the clients. Validation, test, predict, logging, hparams and checkpoints are the
user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_fed._compat.lightning import ChoosesBatches
from lightning_fed.errors import ConfigurationError
from lightning_fed.views import View, users_own


class RoundRunner(Protocol):
    """What the views ask of the server's trainer."""

    seems_automatic: bool

    def run_round(self) -> None: ...
    def apply_weights(self) -> None: ...
    def claim_names(self) -> None: ...
    def place_callbacks(self, given: Sequence[Callback]) -> list[Callback]: ...

    def where_shown(self, name: str) -> dict[str, bool | None]: ...

    @property
    def round_metrics(self) -> dict[str, float]: ...


_NO_BATCH = (
    "At the server a training batch is a federated round, without data: a callback asked it for {}. Batches are the"
    " clients': a callback that acts on them goes into client_callbacks=[...], what is meant once a round into"
    " on_train_epoch_end."
)


@dataclass(repr=False, eq=False)
class RoundItem:
    """What the server's train loader yields: it stands for one round, and says so to whoever takes it for a batch."""

    one: Tensor = field(default_factory=lambda: torch.zeros(1))  # by which Lightning finds a batch of size one

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigurationError(_NO_BATCH.format(repr(name)))

    def __getitem__(self, key: Any) -> Any:
        raise ConfigurationError(_NO_BATCH.format(f"[{key!r}]"))

    def __len__(self) -> int:
        raise ConfigurationError(_NO_BATCH.format("its length"))

    def __bool__(self) -> bool:
        return True


class RoundOutputs(dict[str, Any]):
    """What callbacks get as the outputs of a round: its metrics, each a tensor."""

    def __missing__(self, key: str) -> Any:
        raise ConfigurationError(_NO_BATCH.format(f"outputs[{key!r}]"))

    def copy(self) -> RoundOutputs:
        """Return a copy; Lightning makes one."""
        return RoundOutputs(self)


class RoundLoader:
    """The server's train loader: one item an epoch, for one round an epoch."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[RoundItem]:
        # The round's number is the epoch's: a counter here would start anew when a run is resumed.
        yield RoundItem()


class ApplyWeights(torch.optim.Optimizer):
    """Its step applies the round's weights. Nobody reads its ``lr`` but ``LearningRateMonitor``."""

    def __init__(self, apply: Callable[[], None]) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], {"lr": 1.0, "weight_decay": 0.0})
        self._apply = apply

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the weights over."""
        if closure is not None:
            closure()
        self._apply()


class ServerView(ChoosesBatches, View):
    """A module as the server sees it."""

    trainer: RoundRunner
    _trainer: RoundRunner | None

    @property
    def automatic_optimization(self) -> bool:
        return self._trainer is not None and self._trainer.seems_automatic

    @automatic_optimization.setter
    def automatic_optimization(self, value: bool) -> None:
        # What the user sets in a hook is meant for the clients.
        user = cast(property, getattr(super(ServerView, type(self)), "automatic_optimization"))  # noqa: B009
        assert user.fset is not None
        user.fset(self, value)

    def configure_callbacks(self) -> list[Callback]:
        given = users_own(self, "configure_callbacks")()
        return self.trainer.place_callbacks([given] if isinstance(given, Callback) else list(given))

    def configure_optimizers(self) -> ApplyWeights:
        return ApplyWeights(self.trainer.apply_weights)

    def _fed_is_batch(self, batch: Any) -> bool:
        # The hooks of module and datamodule know nothing of a round's item.
        return not isinstance(batch, RoundItem)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Here and not in training_step, where the server's autocast would reach clients and aggregation.
        self.trainer.run_round()

    def training_step(self, batch: Any, batch_idx: int) -> RoundOutputs:
        self.optimizers().step()  # type: ignore[attr-defined]
        # Only what is logged on_step is there to monitor in every hook of its own round.
        # Names of clients with several validation loaders carry dataloader_idx, which Lightning would add itself.
        when = {"on_step": True, "on_epoch": False, "batch_size": 1, "add_dataloader_idx": False}
        for name, value in self.trainer.round_metrics.items():
            # Lightning's own: a log of the user's has had its say on the clients.
            LightningModule.log(self, name, value, **self.trainer.where_shown(name), **when)  # type: ignore[arg-type]
        return RoundOutputs({name: torch.tensor(value) for name, value in self.trainer.round_metrics.items()})

    def on_validation_end(self) -> None:
        super().on_validation_end()  # type: ignore[misc]
        self.trainer.claim_names()


def _rest(self: Any, *args: Any, **kwargs: Any) -> None:
    """Do nothing: the clients run the user's hook."""


for _hook in (
    "on_train_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
):
    setattr(ServerView, _hook, _rest)


def user_train_dataloader(source: Any) -> Any:
    """Return what the user's own ``train_dataloader`` gives, under whichever view the module or datamodule stands."""
    return users_own(source, "train_dataloader")()

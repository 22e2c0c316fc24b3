"""FedRep: a personal head, trained before the body that all share."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_fed.callbacks.personal import Personal
from lightning_fed.errors import ConfigurationError, require


class FedRep(Personal):
    """The head is personal, and in each round it is trained first, then the body (Collins et al. 2021, Algorithm 1).

    https://arxiv.org/abs/2102.07078. The first ``head_epochs`` local epochs of a round train the head alone, with the
    body as it came; the ``body_epochs`` after them train the body, with the head as it is then. ``local_epochs`` is
    their sum. A part that is not trained has no gradients, so neither momentum nor weight decay moves it; its BatchNorm
    statistics go on.

    Args:
        *names: Name the head, as for ``Personal``, with ``patterns``.
        head_epochs: Local epochs for the head, at least 1.
        body_epochs: Local epochs for the body, at least 1.
        patterns: As for ``Personal``.

    >>> from lightning_fed import FederatedTrainer
    >>> methods = [FedRep("head", head_epochs=5, body_epochs=1)]
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, local_epochs=6, callbacks=methods)
    """

    def __init__(self, *names: str, head_epochs: int = 1, body_epochs: int = 1, patterns: Sequence[str] = ()) -> None:
        super().__init__(*names, patterns=patterns)
        at_least_one = (lambda number: number >= 1 and number == int(number)), "a whole number, at least 1"
        require(self, head_epochs=(head_epochs, *at_least_one), body_epochs=(body_epochs, *at_least_one))
        self.head_epochs, self.body_epochs = head_epochs, body_epochs

    def on_federation_start(self, trainer: Trainer) -> None:
        """Check that a round has as many local epochs."""
        local, epochs = trainer.local_options, self.head_epochs + self.body_epochs  # type: ignore[attr-defined]
        if local.epochs != epochs:
            has = f"local_steps={local.steps}" if local.steps else f"local_epochs={local.epochs}"
            raise ConfigurationError(
                f"FedRep(head_epochs={self.head_epochs}, body_epochs={self.body_epochs}) has {epochs} local epochs a"
                f" round, and the run has {has}. Write local_epochs={epochs}."
            )

    def local_callbacks(self) -> Sequence[Callback]:
        """Return the client's part."""
        return [HeadFirst(self.head_epochs)]


class HeadFirst(Callback):
    """Trains what is personal in a fit's first epochs, and the rest after them.

    Args:
        head_epochs: How many these are.
    """

    def __init__(self, head_epochs: int) -> None:
        self.head_epochs = head_epochs
        self._trained: dict[str, nn.Parameter] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what trains."""
        self._first = trainer.current_epoch
        self._trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        if len(kinds := {name in trainer.personal for name in self._trained}) < 2:  # type: ignore[attr-defined]
            part = "body" if True in kinds else "head"
            raise ConfigurationError(f"FedRep: no parameter of the {part} trains; it has requires_grad=False.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose what this epoch trains."""
        is_heads = trainer.current_epoch - self._first < self.head_epochs
        for name, p in self._trained.items():
            p.requires_grad_((name in trainer.personal) == is_heads)  # type: ignore[attr-defined]
            if not p.requires_grad:
                p.grad = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all train again."""
        for p in self._trained.values():
            p.requires_grad_(True)
        self._trained = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let all train again."""
        self.on_train_end(trainer, pl_module)

"""FedRep: a personal head, trained before the body that all share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_fed.callbacks.local_steps import trainable_in
from lightning_fed.callbacks.personal import Personal
from lightning_fed.errors import ConfigurationError, require

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class FedRep(Personal):
    """The head is personal, and in each round it is trained first, then the body (Collins et al. 2021, Algorithm 1).

    https://arxiv.org/abs/2102.07078. The first ``head_epochs`` local epochs of a round train the head alone, with the
    body as it came; the ``body_epochs`` after them train the body, with the head as it is then. ``local_epochs`` is
    their sum, in every round; with ``fast_dev_run`` there is one, the head's. A part that is not trained has no
    gradients, so neither momentum nor weight decay moves it, also where a callback unfreezes its layers meanwhile; its
    BatchNorm statistics go on.

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

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Check that each round has as many local epochs."""
        local, epochs = trainer.local_options, self.head_epochs + self.body_epochs
        if local.trainer.get("fast_dev_run"):
            return
        by_round = local.epochs if isinstance(local.epochs, tuple) else (local.epochs,)
        wrong = [(round, number) for round, number in enumerate(by_round, 1) if number != epochs]
        if wrong:
            [(round, number), *_] = wrong
            has = f"local_steps={local.steps}" if local.steps else f"local_epochs={number}"
            raise ConfigurationError(
                f"FedRep(head_epochs={self.head_epochs}, body_epochs={self.body_epochs}) has {epochs} local epochs a"
                f" round, and {f'round {round}' if isinstance(local.epochs, tuple) else 'the run'} has {has}. Write"
                f" local_epochs={epochs}."
            )

    def local_callbacks(self) -> Sequence[Callback]:
        """Return the client's part."""
        return [HeadFirst(self.head_epochs)]


class HeadFirst(Callback):
    """Trains what is personal in a fit's first epochs, and the rest after them.

    What an epoch does not train loses its gradient at once, wherever that comes from: in manual optimization a backward
    pass may be of its part alone (``toggle_optimizer``), and any part may be unfrozen within the epoch. Where Lightning
    optimizes it has ``requires_grad=False`` besides, from the epoch's first batch to its end, and none is computed.

    Args:
        head_epochs: How many these are.
    """

    def __init__(self, head_epochs: int) -> None:
        self.head_epochs = head_epochs
        self._has_chosen = False
        self._rests: list[nn.Parameter] = []
        self._frozen: list[nn.Parameter] = []
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that both parts train."""
        self._first = trainer.current_epoch
        trained = [name for name, p in pl_module.named_parameters() if p.requires_grad]
        if len(kinds := {name in trainer.personal for name in trained}) < 2:  # type: ignore[attr-defined]
            part = "body" if True in kinds else "head"
            raise ConfigurationError(f"FedRep: no parameter of the {part} trains; it has requires_grad=False.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose, at an epoch's first batch, what it trains: who freezes or unfreezes at its start has done so."""
        if self._has_chosen:
            return
        is_heads = trainer.current_epoch - self._first < self.head_epochs
        for name, p in trainable_in(pl_module).items():
            if (name in trainer.personal) != is_heads:  # type: ignore[attr-defined]
                self._let_rest(p, freeze=pl_module.automatic_optimization)
        self._has_chosen = True

    def _let_rest(self, p: nn.Parameter, freeze: bool) -> None:
        p.grad, is_trained = None, p.requires_grad
        self._rests.append(p)
        p.requires_grad_(True)  # without which torch takes no hook
        self._handles.append(p.register_post_accumulate_grad_hook(_drop))  # type: ignore[no-untyped-call]
        p.requires_grad_(is_trained and not freeze)
        if is_trained and freeze:
            self._frozen.append(p)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop gradients that were given by hand."""
        for p in self._rests:
            p.grad = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all train again that did."""
        for handle in self._handles:
            handle.remove()
        for p in self._frozen:
            p.requires_grad_(True)
        self._has_chosen, self._rests, self._frozen, self._handles = False, [], [], []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all train again, where an epoch did not end."""
        self.on_train_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let all train again."""
        self.on_train_epoch_end(trainer, pl_module)


def _drop(p: Tensor) -> None:
    p.grad = None

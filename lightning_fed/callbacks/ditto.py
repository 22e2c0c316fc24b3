"""Ditto: beside the global model each client trains one of its own, held near it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.callbacks.local_steps import refuse_unheard, with_gradients
from lightning_fed.errors import require
from lightning_fed.values.weights import entries_of_parameters


class Ditto(FederatedCallback):
    """A client trains a second model ``v``, by ``v - eta (grad F(v) + lam (v - x))`` (Li et al. 2021, Algorithm 1).

    https://arxiv.org/abs/2012.04221. ``x`` are the weights that it received. ``v`` begins with them, stays with the
    client, and is what it evaluates: ``clients/...`` are each client's with its own, and
    ``trainer.personal_module(client)`` gives it. What the client sends and logs in training is of the other model,
    which is trained as without Ditto, so it goes with any aggregation. The second fit has the same data, batches,
    optimizer, schedules and epochs as the first, and of client callbacks those that the module's
    ``configure_callbacks`` gives. It begins with a new optimizer in each round; with ``client_state="carry"`` it goes
    on with its own, and with its schedules. It takes as long again.

    Args:
        lam: The strength of the term, >= 0; with 0 each client trains on alone.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[Ditto(lam=0.1)])
    """

    def __init__(self, lam: float = 0.1) -> None:
        require(self, lam=(lam, lambda number: number >= 0, ">= 0"))
        self.lam = lam

    def second_fit(self, received: Mapping[str, Tensor], first: Sequence[Callback]) -> Sequence[Callback]:
        """Return the callbacks of the fit of the client's own model."""
        return [HeldNear(self.lam, received)]


class HeldNear(Callback):
    """Adds the gradient ``lam (v - x)``; of what has no gradient nothing is added.

    Args:
        lam: The strength of the term.
        x: The weights that came, by the names of the state dict.
    """

    def __init__(self, lam: float, x: Mapping[str, Tensor]) -> None:
        self.lam, self._x = lam, x
        self._anchor: dict[nn.Parameter, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find each parameter's anchor; personal ones have none."""
        entries = entries_of_parameters(pl_module)
        named = [(p, self._x[entries[n]]) for n, p in pl_module.named_parameters() if entries.get(n) in self._x]
        self._anchor = {p: x.to(p, copy=True) for p, x in named}
        self._begin, self._is_heard = {p: p.detach().clone() for p, _ in named}, False

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the term to this optimizer's parameters."""
        self._is_heard = True
        for p, gradient in with_gradients(optimizer, self._anchor):
            gradient.add_(p - self._anchor[p], alpha=self.lam)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the term was added."""
        refuse_unheard("Ditto", self._is_heard, self._begin)
        self._anchor, self._begin = {}, {}

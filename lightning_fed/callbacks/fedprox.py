"""FedProx: local training is held near the round's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.callbacks.local_steps import refuse_unheard, shared_parameters, with_gradients
from lightning_fed.errors import require


class FedProx(FederatedCallback):
    """Adds the proximal term ``mu / 2 * ||w - w_t||^2`` to every client's objective (Li et al. 2020, equation 2).

    https://arxiv.org/abs/1812.06127. The term's exact gradient ``mu * (w - w_t)`` is added to each parameter's gradient
    before it is clipped and stepped, with any optimizer, automatic or manual, in any precision; losses that the user
    logs stay without it. It goes with any aggregation.

    Args:
        mu: The strength of the term, >= 0.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedProx(mu=0.1)])
    """

    def __init__(self, mu: float) -> None:
        require(self, mu=(mu, lambda number: number >= 0, ">= 0"))
        self.mu = mu

    def local_callbacks(self) -> Sequence[Callback]:
        """Return the callback that adds the gradient."""
        return [ProximalTerm(self.mu)]


class ProximalTerm(Callback):
    """FedProx's part in local training; a plain Lightning callback.

    Args:
        mu: The strength of the term.
    """

    acts_elementwise = True  # so vectorized clients may have it
    adds_to_objective = True

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self._anchor: dict[nn.Parameter, Tensor] = {}
        self._is_heard = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the round's weights; personal ones are not the round's."""
        self._anchor = {p: p.detach().clone() for p in shared_parameters(trainer, pl_module)}
        self._is_heard = False

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the term to this optimizer's parameters; those that are not trained have none."""
        self._is_heard = True
        for p, gradient in with_gradients(optimizer, self._anchor):
            gradient.add_(p - self._anchor[p], alpha=self.mu)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release the remembered weights."""
        refuse_unheard("FedProx", self._is_heard, self._anchor)
        self._anchor = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the remembered weights."""
        self._anchor = {}

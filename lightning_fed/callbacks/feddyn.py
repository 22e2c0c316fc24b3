"""FedDyn: each client's objective is changed so that all have the same minimum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_fed.callbacks.base import Averaging
from lightning_fed.callbacks.local_steps import refuse_unheard, shared_parameters, with_gradients, zeros_of
from lightning_fed.client.local.method import LocalMethod
from lightning_fed.errors import ClientError, require
from lightning_fed.strategies import DynamicMean

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class FedDyn(Averaging):
    """Each client has a linear and a proximal term that move with what it did before (Acar et al. 2021, Algorithm 1).

    https://arxiv.org/abs/2111.04263. A client that gets ``x`` steps by ``g - lambda_i + alpha (w - x)``, with any
    optimizer; afterwards ``lambda_i = lambda_i - alpha (y_i - x)``, which stays with it. The server has
    ``h = h - alpha / N sum_S (y_i - x)``, and sends ``mean_S(y_i) - h / alpha`` to the clients that train next. The
    module's weights, which are evaluated, saved and there at the end, are ``mean_S(y_i)``, all clients alike. All of
    it begins at zero and acts on parameters that travel; buffers take the mean.

    Args:
        alpha: The strength of the terms, > 0.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedDyn(alpha=0.01)])
    """

    def __init__(self, alpha: float = 0.01) -> None:
        super().__init__("uniform")
        require(self, alpha=(alpha, lambda number: number > 0, "> 0"))
        self.alpha = alpha
        self._num_clients = 0

    def server_strategy(self, strategy: Strategy | None) -> Strategy:
        """Return the mean that sends shifted weights."""
        return DynamicMean(alpha=self.alpha, num_clients=lambda: self._num_clients)

    def local_callbacks(self) -> Sequence[Callback]:
        """Return the client's part."""
        return [DynamicTerm(self.alpha)]

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Take note of how many clients there are."""
        self._num_clients = trainer.num_clients


class DynamicTerm(LocalMethod):
    """The client's part of FedDyn; its memory is ``lambda_i``, in float32 or wider.

    Args:
        alpha: The strength of the terms.
    """

    acts_elementwise = True
    adds_to_objective = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def initial_memory(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return zeros, also of parameters that do not train now."""
        return zeros_of(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what came."""
        shared = shared_parameters(trainer, pl_module)
        if unknown := shared.values() - self.memory.keys():
            raise ClientError(
                f"has {min(unknown)!r}, of which FedDyn remembers nothing: it was not shared when the client took part"
                " first. Name what is personal as then, or begin a run with the weights as they are now."
            )
        self._names, self._begin, self._is_heard = shared, {p: p.detach().clone() for p in shared}, False

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the terms' gradients to this optimizer's parameters; those that are not trained have none."""
        self._is_heard = True
        for p, gradient in with_gradients(optimizer, self._begin):
            change = self.alpha * (p - self._begin[p]) - self.memory[self._names[p]]
            gradient += change.to(gradient.dtype)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the new ``lambda_i``."""
        refuse_unheard("FedDyn", self._is_heard, self._begin)
        moved = {self._names[p]: p.detach() - begin for p, begin in self._begin.items()}
        self.memory = {name: self.memory[name] - self.alpha * change for name, change in moved.items()}
        self._names, self._begin = {}, {}

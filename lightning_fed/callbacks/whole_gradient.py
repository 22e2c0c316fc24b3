"""The gradient of a client's whole objective at the weights that it received."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed._compat.lightning import combined_loader
from lightning_fed.callbacks.local_steps import parameters_of, refuse_unheard, shared_parameters
from lightning_fed.client.local.examples import CountExamples
from lightning_fed.client.local.method import LocalMethod
from lightning_fed.errors import ClientError


class WholeGradient(LocalMethod):
    """Sends the gradient over all batches of a pass in which nothing steps, by the names of parameters that travel.

    A batch's gradient counts by its examples: the objective is the mean over all examples where a loss is the mean over
    its batch. Gradients are taken at a step, before they are clipped, with the terms that methods have added; of
    several steps of a parameter in one batch the mean counts. They are float32 or wider. Of what has had no gradient in
    the whole pass there is none.

    Args:
        method: Whose pass it is, for errors.
    """

    def __init__(self, method: str) -> None:
        self._method, self._counter = method, CountExamples()
        self._names: dict[nn.Parameter, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to sum."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ClientError(
                f"trains in float16, where batches whose scaled gradients overflow are left out: {self._method} has no"
                " gradient over all of them. Write precision='bf16-mixed' or '32-true', or another option."
            )
        loaders = combined_loader(trainer.fit_loop)
        assert loaders is not None
        self._counter.look_at(loaders)
        self._names = shared_parameters(trainer, pl_module)
        self._begin, self._is_heard = {p: p.detach().clone() for p in pl_module.parameters()}, False
        self._sum: dict[str, Tensor] = {}
        self._examples: dict[str, int] = {}
        # Of the batch at hand: how often a parameter's optimizer stepped, and the sum of its gradients.
        self._steps: dict[str, int] = {}
        self._of_batch: dict[str, Tensor] = {}
        self._since_step = 0

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients: what has none does not move."""
        self._is_heard = True
        for p in parameters_of(optimizer):
            if (name := self._names.get(p)) is not None:
                self._steps[name] = self._steps.get(name, 0) + 1
                if p.grad is not None:
                    gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
                    gradient = gradient.to(torch.promote_types(p.dtype, torch.float32))
                    self._of_batch[name] = self._of_batch[name] + gradient if name in self._of_batch else gradient
            p.grad = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add what the batch has given, with all batches since the last step, which are in its gradient."""
        if batch is not None:
            self._since_step += self._counter.examples_of(batch)
        if not self._steps:
            return
        for name, gradient in self._of_batch.items():
            weighted = gradient * (self._since_step / self._steps[name])
            self._sum[name] = self._sum[name] + weighted if name in self._sum else weighted
        for name in self._steps:
            self._examples[name] = self._examples.get(name, 0) + self._since_step
        self._steps, self._of_batch, self._since_step = {}, {}, 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the mean."""
        refuse_unheard(self._method, self._is_heard, self._begin)
        if moved := [name for name, p in pl_module.named_parameters() if not torch.equal(p, self._begin[p])]:
            raise ClientError(
                f"changes {moved[0]!r} in a pass in which no optimizer steps (it clamps or sets weights, or its"
                f" optimizer moves them without a gradient): {self._method} has no gradient at the weights that it"
                " received. Use another option.",
                tensor=moved[0],
            )
        self.sent = {name: total / self._examples[name] for name, total in self._sum.items()}
        self._names, self._begin, self._sum = {}, {}, {}

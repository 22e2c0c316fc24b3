"""The gradient of a client's whole objective at the weights that it received."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed._compat.lightning import combined_loader
from lightning_fed.callbacks.local_steps import parameters_of, shared_parameters, unheard
from lightning_fed.client.local.examples import CountExamples
from lightning_fed.client.local.method import LocalMethod
from lightning_fed.errors import ClientError


class WholeGradient(LocalMethod):
    """Sends the gradient over all batches of a pass in which nothing steps, by the names of parameters that travel.

    A batch's gradient counts by its examples: the objective is the mean over all examples where a loss is the mean over
    its batch; a batch without a loss does not count. Gradients are taken at a step, before they are clipped, with the
    terms that methods have added, and stay for all hooks that read them; of several steps of a parameter in one batch
    the mean counts. They are float32 or wider. Of what has had no gradient in the whole pass there is none. An
    optimizer's step runs its closure and nothing else.

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
        self._begin = {p: p.detach().clone() for p in pl_module.parameters()}
        self._sum: dict[str, Tensor] = {}
        self._examples: dict[str, int] = {}
        # Of the batch at hand: how often a parameter's optimizer stepped, and the sum of its gradients.
        self._steps: dict[str, int] = {}
        self._of_batch: dict[str, Tensor] = {}
        self._has_gradient = False
        # Gradients that no step has taken by the end of their batch.
        self._left: dict[nn.Parameter, Tensor] = {}
        self._is_heard = False
        for optimizer in trainer.optimizers:  # what a fit changes in optimizers is restored after it
            optimizer.step = self._run_closure  # type: ignore[method-assign]

    def _run_closure(self, closure: Callable[[], Any] | None = None, *_: object, **__: object) -> Any:
        """Stand in for an optimizer's step."""
        loss = None if closure is None else closure()
        if not self._is_heard:
            raise unheard(self._method)
        self._is_heard = False
        return loss

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a batch: what stepped in the last one has no gradient."""
        for p, name in self._names.items():
            if name in self._steps:
                p.grad = None
        self._steps, self._of_batch, self._has_gradient = {}, {}, False

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients."""
        self._is_heard = True
        for p in parameters_of(optimizer):
            self._has_gradient |= p.grad is not None
            if (name := self._names.get(p)) is None:
                continue
            self._steps[name] = self._steps.get(name, 0) + 1
            if p.grad is not None:
                if self._left.get(p) is p.grad:
                    raise self._accumulates()
                gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
                # A copy, for p.grad may be clipped.
                gradient = gradient.to(torch.promote_types(p.dtype, torch.float32), copy=True)
                self._of_batch[name] = self._of_batch[name] + gradient if name in self._of_batch else gradient

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add what the batch has given."""
        left = {p: p.grad for p, name in self._names.items() if p.grad is not None and name not in self._steps}
        if not self._steps and any(self._left.get(p) is not gradient for p, gradient in left.items()):
            raise self._accumulates()
        self._left = left
        # By hand a step may return nothing.
        has_loss = bool(outputs) if pl_module.automatic_optimization else self._has_gradient
        if batch is None or not has_loss:
            return
        examples = self._counter.examples_of(batch)
        for name, gradient in self._of_batch.items():
            weighted = gradient * (examples / self._steps[name])
            self._sum[name] = self._sum[name] + weighted if name in self._sum else weighted
        for name in self._steps:
            self._examples[name] = self._examples.get(name, 0) + examples

    def _accumulates(self) -> ClientError:
        return ClientError(
            "computes gradients in a batch in which no optimizer takes them (it accumulates them by hand, or its"
            f" optimizer_step calls the closure alone), and nothing tells {self._method} what they have to count. Step"
            " in each batch, accumulate with FederatedTrainer(accumulate_grad_batches=...), or use another option."
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the mean."""
        if moved := [name for name, p in pl_module.named_parameters() if not torch.equal(p, self._begin[p])]:
            raise ClientError(
                f"changes {moved[0]!r} in a pass in which no optimizer steps (it clamps or sets weights, or its"
                f" optimizer moves them without a gradient): {self._method} has no gradient at the weights that it"
                " received. Use another option.",
                tensor=moved[0],
            )
        self.sent = {name: total / self._examples[name] for name, total in self._sum.items()}
        self._names, self._begin, self._sum, self._of_batch, self._left = {}, {}, {}, {}, {}

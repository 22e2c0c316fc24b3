"""Lightning's automatic optimization for vectorized clients with compiled steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_fed._compat.torch import gradient_hooks
from lightning_fed.client.local.fast_loop import FastOptimization, StepHooks
from lightning_fed.client.vectorized.step_function import SgdUpdate


class StackedOptimization(FastOptimization):
    """Automatic optimization that takes gradients which are there before the backward pass, and whole updates.

    Attributes:
        update: What stands for the optimizer in a compiled step, in this epoch; ``None`` where others act on it.
    """

    trainer: Any  # a CohortTrainer
    update: SgdUpdate | None = None

    _takes = False
    _gradients: Sequence[tuple[Tensor, Tensor]] = ()

    def prepare(self, hooks: StepHooks, is_plain: bool) -> None:
        """Look, too, whether the optimizer's step can be the last part of a compiled one."""
        super().prepare(hooks, is_plain)
        trainer, self.update, self._takes = self.trainer, None, False
        if self.hooks is None or trainer.compiled is None:
            return
        optimizer, parameters = trainer.optimizers[0], trainer.stack.parameters
        self._takes = not any(any(gradient_hooks(p)) for p in parameters.values())
        is_apart = self._takes and not (hooks or self.clips or trainer.lr_scheduler_configs)
        if is_apart and SgdUpdate.can_stand_for(optimizer, parameters):
            self.update = SgdUpdate(optimizer, parameters)

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        """Do as Lightning's; a compiled update is all of it."""
        if not self.trainer.run_update(kwargs["batch"], batch_idx):
            return super().run(optimizer, batch_idx, kwargs)
        progress = self.optim_progress.optimizer
        progress.zero_grad.increment_by(1)
        progress.step.increment_by(1)
        return {}

    def takes(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Take parameters' gradients for the backward pass to come, unless that has to be a real one."""
        self._gradients = gradients if self._takes else ()
        return self._takes

    def release(self) -> None:
        """Let go of momentum, which a trainer that is over would keep."""
        self.update = None

    def backward(self, loss: Tensor) -> None:
        gradients, self._gradients = self._gradients, ()
        if not gradients:
            super().backward(loss)
        for parameter, gradient in gradients:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

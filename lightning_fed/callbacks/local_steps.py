"""What methods that follow a client's optimizer step by step have in common."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed.errors import ClientError
from lightning_fed.values.weights import is_averaged


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return an optimizer's parameters."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def with_gradients(optimizer: Optimizer, among: Container[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Give those of an optimizer's parameters that are among some and have a gradient, and that, dense from then on.

    What is added to it is dense: rows without a gradient have their part in it, too.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p in among:
                if p.grad.is_sparse:
                    p.grad = p.grad.to_dense()
                yield p, p.grad


def zeros_of(module: LightningModule, frozen: bool = True) -> dict[str, Tensor]:
    """Return zeros like a module's parameters by name, in float32 or wider.

    Args:
        module: The module.
        frozen: Whether those count that do not train now.
    """
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in trainable_in(module).items()
        if p.requires_grad or frozen
    }


def shared_parameters(trainer: Trainer, module: LightningModule) -> dict[nn.Parameter, str]:
    """Return the parameters of a client's module that travel, with their names.

    Some may not train now: that can change within a fit, and a parameter's gradient tells at each step.
    """
    stay = {*getattr(trainer, "personal", ()), *getattr(trainer, "frozen", ())}
    return {p: name for name, p in trainable_in(module).items() if name not in stay}


def trainable_in(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that may have gradients, by name; quantized weights are integers, and have none."""
    return {name: p for name, p in module.named_parameters() if is_averaged(p)}


def refuse_unheard(method: str, is_heard: bool, begin: Mapping[nn.Parameter, Tensor]) -> None:
    """Refuse a fit that has trained and called no hook before its steps: the method did nothing in it.

    Args:
        method: The method.
        is_heard: Whether ``on_before_optimizer_step`` was called in the fit.
        begin: Copies of what parameters began with.

    Raises:
        ClientError: If it was not, and one that trains has changed.
    """
    if not is_heard and any(not torch.equal(p, before) for p, before in begin.items() if p.requires_grad):
        raise unheard(method)


def unheard(method: str) -> ClientError:
    """Return what is said of a step that no hook comes before."""
    return ClientError(
        f"steps an optimizer past Lightning, so {method} hears of no step: on_before_optimizer_step is not called for"
        " self.optimizers(use_pl_optimizer=False), nor for `optimizer.optimizer`. Step what self.optimizers() gives."
    )


def is_skipped(trainer: Trainer, grads: Sequence[Tensor | None]) -> bool:
    """Return whether a gradient scaler will leave the step with these gradients out."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return False
    return not all(grad.isfinite().all() for grad in grads if grad is not None)

"""A step of vectorized clients, as a function of tensors: what ``torch.compile`` makes one graph of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.optim import SGD, Optimizer
from torch.optim.sgd import sgd

from lightning_fed._compat.torch import step_hooks

_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
_Groups = list[tuple[list[str], dict[str, Any]]]


class Here:
    """What a step reads and writes beside its arguments, whose values would all be guarded on.

    Attributes:
        batch_idx: The batch's index.
        logged: What the module logs, by name; it holds this object as ``_here``.
    """

    def __init__(self) -> None:
        self.batch_idx = 0
        self.logged: dict[str, Tensor] = {}


class SgdUpdate:
    """The step of a ``torch.optim.SGD`` with the options that it has now, by torch's own function, to stand in a graph.

    Momentum begins as zeros, from which its first step makes what SGD makes of none.

    Args:
        optimizer: One that it ``can_stand_for``.
        parameters: The stacked parameters, by name.

    Attributes:
        groups: The names and options of the optimizer's groups.
        momenta: The optimizer's momentum buffers, by name.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._optimizer = optimizer
        self.groups: _Groups = []
        self.momenta: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            self.groups.append(([names[id(p)] for p in group["params"]], _options(group)))
            for parameter in group["params"] if group["momentum"] else ():
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                self.momenta[names[id(parameter)]] = state["momentum_buffer"]

    @staticmethod
    def can_stand_for(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> bool:
        """Return whether an optimizer is such an SGD, which steps all that is trained, and nobody has a hand in it."""
        groups = optimizer.param_groups
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        return (
            type(optimizer) is SGD
            and stepped == {id(parameter) for parameter in parameters.values() if parameter.requires_grad}
            and all(type(group["lr"]) is float and not group["differentiable"] for group in groups)
            and not any(group["momentum"] and group["dampening"] for group in groups)
            and not list(step_hooks(optimizer))
            and not {"step", "zero_grad"} & vars(optimizer).keys()
        )

    def is_current(self) -> bool:
        """Return whether the optimizer still has the options that it had."""
        return [_options(group) for group in self._optimizer.param_groups] == [options for _, options in self.groups]


def step_of_all(module: nn.Module, step: Any, here: Here) -> Callable[..., Any]:
    """Return the function ``(trained, fixed, batch) -> (gradients, loss, logged, buffers)`` of stacked tensors.

    Args:
        module: The clients' module.
        step: The user's ``training_step``, as a function of module, batch and its index.
        here: Tells it the batch's index, and takes what it logs.
    """
    whole = _Whole(module, step)

    def one(trained: Any, fixed: Any, batch: Any) -> Any:
        here.logged = {}
        # Written to by BatchNorm, which the gradient's transform forbids for what comes from outside.
        fixed = {name: tensor.clone() for name, tensor in fixed.items()}
        held = {f"module.{name}": tensor for name, tensor in (*trained.items(), *fixed.items())}
        given, buffers = functional_call(whole, held, (batch, here))
        loss = given["loss"] if isinstance(given, dict) else given
        logged = {name: value.detach() for name, value in here.logged.items()}
        here.logged = {}
        return loss.reshape(()), (logged, buffers)

    mapped = vmap(grad_and_value(one, has_aux=True), in_dims=(0, 0, 0))

    def stacked_step(trained: Any, fixed: Any, batch: Any) -> Any:
        if not torch.compiler.is_compiling():  # an update that nobody would notice
            raise RuntimeError("torch.compile ran the step as it is written")
        gradients, (losses, (logged, buffers)) = mapped(trained, fixed, batch)
        return gradients, losses.sum(), logged, buffers

    return stacked_step


def update_of_all(module: nn.Module, step: Any, here: Here, groups: _Groups) -> Callable[..., Any]:
    """Do as ``step_of_all``, with ``momenta`` for a last argument; it steps ``trained`` and ``momenta`` as SGD does."""
    backward = step_of_all(module, step, here)

    def stacked_step(trained: Any, fixed: Any, batch: Any, momenta: Any) -> Any:
        gradients, loss, logged, buffers = backward(trained, fixed, batch)
        logged = {name: value.clone() for name, value in logged.items()}  # a weight, as it was before the update
        for names, options in groups:
            held, given = [trained[name] for name in names], [gradients[name] for name in names]
            sgd(held, given, [momenta.get(name) for name in names], foreach=False, fused=False, **options)
        return gradients, loss, logged, buffers

    return stacked_step


class _Whole(nn.Module):
    """The user's step as the ``forward`` that ``functional_call`` calls."""

    def __init__(self, module: nn.Module, step: Any) -> None:
        super().__init__()
        self.module = module
        self._step = step

    def forward(self, batch: Any, here: Here) -> tuple[Any, dict[str, Tensor]]:
        given = self._step(self.module, batch, here.batch_idx)
        return given, dict(self.module.named_buffers())  # as they are now, also those that were put in place of others


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in _OPTIONS}

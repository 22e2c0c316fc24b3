"""Client callbacks that hold a layer, or have a state."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn


class Freeze(Callback):
    """Freezes a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.layer.requires_grad_(False)


class Decays(Callback):
    """Scales gradients down with each step that it has seen."""

    def __init__(self) -> None:
        self.steps, self.mean, self.loaded = 0, torch.zeros(()), 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1
        self.mean = 0.9 * self.mean + pl_module.net[2].bias.grad.mean()
        for parameter in pl_module.parameters():
            parameter.grad = parameter.grad / self.steps + self.mean

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": self.mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.mean = state_dict["steps"], state_dict["mean"]


class Scales(Decays):
    """As ``Decays``, also for layers without a gradient."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad / self.steps

"""FedDyn's server: the weights that it gives are the clients' mean, those that it sends are shifted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from lightning_fed.strategies.server_optimizers import ServerOptimizer
from lightning_fed.values.running_mean import RunningMean
from lightning_fed.values.weights import Weights
from lightning_fed.wire import messages


class DynamicMean(ServerOptimizer):
    """Sends ``x - h / alpha`` to train, and ``x`` to evaluate; then ``x = mean_S(y_i)`` (Acar et al. 2021).

    ``h = h - alpha / N sum_S (y_i - sent)``, for parameters alone: buffers are sent as they are.

    Args:
        alpha: The strength of the clients' term.
        num_clients: Gives ``N``: how many clients there are, of whom ``S`` have trained.
        **kwargs: As ``WeightedMean``.
    """

    def __init__(self, *, alpha: float, num_clients: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(uniform=True, **kwargs)
        self.alpha, self.num_clients = alpha, num_clients

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Do as ``WeightedMean``, with shifted parameters."""
        sent = {name: self._shifted(name, x) for name, x in messages.unpack(arrays).items()}
        return super().configure_train(server_round, messages.pack(sent), config, grid)

    def _shifted(self, name: str, x: Tensor) -> Tensor:
        if name not in self.moments.get("h", {}):  # a buffer, or the first round
            return x
        wide = x.to(_wide(x))
        return (wide - self.moment("h", name, wide) / self.alpha).to(x.dtype)

    def finish(self, mean: RunningMean) -> Weights:
        """Return the mean, and move ``h`` by how far it is from what was sent."""
        new, share = mean.value(), mean.total / self.num_clients()
        for name, y in new.items():
            if self.parameters is None or name in self.parameters:
                x = self._weights[name].to(device=y.device, dtype=_wide(y))
                self.keep("h", name, self.step(name, x, self.alpha * share * (y.to(x) - x)))
        return new

    def step(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        """Return the new ``h``."""
        return self.moment("h", name, x) - delta


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

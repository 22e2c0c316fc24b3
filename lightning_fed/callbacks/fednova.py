"""FedNova: clients that made more steps than others do not pull the mean towards them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_fed.callbacks.base import Averaging, ClientReport
from lightning_fed.callbacks.fedprox import ProximalTerm
from lightning_fed.callbacks.local_steps import is_skipped, refuse_unheard, shared_parameters
from lightning_fed.client.local.method import LocalMethod
from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.strategies import NormalizedMean
from lightning_fed.strategies.normalized import Progress

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class FedNova(Averaging):
    """Each client's update is divided by how far its optimizer went (Wang et al. 2020, equation 7).

    https://arxiv.org/abs/2007.07481. ``x = x + (sum_i p_i a_i) sum_i p_i (y_i - x) / a_i`` on parameters, ``p_i`` by
    examples; buffers take the mean. ``a_i`` is the number of steps for plain SGD; it follows momentum, Nesterov,
    dampening and the learning rate from step to step, as torch's SGD has them. With ``FedProx`` in the run it also
    follows the proximal term, and the factor in front has the ``a_i`` that would be there without that. Clients train
    with ``torch.optim.SGD``, whose momentum begins anew in each round. Where all ``a_i`` are equal it is FedAvg, bit
    for bit.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedNova()])
    """

    def __init__(self) -> None:
        super().__init__("examples")
        self._progress: dict[int, Progress] = {}

    def server_strategy(self, strategy: Strategy | None) -> Strategy:
        """Return the normalized mean."""
        return NormalizedMean(self._progress)

    def local_callbacks(self) -> Sequence[Callback]:
        """Return the client's part."""
        return [StepCounter()]

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Check that momentum begins anew."""
        if trainer.local_options.client_state == "carry":
            raise ConfigurationError(
                "FedNova: client_state='carry' lets a client's momentum go on from round to round, and its update would"
                " have steps of the rounds before in it, which nothing counts. Leave client_state out: schedules go on,"
                " and momentum begins anew."
            )

    def tensors_to_client(self, trainer: FederatedTrainer, round: int, client: int) -> Mapping[str, Tensor]:
        """Return what has the form of the answer."""
        return {"normalizer": torch.zeros(()), "steps": torch.zeros(())}

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that the update can be divided by it."""
        if wrong := [f"{name}={float(number):g}" for name, number in tensors.items() if not number > 0]:
            raise ClientError(f"sent {' and '.join(wrong)} for FedNova, which divides by it; it is greater than 0.")

    def tensors_from_client(
        self, trainer: FederatedTrainer, round: int, report: ClientReport, tensors: Mapping[str, Tensor]
    ) -> None:
        """Tell the strategy how far the client went."""
        progress = Progress(float(tensors["normalizer"]), float(tensors["steps"]))
        self._progress[trainer.node_of(report.client)] = progress


class StepCounter(LocalMethod):
    """The client's part of FedNova. It sends ``normalizer`` and ``steps``, float64 scalars.

    Both are counted in learning rates (a step at a rate of 0.1 counts 0.1), so that schedules count; the unit cancels
    out at the server.
    """

    acts_elementwise = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the optimizer, and begin to count."""
        callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        terms = [callback for callback in callbacks if isinstance(callback, ProximalTerm)]
        self._held_back, self._free = _Distance(sum(term.mu for term in terms)), _Distance()
        self._begin = {p: p.detach().clone() for p in shared_parameters(trainer, pl_module)}
        self._is_heard = False
        _refuse_unknown(trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count a step of what travels; one that trains a personal head alone is none."""
        self._is_heard, groups = True, optimizer.param_groups
        stepped = [p for group in groups for p in group["params"] if p.grad is not None]
        if self._begin.keys().isdisjoint(stepped) or is_skipped(trainer, [p.grad for p in stepped]):
            return
        _refuse_unequal(groups)
        self._held_back.step(groups[0])
        self._free.step(groups[0])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send how far it went."""
        refuse_unheard("FedNova", self._is_heard, self._begin)
        self._begin = {}
        if not self._held_back.covered > 0:
            raise ClientError(
                f"trained with steps that add up to {self._held_back.covered:g} learning rates, by which FedNova cannot"
                " divide: its learning rate is 0 through the round, or times FedProx's mu of"
                f" {self._held_back.mu:g} greater than 1. Write a learning rate between."
            )
        numbers = {"normalizer": self._held_back.covered, "steps": self._free.covered}
        # With the clients in front, if there are several: all have made the same steps.
        self.sent = {
            name: torch.full(self.received[name].shape, number, dtype=torch.float64) for name, number in numbers.items()
        }


@dataclass
class _Distance:
    """The sum of the coefficients with which gradients are in ``x - w``: where SGD would be if each of them was one.

    Attributes:
        mu: The strength of a proximal term, which pulls back.
        covered: The distance so far.
    """

    mu: float = 0.0
    covered: float = 0.0
    _buffer: float | None = None

    def step(self, group: Mapping[str, Any]) -> None:
        """Do as torch's SGD does."""
        change = 1 - self.mu * self.covered
        if rho := group["momentum"]:
            kept = 1 - group["dampening"]
            self._buffer = change if self._buffer is None else rho * self._buffer + kept * change
            change = change + rho * self._buffer if group["nesterov"] else self._buffer
        self.covered += float(group["lr"]) * change


def _refuse_unknown(optimizers: Sequence[Optimizer]) -> None:
    if len(optimizers) != 1:
        raise ClientError(f"trains with {len(optimizers)} optimizers; FedNova counts the steps of one. {_WAY_OUT}")
    own = getattr(optimizers[0], "optimizer", optimizers[0])
    if type(own) is not SGD:
        raise ClientError(
            f"trains with {type(own).__name__}; FedNova knows how far torch.optim.SGD goes, with momentum and weight"
            f" decay, and no other. {_WAY_OUT}"
        )
    if own.state:
        raise ClientError("goes on with the momentum of an earlier round, where FedNova's begins anew in each.")


_WAY_OUT = "Write that, or Scaffold() or FedAvg(), which take any."
_OPTIONS = ("lr", "momentum", "dampening", "nesterov")


def _refuse_unequal(groups: Sequence[Mapping[str, Any]]) -> None:
    for option in _OPTIONS:
        values = {float(group[option]) for group in groups}
        if len(values) > 1:
            raise ClientError(
                f"has parameter groups with {option}={' and '.join(f'{v:g}' for v in sorted(values))}: how far it goes"
                f" is one number for FedNova. Give all groups the same {option}, or write Scaffold() or FedAvg()."
            )

"""SCAFFOLD: control variates correct the drift of local training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_fed.callbacks.base import Averaging, ClientReport, FederatedCallback, Stage
from lightning_fed.callbacks.fedavg import FedAvg, FedAvgM
from lightning_fed.callbacks.local_steps import is_skipped, refuse_unheard, shared_parameters, zeros_of
from lightning_fed.callbacks.whole_gradient import WholeGradient
from lightning_fed.client.local.method import LocalMethod, of_method
from lightning_fed.errors import ClientError, ConfigurationError, require

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer

Option = Literal["running", "I", "II"]


class Scaffold(FederatedCallback):
    """Each client's gradient is corrected by how it differs from all clients' (Karimireddy et al. 2020, Algorithm 1).

    https://arxiv.org/abs/1910.06378. A client steps by ``g + c - c_i``; its control ``c_i`` becomes the mean of its
    uncorrected gradients ``g`` of the round, and the server's becomes ``c + 1/N sum_S (c_i+ - c_i)``, with ``N``
    clients of which ``S`` have trained. For plain SGD that is the paper's option II, to rounding; it needs no learning
    rate and stays right with momentum, Adam, schedules and several optimizers. Parameters alone have controls, in
    float32 or wider, and all begin at zero; a client's own stays with it. ``g`` is the gradient of the objective with
    the terms that ``FedProx`` and ``FedDyn`` add, before it is clipped: with clipping, option II has other controls.

    The weights become ``x + server_learning_rate * mean_S(y_i - x)``, all clients alike, unless another callback
    decides the aggregation.

    Args:
        server_learning_rate: The server's step, > 0.
        option: ``"running"``, or one of the paper's. ``"I"``: ``c_i+`` is the gradient of the client's whole objective
            at the weights received, ``grad f_i(x)``, over one more pass over its data before its fit, in which nothing
            steps. Copies of the client callbacks act in it, for what they do to batches and losses. A batch counts by
            its examples there: ``f_i`` is the mean over the client's examples where a loss is the mean over its batch.
            It is right with any optimizer, and refuses float16's scaled losses and gradients accumulated by hand.
            ``"II"``: ``c_i+ = c_i - c + (x - y_i) / (K lr)``, for plain SGD with one learning rate a round.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[Scaffold()])
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[Scaffold(option="I")])
    """

    def __init__(self, server_learning_rate: float = 1.0, option: Option = "running") -> None:
        require(self, server_learning_rate=(server_learning_rate, lambda number: number > 0, "> 0"))
        if option not in get_args(Option):
            raise ConfigurationError(f"Scaffold(option={option!r}): write 'running', 'I' or 'II'.")
        self.server_learning_rate, self.option = server_learning_rate, option
        self._control: dict[str, Tensor] = {}
        self._change: dict[str, Tensor] = {}

    def aggregation(self) -> Averaging:
        """Return the aggregation where no callback decides it."""
        if self.server_learning_rate == 1:
            return FedAvg(weighting="uniform")
        return FedAvgM(learning_rate=self.server_learning_rate, momentum=0.0, weighting="uniform")

    def server_strategy(self, strategy: Strategy | None) -> Strategy | None:
        """Check that the server's learning rate is used."""
        if self.server_learning_rate not in (1, getattr(strategy, "learning_rate", 1)):
            raise ConfigurationError(
                f"Scaffold(server_learning_rate={self.server_learning_rate}) goes with its own aggregation, and another"
                f" callback decides it ({type(strategy).__name__}): give that one the learning rate."
            )
        return strategy

    def local_callbacks(self) -> Sequence[Callback]:
        """Return the client's part."""
        return [ControlVariates(self.option)]

    def pass_before(self) -> Sequence[Callback]:
        """Return what takes the gradient of a client's whole objective, for option I."""
        return [WholeGradient("Scaffold")] if self.option == "I" else []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; what a checkpoint holds comes after."""
        if stage == "fit":
            self._control = {}

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Make the controls, or check those that a checkpoint held."""
        personal = trainer.personal
        zeros = {n: zero for n, zero in zeros_of(trainer.lightning_module, frozen=False).items() if n not in personal}
        if self._control and _forms(self._control) != _forms(zeros):
            wrong = sorted(set(_forms(self._control).items()) ^ set(_forms(zeros).items()))[0][0]
            raise ConfigurationError(
                f"Scaffold: the checkpoint has controls of other parameters than those that train now; {wrong!r} is the"
                " first. Go on with the module as it was, or begin with the weights alone:"
                " `MyModule.load_from_checkpoint(path)`, and fit that without ckpt_path."
            )
        self._control = self._control or zeros

    def on_round_start(self, trainer: FederatedTrainer, round: int, stage: Stage, cohort: Sequence[int]) -> None:
        """Begin to sum."""
        if stage == "train":
            self._change = {name: torch.zeros_like(c, dtype=_wide(c)) for name, c in self._control.items()}

    def tensors_to_client(self, trainer: FederatedTrainer, round: int, client: int) -> Mapping[str, Tensor]:
        """Return the server's control ``c``."""
        return self._control

    def tensors_from_client(
        self, trainer: FederatedTrainer, round: int, report: ClientReport, tensors: Mapping[str, Tensor]
    ) -> None:
        """Add ``c_i+ - c_i``."""
        for name, change in self._change.items():
            change += tensors[name]

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Move the control."""
        total = trainer.num_clients
        self._control = {name: (c + self._change[name] / total).to(c.dtype) for name, c in self._control.items()}
        self._change = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the server's control."""
        return {"control": dict(self._control)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._control = dict(state_dict["control"])


class ControlVariates(LocalMethod):
    """The client's part of SCAFFOLD; its memory is ``c_i``.

    Args:
        option: As for ``Scaffold``.
    """

    acts_elementwise = True

    def __init__(self, option: Option = "running") -> None:
        self.option = option

    def initial_memory(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return zeros, also of parameters that do not train now."""
        return zeros_of(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the correction ``c - c_i``."""
        self._names = shared_parameters(trainer, pl_module)
        self._whole = of_method(self.received, "before")
        control = {name: c for name, c in self.received.items() if not name.startswith("before/")}
        self.memory = {name: self.memory[name] for name in control}
        self._correction = {name: control[name] - own for name, own in self.memory.items()}
        self._sum = {name: torch.zeros_like(own) for name, own in self.memory.items()}
        self._steps = dict.fromkeys(self.memory, 0)
        self._begin, self._is_heard = {p: p.detach().clone() for p in self._names}, False
        self._rates: dict[str, float] = {}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sum this optimizer's gradients, and correct them; those of a step that is skipped do not count."""
        self._is_heard = True
        shared = [(group, p) for group in optimizer.param_groups for p in group["params"] if p in self._names]
        own = [(group, p) for group, p in shared if p.grad is not None]
        if is_skipped(trainer, [p.grad for _, p in own]):
            return
        for group, p in own:
            name = self._names[p]
            if name not in self.memory:
                raise ClientError(
                    f"trains {name!r}, of which Scaffold has no control: it did not train when the run began. Let it"
                    " have requires_grad=True then, or begin a run with the weights as they are now."
                )
            self._steps[name] += 1
            if self.option == "II":
                self._rates.setdefault(name, _rate(optimizer, group))
                if self._rates[name] != group["lr"]:
                    raise ClientError("changes its learning rate within a round: write Scaffold(option='running').")
            if p.grad.is_sparse:  # the correction is not
                p.grad = p.grad.to_dense()
            self._sum[name] += p.grad
            p.grad += self._correction[name].to(p.grad.dtype)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep ``c_i+``, and send its change."""
        refuse_unheard("Scaffold", self._is_heard, self._begin)
        new = {name: self._new(name, own) for name, own in self.memory.items()}
        self.sent = {name: control - self.memory[name] for name, control in new.items()}
        self.memory = new

    def _new(self, name: str, own: Tensor) -> Tensor:
        if self.option == "I":
            return self._whole.get(name, own)
        steps = self._steps[name]
        if not steps:  # not trained in this round
            return own
        if self.option == "running":
            return self._sum[name] / steps
        p = next(p for p, other in self._names.items() if other == name)
        return (self._begin[p] - p.detach()).to(own.dtype) / (steps * self._rates[name]) - self._correction[name]


def _forms(controls: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: control.shape for name, control in controls.items()}


def _wide(control: Tensor) -> torch.dtype:
    return torch.promote_types(control.dtype, torch.float64)


def _rate(optimizer: Optimizer, group: dict[str, Any]) -> float:
    wrong = [name for name in ("momentum", "weight_decay", "dampening", "maximize") if group.get(name)]
    if type(getattr(optimizer, "optimizer", optimizer)) is not SGD or wrong:
        what = f"{type(optimizer).__name__}({', '.join(f'{name}={group[name]}' for name in wrong)})"
        raise ClientError(f"trains with {what}; Scaffold(option='II') is for plain SGD, option='running' for any.")
    return float(group["lr"])

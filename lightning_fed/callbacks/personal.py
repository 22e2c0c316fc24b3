"""What does not travel: tensors of which each client has its own, and those that nobody trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_fed.callbacks.base import ClientReport, FederatedCallback, Stage
from lightning_fed.errors import ConfigurationError
from lightning_fed.values.staying import Staying, frozen_in, named_by

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class _Travels(FederatedCallback):
    """Logs ``bytes/down`` and ``bytes/up``: the tensors that a round's clients were sent to train, and sent back."""

    def __init__(self) -> None:
        self._bytes = [0, 0]

    def on_round_start(self, trainer: FederatedTrainer, round: int, stage: Stage, cohort: Sequence[int]) -> None:
        """Begin to count."""
        if stage == "train":
            self._bytes = [0, 0]

    def on_client_end(self, trainer: FederatedTrainer, round: int, stage: Stage, report: ClientReport) -> None:
        """Count."""
        if stage == "train":
            self._bytes = [self._bytes[0] + report.bytes_down, self._bytes[1] + report.bytes_up]

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Log."""
        metrics["bytes/down"], metrics["bytes/up"] = map(float, self._bytes)


class Personal(_Travels):
    """Some tensors are each client's own: they never leave it, and stay with it from round to round.

    A client trains and evaluates with its own; one that has none yet begins with those of the module as the run began.
    Messages, strategies and mods have the others alone. Over a network they stay on the client's disk; where clients
    are simulated they are in the checkpoint with all that clients keep. The server's module has them as they were at
    the start, and so has its validation: ``clients/...`` are the metrics of each client with its own.
    ``trainer.personal_module(client)`` gives a client's module.

    Args:
        *names: Patterns: each the path of a layer, which stands for all below it (``"head"`` is not ``"head2"``), or of
            a tensor of the state dict; ``*``, ``?`` and ``[...]`` as in a shell.
        patterns: More of them as one list, which is how a file of ``LightningCLI`` gives them.
        modules: Types of layers, subclasses with them.

    Raises:
        ConfigurationError: If nothing is named; at the fit's start, if a pattern or type names nothing.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[Personal("head", "*.bias")])
    """

    def __init__(
        self, *names: str, patterns: Sequence[str] = (), modules: type[nn.Module] | Sequence[type[nn.Module]] = ()
    ) -> None:
        super().__init__()
        types = (modules,) if isinstance(modules, type) else tuple(modules)
        name, patterns = type(self).__name__, (*names, *([patterns] if isinstance(patterns, str) else patterns))
        wrong = [p for p in patterns if not isinstance(p, str)] + [t for t in types if not isinstance(t, type)]
        if wrong:
            raise ConfigurationError(f"{name}({wrong[0]!r}): patterns are strings, modules= are classes.")
        if not patterns and not types:
            raise ConfigurationError(f"{name}() names nothing: write the path of a layer, or modules=.")
        self.patterns, self.modules, self._said = patterns, types, False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once what the server validates."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.clients_validate:  # type: ignore[attr-defined]
            return
        if not self._said:
            self._said = True
            rank_zero_warn(
                f"{type(self).__name__}: the server validates with the personal tensors as they were when the run"
                " began. The metrics of clients with their own are clients/..., of data that they have to evaluate on."
            )

    def stays(self, module: nn.Module) -> Staying:
        """Return what is personal."""
        called = ", ".join([*map(repr, self.patterns), *(kind.__name__ for kind in self.modules)])
        return Staying(personal=named_by(module, self.patterns, self.modules, f"{type(self).__name__}({called})"))


class FedBN(Personal):
    """BatchNorm layers are personal, weights and statistics (Li et al. 2021, https://arxiv.org/abs/2102.07623).

    For clients whose features differ.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedBN()])
    """

    def __init__(self) -> None:
        super().__init__(modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))


class FedPer(Personal):
    """The head is personal (Arivazhagan et al. 2019, https://arxiv.org/abs/1912.00818); arguments as ``Personal``.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedPer("head")])
    """


class LGFedAvg(Personal):
    """The encoder is personal, the head travels (Liang et al. 2020, https://arxiv.org/abs/2001.01523).

    Arguments as ``Personal``; they name the encoder.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[LGFedAvg("encoder")])
    """


class TrainableOnly(_Travels):
    """Parameters that are not trained do not travel: with LoRA or a fine-tuned head only what trains is sent.

    Frozen is what has ``requires_grad=False`` when the fit begins; buffers travel. All clients have the frozen part as
    it was then, and over a network the server asks each site for a hash of its own. What is frozen has to stay so.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[TrainableOnly()])
    """

    def stays(self, module: nn.Module) -> Staying:
        """Return what is frozen.

        Raises:
            ConfigurationError: If nothing trains.
        """
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ConfigurationError(
                f"TrainableOnly(): no parameter of {type(module).__name__} trains. Unfreeze some before fit:"
                " requires_grad_(True)."
            )
        frozen = frozen_in(module)
        if not frozen:
            rank_zero_info(f"TrainableOnly(): all parameters of {type(module).__name__} train, and travel.")
        return Staying(frozen=frozen)

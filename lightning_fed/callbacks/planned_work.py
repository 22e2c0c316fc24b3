"""What is known of clients' work before they do it, as far as its time depends on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_fed.callbacks.base import PartitionOwner
from lightning_fed.client.local.work import LocalOptions
from lightning_fed.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


@dataclass
class Run:
    """What the time of a client's work depends on, beside the client.

    Attributes:
        local: What all local fits have in common.
        num_clients: How many clients there are.
        seed: The run's seed.
    """

    local: LocalOptions
    num_clients: int
    seed: int

    @classmethod
    def of(cls, trainer: FederatedTrainer) -> Run:
        """Return that of a server's trainer."""
        return cls(trainer.local_options, trainer.num_clients, trainer.seed)


@dataclass
class PlannedWork:
    """What is known of clients' work before they do it.

    Attributes:
        examples: The examples of an epoch of a client.
        num_bytes: What a client is sent and sends.
        run: The run.
        varies: Whether a client may take longer in another round.
        seconds: What each client takes that has been asked for, where it is the same in every round.
        is_told: Whether the user knows that a client did otherwise.
    """

    examples: Callable[[int], int]
    num_bytes: int
    run: Run
    varies: bool
    seconds: dict[int, float] = field(default_factory=dict)
    is_told: bool = False


def known_size(partition: PartitionOwner, client: int) -> int:
    """Return how many examples a client has; raises ``ConfigurationError`` where only training tells."""
    if (size := partition.size_of(client)) is None:
        raise ConfigurationError(
            f"DeviceSpeed: {type(partition).__name__} does not tell how many examples client {client} has before it"
            " trains, and that is how long it takes. Write DeviceSpeed(..., examples=[120, 80, ...])."
        )
    return size

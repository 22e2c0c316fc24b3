"""What callbacks have in common that leave out who is late, by the virtual clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.callbacks.device_speed import DeviceSpeed
from lightning_fed.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer

LATE = "late/clients"


class GoesByClock(FederatedCallback):
    """The base of those who leave out the clients of a round that the clock says are late.

    Attributes:
        late: The clients that were late in the last round, and how long each took, in virtual seconds.
    """

    def __init__(self) -> None:
        self.late: dict[int, float] = {}

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Check that there is a clock."""
        clock_of(trainer, type(self).__name__)

    def clock(self, trainer: FederatedTrainer) -> DeviceSpeed:
        """Return the clock; not before the first round, for by then all methods know what they send."""
        clock = clock_of(trainer, type(self).__name__)
        if not clock.is_planned:
            clock.plan(trainer)
        return clock

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Log how many were late, those with others of its kind that another has left out."""
        metrics[LATE] = metrics.get(LATE, 0.0) + len(self.late)


def clock_of(trainer: FederatedTrainer, who: str) -> DeviceSpeed:
    """Return the clock of a run, for a callback that goes by it.

    Args:
        trainer: The server's trainer.
        who: The callback's name, for the error.

    Raises:
        ConfigurationError: If there is none, or clients are not simulated.
    """
    clocks = [callback for callback in trainer.callbacks if isinstance(callback, DeviceSpeed)]
    if not clocks:
        raise ConfigurationError(
            f"{who} goes by a virtual clock, and there is none: write DeviceSpeed(seconds_per_example) beside it among"
            " the callbacks, which says how long clients take."
        )
    if not is_simulation(trainer):
        raise ConfigurationError(
            f"{who} goes by a virtual clock, and clients of a network take their own time. There Deadline(seconds) lets"
            " a round end without those who are late."
        )
    return clocks[0]


def is_simulation(trainer: FederatedTrainer) -> bool:
    """Return whether clients are simulated, and take virtual time; those of a network take their own."""
    federation: Any = getattr(trainer, "federation")  # noqa: B009 - of the server, which is above this layer
    return bool(federation.session.has_clients)

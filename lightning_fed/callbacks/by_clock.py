"""What callbacks have in common that leave out who is late, by the virtual clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.callbacks.device_speed import DeviceSpeed, clock_of

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
        """Log how many were late."""
        metrics[LATE] = float(len(self.late))

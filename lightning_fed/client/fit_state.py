"""A client's optimizers and schedulers from round to round."""

from __future__ import annotations

import io

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerPLType

from lightning_fed.errors import ClientError


def _schedulers(trainer: Trainer) -> list[LRSchedulerPLType]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def save(trainer: Trainer) -> bytes:
    """What the optimizers and schedulers of a fit hold."""
    state = {
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in _schedulers(trainer)],
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load(trainer: Trainer, saved: bytes) -> None:
    """Takes back what ``save`` gave."""
    # It never left the client; even so only tensors and plain values are read.
    state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    for optimizer, own in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    for scheduler, own in zip(_schedulers(trainer), state["schedulers"], strict=True):
        scheduler.load_state_dict(own)


def advance(trainer: Trainer, epochs: int) -> None:
    """Brings schedules to where the global round is, as if the client had trained in all rounds before.

    Raises:
        ClientError: If a scheduler has no schedule but reacts to a metric.
    """
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            raise ClientError(
                "has a ReduceLROnPlateau, which has no schedule to take from the global round: write"
                " FederatedTrainer(client_state='carry')."
            )
        steps = epochs if config.interval == "epoch" else epochs * int(trainer.num_training_batches)
        for _ in range(steps // config.frequency):
            config.scheduler.step()  # type: ignore[call-arg]

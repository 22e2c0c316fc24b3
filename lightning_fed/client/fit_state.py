"""A client's optimizers and schedulers from round to round."""

from __future__ import annotations

import io
import warnings

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


def advance(trainer: Trainer, epochs: int, rounds: int) -> None:
    """Brings schedules to where the global round is, as if the client had trained in all rounds before.

    Args:
        trainer: The client's trainer, about to train.
        epochs: The local epochs of all rounds before.
        rounds: The rounds before.

    Raises:
        ClientError: If a scheduler has no schedule but reacts to a metric, or counts batches nobody knows.
    """
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            raise ClientError(
                "has a ReduceLROnPlateau, which has no schedule to take from the global round: write"
                " FederatedTrainer(client_state='carry')."
            )
        if config.interval == "epoch":
            steps = epochs // config.frequency
        elif trainer.max_steps != -1:
            steps = rounds * trainer.max_steps // config.frequency
        else:
            steps = epochs * _steps_in_an_epoch(trainer, config.frequency)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # the optimizer has not stepped
            for _ in range(steps):
                config.scheduler.step()  # type: ignore[call-arg]


def _steps_in_an_epoch(trainer: Trainer, frequency: int) -> int:
    """How often Lightning steps a schedule by step in an epoch."""
    if trainer.num_training_batches == float("inf"):
        raise ClientError(
            "has a scheduler that steps with each batch, on a loader without length: nothing tells how far the global"
            " round has taken it. Write FederatedTrainer(local_steps=...) or client_state='carry'."
        )
    batches, every = int(trainer.num_training_batches), trainer.accumulate_grad_batches
    return sum(i % frequency == 0 and (i % every == 0 or i == batches) for i in range(1, batches + 1))

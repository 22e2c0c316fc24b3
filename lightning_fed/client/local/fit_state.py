"""What a client keeps of its local fits from round to round: optimizers, schedulers, the state of its callbacks."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.types import LRSchedulerPLType

from lightning_fed.client.local.elapsed import ByHand, Pace
from lightning_fed.errors import ClientError


@dataclass
class FitState:
    """What a client keeps of its last fit.

    Attributes:
        optimizers: Their state dicts, with ``client_state="carry"``.
        schedulers: Theirs.
        begun: How many of the client's epochs had begun.
        callbacks: The state dicts of those callbacks that stand at an epoch, by ``state_key``.
        by_hand: How its module steps schedules in manual optimization, where that has to be known.
        rates: How it left learning rates that the user's code may have set by hand, by ``HandRates.left``.
        kinds: The classes of optimizers and schedulers.
    """

    optimizers: list[dict[str, Any]] = field(default_factory=list)
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    begun: int = 0
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_hand: ByHand | None = None
    rates: tuple[int, list[list[float]]] | None = None
    kinds: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, trainer: Trainer, callbacks: dict[str, dict[str, Any]]) -> FitState:
        """Return what the optimizers and schedulers of a fit hold."""
        return cls(
            [optimizer.state_dict() for optimizer in trainer.optimizers],
            [scheduler.state_dict() for scheduler in _schedulers(trainer)],
            trainer.current_epoch,
            callbacks,
            kinds=_kinds(trainer),
        )

    def load_into(self, trainer: Trainer) -> None:
        """Give optimizers and schedulers what they held.

        Raises:
            ClientError: If they are others.
        """
        if self.kinds and self.kinds != _kinds(trainer):
            raise ClientError(
                f"has kept the state of {', '.join(self.kinds)}, and configure_optimizers now gives"
                f" {', '.join(_kinds(trainer))}. Go on with those, or begin anew from the weights:"
                " `MyModule.load_from_checkpoint(path)` without `ckpt_path=`."
            )
        for optimizer, own in zip(trainer.optimizers, self.optimizers, strict=True):
            optimizer.load_state_dict(own)
        for scheduler, own in zip(_schedulers(trainer), self.schedulers, strict=True):
            scheduler.load_state_dict(own)

    def dump(self) -> bytes | None:
        """Return it as bytes; ``None`` where there is nothing to keep."""
        if not self.optimizers and self.by_hand is None and self.rates is None:
            return None
        if not self.optimizers:  # torch.save takes a hundred times as long
            return json.dumps({"by_hand": self.by_hand, "rates": self.rates}).encode()
        return _dump({**vars(self), "by_hand": json.dumps(self.by_hand)})

    @classmethod
    def load(cls, saved: bytes | None) -> FitState:
        """Return what ``dump`` gave."""
        if saved is None:
            return cls()
        if saved.startswith((b"[", b"{")):
            fields: dict[str, Any] = json.loads(saved) if saved.startswith(b"{") else {"by_hand": json.loads(saved)}
            told = fields.pop("by_hand")
        else:
            fields = _load(saved)
            told = json.loads(fields.pop("by_hand", "null"))
        return cls(**fields, by_hand=told and ByHand(tuple(Pace(*pace) for pace in told[0]), *told[1:]))


def dump_callbacks(callbacks: list[Callback]) -> bytes | None:
    """Return what callbacks keep, as bytes; ``None`` where there is nothing.

    Raises:
        ClientError: If one keeps what cannot be kept.
    """
    states = {}
    for callback in callbacks:
        if not (state := callback.state_dict()):
            continue
        try:
            _load(_dump(state))
        except Exception as error:
            raise ClientError(
                f"has a client callback {type(callback).__name__} whose state_dict() cannot be kept for the next round:"
                f" tensors, numbers, strings, lists, tuples and dicts can. ({str(error).splitlines()[0]})"
            ) from None
        states[callback.state_key] = state
    return _dump(states) if states else None


def load_callbacks(saved: bytes | None) -> dict[str, dict[str, Any]]:
    """Return what ``dump_callbacks`` gave, by ``state_key``."""
    return {} if saved is None else _load(saved)


def _kinds(trainer: Trainer) -> list[str]:
    return [type(one).__name__ for one in (*trainer.optimizers, *_schedulers(trainer))]


def _schedulers(trainer: Trainer) -> list[LRSchedulerPLType]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _dump(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _load(saved: bytes) -> Any:
    # It never left the client; even so only tensors and plain values are read.
    return torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)

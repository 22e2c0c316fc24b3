"""What can go wrong in a federation, and where it went wrong."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from typing import TypeGuard


class FederationError(RuntimeError):
    """The base of every error that this package raises on its own account.

    Attributes:
        round: The round (from 1) in which it happened, if any.
        client: The index of the client it happened to, if any.
        stage: ``"train"`` or ``"evaluate"``, if any.
        tensor: The name of the tensor concerned, if any.
    """

    def __init__(
        self,
        message: str,
        *,
        round: int | None = None,
        client: int | None = None,
        stage: str | None = None,
        tensor: str | None = None,
    ) -> None:
        super().__init__(message)
        self.round = round
        self.client = client
        self.stage = stage
        self.tensor = tensor


class ConfigurationError(FederationError, ValueError):
    """The arguments contradict each other or the data; nothing has been trained or saved."""


class ClientError(FederationError):
    """A client raised, did not reply, or sent an update that cannot be used."""


class InvalidUpdateError(ClientError):
    """A client sent weights with a missing name, a wrong shape or kind of dtype, or a NaN or Inf in them."""


class RoundError(FederationError):
    """A round ended without enough good replies, or its strategy gave no new weights."""


def require(owner: object, **arguments: tuple[object, Callable[[float], bool], str]) -> None:
    """Check numbers given as ``name=(value, is_good, rule)`` and reports all faults together.

    Raises:
        ConfigurationError: If any is no finite number, or not good.
    """
    faults = []
    for name, (value, is_good, rule) in arguments.items():
        if _is_finite_number(value):
            if not is_good(value):
                faults.append(f"{name}={value!r} must be {rule}")
        else:
            faults.append(f"{name}={value!r} must be a finite number {rule}{_way_out(owner, name, value)}")
    if faults:
        raise ConfigurationError(f"{type(owner).__name__}: {'; '.join(faults)}.")


def _is_finite_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _way_out(owner: object, name: str, value: object) -> str:
    try:
        if isinstance(value, str) and math.isfinite(meant := float(value)):
            return f": write {name}={meant!r}"
    except ValueError:
        pass
    known = inspect.signature(type(owner)).parameters.get(name)  # which a subclass of the user's may have otherwise
    return "" if known is None or known.default is known.empty else f": leave it out for the default, {known.default!r}"

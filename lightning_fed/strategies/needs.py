"""What some of Flower's strategies need of each reply, and fail over without a word whose reply it was."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    QFedAvg,
    Strategy,
)


def needed_numbers(strategies: Iterable[Strategy]) -> dict[str, str]:
    """Return the names of the numbers that strategies need of each client that trains, and whose need it is.

    Args:
        strategies: A strategy and all that it wraps.
    """
    needed = {}
    for one in strategies:
        if isinstance(one, QFedAvg):
            needed[one.train_loss_key] = type(one).__name__
        elif isinstance(one, DifferentialPrivacyClientSideAdaptiveClipping):
            needed["norm_bit"] = type(one).__name__
    return needed


def needs_change(strategies: Iterable[Strategy]) -> str:
    """Return which strategy divides by the norm of each client's update, which must not be 0; empty if none does.

    Args:
        strategies: As for ``needed_numbers``.
    """
    clipping = (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyServerSideAdaptiveClipping)
    return next((type(one).__name__ for one in strategies if isinstance(one, clipping)), "")

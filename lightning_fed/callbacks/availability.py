"""Which clients are there in a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightning_fed import checks
from lightning_fed.errors import ConfigurationError, RoundError

Available = Callable[[int, int], bool] | Sequence[Sequence[bool]] | np.ndarray[Any, Any]


def table_of(available: Any) -> tuple[Any, list[str]]:
    """Return who is available, a table as an array (rounds, clients) of bools, and a sentence if it is neither."""
    if available is None or callable(available):
        return available, []
    try:
        table = np.asarray(available)
    except ValueError:  # rows of unequal lengths
        table = np.zeros(0)
    if table.ndim == 2 and table.size and (table.dtype == bool or set(np.unique(table).tolist()) <= {0, 1}):
        return table.astype(bool), []
    return available, [
        f"available={checks.as_typed(available)}: write a function of a round and a client, or a table of True and"
        " False with a row for each round and a column for each client"
    ]


def who_is_there(call: str, available: Any, round: int, num_clients: int) -> Sequence[int]:
    """Return the clients that are available in a round, ascending.

    Args:
        call: The user's call, for errors.
        available: What ``table_of`` gave; ``None`` for all. A table begins again after its last row.
        round: The round, from 1.
        num_clients: How many clients there are.

    Raises:
        ConfigurationError: If a table has other clients, or a function gives neither ``True`` nor ``False``.

    >>> who_is_there("", lambda round, client: (client + round) % 2 == 0, 1, 5)
    [1, 3]
    """
    if available is None:
        return range(num_clients)
    if not callable(available):
        if available.shape[1] != num_clients:
            raise ConfigurationError(
                f"{call}: available= has {available.shape[1]} columns, and there are {num_clients} clients: write one"
                " for each."
            )
        return [int(client) for client in np.flatnonzero(available[(round - 1) % len(available)])]
    there = []
    for client in range(num_clients):
        answer = available(round, client)
        if not isinstance(answer, (bool, np.bool_)):
            raise ConfigurationError(
                f"{call}: available({round}, {client}) gave {checks.as_typed(answer)}: it must be True or False."
            )
        if answer:
            there.append(client)
    return there


def require_there(stage: str, round: int, there: int, clients: int, least: tuple[int, str | None]) -> None:
    """Check that enough clients are there.

    Raises:
        RoundError: If there are fewer than ``least``, which is a number and the argument that asks for it, if one does.
    """
    number, argument = least
    if there < number:
        asked = f", and {argument}={number}" if argument else ""
        lower = f", or lower {argument}" if argument and number > 1 else ""
        raise RoundError(
            f"Round {round}: {there} of {clients} clients are available to {stage}{asked}. Let more be available in"
            f" that round{lower}.",
            round=round,
            stage=stage,
        )

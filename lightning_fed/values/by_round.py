"""A number that may change from round to round: one for all, a list with one for each, or a function of the round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_fed import checks
from lightning_fed.errors import ConfigurationError

ByRound = float | Sequence[float] | Callable[[int], float]


def changes(given: object) -> bool:
    """Return whether a number may change from round to round."""
    return callable(given) or isinstance(given, Sequence)


def total(given: int | tuple[int, ...], rounds: int) -> int:
    """Return the sum of the first rounds' numbers.

    >>> total(3, 4), total((1, 2), 4)
    (12, 7)
    """
    if isinstance(given, int):
        return given * rounds
    return sum(given[:rounds]) + given[-1] * max(0, rounds - len(given))


def table(call: str, given: Any, rounds: int, is_good: Callable[[float], bool], rule: str) -> tuple[int, ...]:
    """Return the whole numbers of all rounds, up to where the last one goes on; arguments as ``at``.

    Raises:
        ConfigurationError: If a function gives something else.

    >>> table("", lambda round: min(round, 3), 6, bool, "")
    (1, 2, 3)
    """
    numbers = [int(at(call, given, round, is_good, rule, True)) for round in range(1, rounds + 1)]
    while len(numbers) > 1 and numbers[-1] == numbers[-2]:
        numbers.pop()
    return tuple(numbers)


def faults(name: str, given: Any, is_good: Callable[[float], bool], rule: str, whole: bool = False) -> list[str]:
    """Return a sentence if what was given is not good in a round; what a function gives only its call tells.

    Args:
        name: The argument.
        given: What the user wrote.
        is_good: Whether a number may be one.
        rule: What is good, in words.
        whole: Whether it has to be a whole number.
    """
    if callable(given):
        return []
    if isinstance(given, Sequence) and not given:
        return [f"{name}=[] has no round: write a number for each, of which the last goes on"]
    numbers = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    good = all(checks.is_number(number, whole=whole) and is_good(number) for number in numbers)
    return [] if good else [f"{name}={given!r} must be {rule}"]


def at(call: str, given: Any, round: int, is_good: Callable[[float], bool], rule: str, whole: bool = False) -> Any:
    """Return the number of a round; the last of a list goes on in all rounds after it.

    Args:
        call: The user's call, for an error.
        given: What ``faults`` found good.
        round: The round, from 1.
        is_good: Whether a number may be one.
        rule: What is good, in words.
        whole: Whether it has to be a whole number.

    Raises:
        ConfigurationError: If a function gives something else.

    >>> [at("", [0.5, 0.1], round, bool, "") for round in (1, 2, 3)]
    [0.5, 0.1, 0.1]
    """
    if not callable(given):
        return given[min(round, len(given)) - 1] if isinstance(given, Sequence) else given
    number = given(round)
    if not (checks.is_number(number, whole=whole) and is_good(number)):
        raise ConfigurationError(f"{call} gave {checks.as_typed(number)} for round {round}: it must be {rule}.")
    return number

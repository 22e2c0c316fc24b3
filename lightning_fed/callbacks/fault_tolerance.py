"""How many clients of a cohort may fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed import checks
from lightning_fed.callbacks.base import FailureOwner
from lightning_fed.errors import ClientError, ConfigurationError


class FaultTolerance(FailureOwner):
    """Goes on when clients fail: they raise, do not reply, or send NaN, wrong shapes or missing names.

    Without it the first failure stops the run. A round with fewer good replies than ``min_results`` is always an error,
    never a round that quietly keeps the old weights.

    Args:
        min_results: How many of a cohort must succeed: a number of clients (int >= 1), or a part of the cohort (float
            in ``(0, 1]``, rounded up).
        on_error: ``"warn"`` says each failure, ``"ignore"`` none; a function is called with each ``ClientError`` and
            may raise.

    Raises:
        ConfigurationError: If ``min_results`` or ``on_error`` is out of its range.

    >>> FaultTolerance(min_results=0.5).min_results(5)
    3
    """

    def __init__(
        self,
        min_results: int | float = 1,
        on_error: Literal["warn", "ignore"] | Callable[[ClientError], None] = "warn",
    ) -> None:
        is_part = isinstance(min_results, float)
        good = checks.is_number(min_results) and (0 < min_results <= 1 if is_part else min_results >= 1)
        if not good:
            raise ConfigurationError(
                f"FaultTolerance(min_results={min_results!r}): write a number of clients (int, at least 1) or a part of"
                " the cohort (float, in (0, 1])."
            )
        if not callable(on_error) and on_error not in ("warn", "ignore"):
            raise ConfigurationError(
                f"FaultTolerance(on_error={on_error!r}): write 'warn', 'ignore' or a function of a ClientError."
            )
        self._min_results, self._on_error = min_results, on_error

    def min_results(self, cohort: int) -> int:
        """Return how many good replies a round of ``cohort`` clients needs."""
        if isinstance(self._min_results, float):
            return max(1, math.ceil(self._min_results * cohort - 1e-9))
        return self._min_results

    def on_failure(self, error: ClientError, failed: int, cohort: int) -> None:
        """Say that a client failed and goes on."""
        if callable(self._on_error):
            self._on_error(error)
        elif self._on_error == "warn":
            rank_zero_warn(f"{str(error).splitlines()[0]} ({failed} of {cohort} failed so far; the round goes on.)")

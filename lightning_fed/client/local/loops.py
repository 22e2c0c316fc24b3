"""Lightning's loops, in which a ``StopIteration`` of the user's code is an error, and ends nothing without a word."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from pathlib import Path
from typing import Any

from lightning.pytorch.loops import fetchers, training_epoch_loop

from lightning_fed._compat import lightning as compat
from lightning_fed._compat.lightning import (
    DataFetcher,
    LightningEpochLoop,
    LightningEvaluationLoop,
    LightningFitLoop,
    LightningManualOptimization,
)

_LOOPS = {__file__, str(Path(__file__).with_name("fast_loop.py")), training_epoch_loop.__file__, compat.__file__}


class FitLoop(LightningFitLoop):
    """Lightning's, in which the user's ``StopIteration`` in a hook between epochs does not end the fit."""

    def on_advance_start(self) -> None:
        """Do as Lightning's; raises as ``EpochLoop.advance``."""
        with _StopsOnlyWithTheData():
            super().on_advance_start()

    def on_advance_end(self) -> None:
        """Do as Lightning's; raises as ``EpochLoop.advance``."""
        with _StopsOnlyWithTheData():
            super().on_advance_end()


class EpochLoop(LightningEpochLoop):
    """Lightning's, in which the user's ``StopIteration`` does not end the epoch."""

    def advance(self, data_fetcher: DataFetcher) -> None:
        """Take one step.

        Raises:
            StopIteration: If the data or a hook ends the epoch.
            RuntimeError: If the user's code raised one, with which Lightning would end the epoch and say nothing.
        """
        with _StopsOnlyWithTheData():
            self._advance(data_fetcher)

    def _advance(self, data_fetcher: DataFetcher) -> None:
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: DataFetcher) -> None:
        """Do as Lightning's, local validation with it; raises as ``advance``."""
        with _StopsOnlyWithTheData():
            super().on_advance_end(data_fetcher)


class ManualOptimization(LightningManualOptimization):
    """Lightning's, in which the user's ``StopIteration`` does not end the step."""

    def advance(self, kwargs: OrderedDict[str, Any]) -> None:
        """Do as Lightning's; raises as ``EpochLoop.advance``."""
        with _StopsOnlyWithTheData():
            super().advance(kwargs)


class EvaluationLoop(LightningEvaluationLoop):
    """Lightning's, in which the user's ``StopIteration`` does not end the evaluation."""

    def evaluate_batch(self, *args: Any) -> None:
        """Do as Lightning's; raises as ``EpochLoop.advance``."""
        with _StopsOnlyWithTheData():
            super().evaluate_batch(*args)


class _StopsOnlyWithTheData:
    """In the block a ``StopIteration`` of the user's code becomes an error.

    No function with ``contextmanager``, which would make an error of each.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, StopIteration) and _is_of_the_user(error):
            raise _as_an_error(error) from None


def _is_of_the_user(error: StopIteration) -> bool:
    """Return whether it was neither the data that ended nor a hook that ended the epoch by returning -1."""
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    return not files <= _LOOPS and fetchers.__file__ not in files


def _as_an_error(error: StopIteration) -> RuntimeError:
    """Return what is not taken for the end of the data, with the frames of the user's code."""
    words = "StopIteration: an iterator that its code calls next() on had nothing left"
    return RuntimeError(words).with_traceback(error.__traceback__)

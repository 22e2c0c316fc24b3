"""SIGTERM while a server waits for others: it ends then, and not when they have come.

Lightning notes the signal and looks at it after a batch. For the server that is a round, whose waits can be an hour.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException


class Sigterm:
    """Hears SIGTERM from ``listening`` on, where somebody does already; he hears it first."""

    def __init__(self) -> None:
        self._heard = self._waits = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear it in the block."""
        before = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            yield
            return

        def hear(number: int, frame: FrameType | None) -> None:
            before(number, frame)
            self._heard = True
            if self._waits:
                raise SIGTERMException

        signal.signal(signal.SIGTERM, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def ends(self) -> Iterator[None]:
        """End the block with it.

        Raises:
            SIGTERMException: As Lightning does after a batch.
        """
        self._waits = True
        try:
            if self._heard:
                raise SIGTERMException
            yield
        finally:
            self._waits = False

"""One fit at a time in a process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_fed.errors import ConfigurationError

# Random states, signal handlers and Flower's identity of who sends are the process's, not a thread's.
_RUNNING = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Run a fit as a program of one process.

    Raises:
        ConfigurationError: If another thread of this process is in a fit.
    """
    if not _RUNNING.acquire(blocking=False):
        raise ConfigurationError(
            "Another FederatedTrainer is fitting in another thread of this process. Random states, signal handlers and"
            " Flower's identity are the process's, so the two would disturb each other: fit one after the other, or"
            " each in a process of its own."
        )
    try:
        yield
    finally:
        _RUNNING.release()

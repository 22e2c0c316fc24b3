"""Memory that the C library keeps: what stacks leave in its heap is too tight for the next ones.

Small tensors that outlive a stack (what clients logged) lie where its large ones lay, and an aligned tensor of the same
size no longer fits there. Each stack then takes new memory, until the round is over.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache

# Giving memory back means to have it mapped anew, page by page: not for less than this.
_MUCH = 64 << 20


class Heap:
    """Gives memory back to the system each time that the process has grown by much; where the C library is glibc."""

    def __init__(self) -> None:
        self._usual = 0

    def tidy(self) -> None:
        """To be called where large tensors have been let go."""
        trim = _trim()
        if trim is not None and _resident() > self._usual + _MUCH:
            trim(0)
            self._usual = _resident()


@cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

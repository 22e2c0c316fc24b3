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
_SIZES = "/proc/self/statm"


class Heap:
    """Gives memory back to the system each time that the process has grown by much; where the C library is glibc."""

    def __init__(self) -> None:
        self._usual = 0

    def tidy(self) -> None:
        """Give memory back to the system, after large tensors were released."""
        trim = _trim()
        if trim is None:
            return
        now = _resident()
        if now > self._usual + _MUCH:
            trim(0)
            self._usual = _resident()
        self._usual = min(self._usual, now)


@cache
def _trim() -> Callable[[int], int] | None:
    known = sys.platform == "linux" and os.path.exists(_SIZES)
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if known else None


def _resident() -> int:
    with open(_SIZES) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

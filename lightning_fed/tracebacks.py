"""What an exception looks like to whoever reads it: its words first, then the frames of the user's own code."""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from functools import lru_cache
from types import TracebackType
from typing import Any, TypeVar
from unicodedata import category

E = TypeVar("E", bound=BaseException)

# Set to "full", tracebacks have all frames.
VARIABLE = "LIGHTNING_FED_TRACEBACK"
# The packages through which a client's code is called. Their frames are the same in every traceback.
_LIBRARIES = ("torch", "torchmetrics", "lightning", "pytorch_lightning", "lightning_fabric", "flwr", "lightning_fed")
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of writing
_LINK = "[frames]"  # no file has this name

# What a message says -> what to do about it.
_WAYS_OUT = {
    "Expected more than 1 value per channel": (
        "BatchNorm cannot train on a batch of one example, and the client's last batch is one. Write"
        " DataLoader(drop_last=True), or another batch_size."
    ),
}


def words(error: BaseException) -> str:
    """Return what Python says below a traceback, ``ValueError: boom``, and a way out that the words do not tell."""
    said = "".join(traceback.format_exception_only(error)).strip()
    return " ".join([said, *(f"-- {way}" for known, way in _WAYS_OUT.items() if known in said)])


def plain(text: str, most: int) -> str:
    """Return a text from elsewhere as it may go to a terminal: no control characters, and no longer than ``most``."""
    return "".join(one if one in "\n\t" or is_printable(one) else "?" for one in text[:most])


def is_printable(text: str) -> bool:
    r"""Return whether nothing in a text moves a cursor or turns the direction of writing.

    >>> is_printable("val\u00a0loss"), is_printable("\u202eval_loss"), is_printable("\x1b[2Jloss")
    (True, False, False)
    """
    # Spaces of any width, and what joins letters and emoji, are not "printable" in Python.
    return text.isprintable() or all(
        one.isprintable() or (category(one) in ("Zs", "Cf") and one not in _TURNS) for one in text
    )


def one_line(text: str, most: int = 300) -> str:
    """Return a text from elsewhere as one line that may go to a terminal, cut after ``most`` characters.

    >>> one_line(f"an error{chr(27)}[2J with a colour", 20)
    'an error?[2J with a ...'
    """
    line = plain(" ".join(text[: 10 * most].split()), most)
    return line if len(line) < most else f"{line}..."


def frames(error: BaseException) -> str:
    """Return an exception's traceback with the frames of libraries folded; empty where it was not raised.

    Where the environment variable ``LIGHTNING_FED_TRACEBACK`` is ``full``, all are there.
    """
    said = traceback.TracebackException.from_exception(error)
    chain = list(_chain(said))
    for one in chain:
        one.stack = _fold(one.stack)
    return "".join(said.format() if len(chain) > 1 else said.stack.format()).rstrip()


def shorten(error: E) -> E:
    """Take the frames of libraries off an error that is about to reach the user, and off its cause.

    What the cause says is in the error's own words already, with the user's frames.
    """
    if not _shows_all():
        error.__traceback__ = _own_frames(error.__traceback__)
        if error.__cause__ is not None:
            error.__cause__.__traceback__ = error.__cause__.__context__ = None
    return error


def release_frames(error: BaseException) -> None:
    """Release what the frames of an error, and of those behind it, keep in memory."""
    seen: BaseException | None = error
    while seen is not None and seen.__traceback__ is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__


def _shows_all() -> bool:
    return os.environ.get(VARIABLE) == "full"


def _chain(said: traceback.TracebackException | None) -> Iterator[traceback.TracebackException]:
    while said is not None:
        yield said
        said = said.__cause__ or (None if said.__suppress_context__ else said.__context__)


class _Folded(traceback.StackSummary):
    """A stack whose runs of library frames are one line each."""

    def format_frame_summary(self, frame_summary: traceback.FrameSummary, **kwargs: Any) -> str:
        if frame_summary.filename == _LINK:
            return f"  ... {frame_summary.name}\n"
        return super().format_frame_summary(frame_summary, **kwargs)


def _fold(stack: traceback.StackSummary) -> traceback.StackSummary:
    """Return the user's frames, and the last one, where it was raised; the last few where none is the user's."""
    if _shows_all():
        return stack
    folded, run = _Folded(), list[str]()
    shown = 3 if all(_library(frame.filename) for frame in stack) else 1
    for i, frame in enumerate(stack):
        library = _library(frame.filename)
        if library is not None and i < len(stack) - shown:
            run.append(library)
            continue
        if run:
            folded.append(_link(run))
        run = []
        folded.append(frame)
    return folded


def _link(run: list[str]) -> traceback.FrameSummary:
    frames = f"{len(run)} frame{'s' if len(run) > 1 else ''} of {', '.join(dict.fromkeys(run))}"
    return traceback.FrameSummary(_LINK, None, frames, lookup_line=False)


def _own_frames(tb: TracebackType | None) -> TracebackType | None:
    kept = []
    while tb is not None:
        if _library(tb.tb_frame.f_code.co_filename) is None:
            kept.append(tb)
        tb = tb.tb_next
    own: TracebackType | None = None
    for frame in reversed(kept):
        own = TracebackType(own, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return own


def _library(file: str) -> str | None:
    """Return which library a file is of; ``None`` for the user's own and for all others."""
    return next((name for name, folder in _folders().items() if file.startswith(folder)), _of_python(file))


def _of_python(file: str) -> str | None:
    own = file.startswith(sysconfig.get_path("stdlib")) and "-packages" not in file
    return "Python" if own or file.startswith("<frozen ") else None


def _folders() -> dict[str, str]:
    return _folders_of(tuple(name for name in _LIBRARIES if name in sys.modules))


@lru_cache
def _folders_of(names: tuple[str, ...]) -> dict[str, str]:
    files = {name: getattr(sys.modules[name], "__file__", None) for name in names}
    return {name: os.path.join(os.path.dirname(file), "") for name, file in files.items() if file}

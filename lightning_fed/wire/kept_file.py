"""What a client keeps in a file, under the mark of the work after which it does, and the marks of all clients."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from lightning_fed.wire.checkpoint_file import look_at
from lightning_fed.wire.plain import from_plain, to_plain


class Marks:
    """Under which mark each client keeps something.

    Attributes:
        now: By client, as it is.
        before: The same when the round began.
    """

    def __init__(self) -> None:
        self.now: dict[int, str] = {}
        self.before: dict[int, str] = {}

    def begin_round(self) -> None:
        """Remember what is there now."""
        self.before = dict(self.now)

    def undo(self, client: int) -> None:
        """Let a client keep what it kept when the round began."""
        self.now.pop(client, None)
        if client in self.before:
            self.now[client] = self.before[client]

    def saved(self, *, before_round: bool) -> dict[int, str]:
        """Return those that a checkpoint names, by client."""
        return dict(sorted((self.before if before_round else self.now).items()))


def read_kept(path: Path) -> tuple[int, str, RecordDict]:
    """Return of a file which client kept what, and after which work.

    Raises:
        Exception: Of any kind, if it is no such file.
    """
    if (found := look_at(path)) is not None:  # torch itself does not look at checksums
        raise ValueError(f"it {found}")
    kept = torch.load(path, weights_only=True)
    client, mark, state = kept["client"], kept["mark"], from_plain(kept["state"])
    if not isinstance(state, RecordDict):
        raise TypeError(f"it holds {state!r:.99}")
    return client, mark, state


def write_kept(path: Path, client: int, mark: str, state: RecordDict, *, durable: bool = False) -> None:
    """Write such a file; an interrupted write leaves what was there before as it was.

    Args:
        path: The file, whose folder is made if it is not there.
        client: The client.
        mark: Of its work.
        state: What it keeps.
        durable: Whether it shall outlive a loss of power.

    Raises:
        OSError: If it cannot be written.
        RuntimeError: Torch's own, for a disk that is full.
    """
    write_whole(path, {"client": client, "mark": mark, "state": to_plain(state)}, durable=durable)


def write_whole(path: Path, content: dict[str, Any], *, durable: bool = False) -> None:
    """Write a file of torch's that is there as a whole, or as it was before; errors as ``write_kept``.

    Args:
        path: The file, whose folder is made if it is not there.
        content: What can be read with ``weights_only=True``.
        durable: Whether it shall outlive a loss of power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    try:
        with new.open("wb") as file:
            torch.save(content, file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)  # of a disk that is full
    if durable:
        _to_disk(path.parent)


def _to_disk(folder: Path) -> None:
    """Let the names in a folder outlive a loss of power, where the system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)

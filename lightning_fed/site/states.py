"""What a client keeps, on its site's disk."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from flwr.app import RecordDict

from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.wire.plain import from_plain, to_plain

# How many pieces of work the folder remembers: a server may go on from a checkpoint so many rounds back.
KEPT = 20


class StateFolder:
    """A folder with what a client kept after each of its last pieces of work, and the address under which it was here.

    Args:
        folder: Made if it is not there.
        client: The client, for errors.
    """

    def __init__(self, folder: Path, client: int) -> None:
        self.folder, self._client = folder, client
        self._place = folder / "node.json"
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """In the block nobody else uses the folder.

        Raises:
            ConfigurationError: If somebody does.
        """
        with (self.folder / "lock").open("w") as lock:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # a system without
                pass
            except OSError as error:
                raise ConfigurationError(
                    f"join(client={self._client}): another process uses {self.folder}: this client is here already."
                    " Another one needs a client= and a state_dir= of its own."
                ) from error
            yield

    def load(self, mark: str) -> RecordDict:
        """Return what the client kept after a piece of work.

        Args:
            mark: Its mark; empty for nothing.

        Raises:
            ClientError: If it is not there any more.
        """
        if not mark:
            return RecordDict()
        try:
            state = from_plain(torch.load(self._path(mark), weights_only=True))
        except FileNotFoundError:
            raise ClientError(
                f"has nothing of {mark} in {self.folder}: what it kept then is lost (the folder holds the last {KEPT}"
                " rounds), and without it the run would not go on as it was. Put the folder back, or begin with the"
                " weights alone: MyModule.load_from_checkpoint(path), and fit that without ckpt_path."
            ) from None
        except Exception as error:
            raise ClientError(f"cannot read {self._path(mark)}: {type(error).__name__}: {error}") from error
        if not isinstance(state, RecordDict):
            raise ClientError(f"cannot read {self._path(mark)}: it is a {type(state).__name__}.")
        return state

    def save(self, mark: str, state: RecordDict) -> None:
        """Keep what the client has after a piece of work, and forget the oldest."""
        path = self._path(mark)
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            torch.save(to_plain(state), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        for old in sorted(self.folder.glob("*.state"), key=lambda one: one.stat().st_mtime_ns)[:-KEPT]:
            old.unlink(missing_ok=True)

    def left_behind(self) -> int:
        """Return the address under which a process on this machine was here that has ended without saying so, or 0."""
        with suppress(OSError, ValueError, AttributeError):
            place = json.loads(self._place.read_text())
            if place.get("host") == socket.gethostname():
                return int(place.get("node_id", 0))
        return 0

    def came(self, node_id: int) -> None:
        """Remember the address under which the client is here."""
        self._place.write_text(json.dumps({"host": socket.gethostname(), "node_id": node_id}))

    def left(self) -> None:
        """Forget the address: the client is not here any more, and has said so."""
        self._place.unlink(missing_ok=True)

    def _path(self, mark: str) -> Path:
        return self.folder / f"{mark}.state"

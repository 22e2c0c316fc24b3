"""What a client keeps, on its site's disk."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flwr.app import RecordDict

from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.wire import kept_file
from lightning_fed.wire.checkpoint_file import look_at

# How many pieces of work the folder remembers: a server may go on from a checkpoint so many rounds back.
KEPT = 20
_WAYS_OUT = (
    "Put back the folder as it was, or begin with the weights alone: MyModule.load_from_checkpoint(path), and fit that"
    " without ckpt_path."
)


class StateFolder:
    """A folder with what a client kept after each of its last pieces of work, and the address under which it was here.

    Args:
        folder: Made if it is not there.
        client: The client, for errors.

    Raises:
        ConfigurationError: If it cannot be made.
    """

    def __init__(self, folder: Path, client: int) -> None:
        self.folder, self._client = folder, client
        self._place = folder / "node.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"join(state_dir={str(folder)!r}): it cannot be a folder: {error}") from error

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
            for left in self.folder.glob("*.new"):  # by a process that was killed
                left.unlink()
            yield

    def load(self, mark: str) -> RecordDict:
        """Return what the client kept after a piece of work.

        Args:
            mark: Its mark; empty for nothing.

        Raises:
            ClientError: If it is not there any more, or the file is another's, or damaged.
        """
        if not mark:
            return RecordDict()
        path = self._path(mark)
        if not path.exists():
            raise ClientError(
                f"has nothing of {mark} in {self.folder}: what it kept then is lost (the folder holds what it kept of"
                f" the last {KEPT} pieces of work), and without it the run would not go on as it was. {_WAYS_OUT}"
            )
        if (found := look_at(path)) is not None:
            raise ClientError(f"cannot take {path}, which {found} {_WAYS_OUT}")
        try:
            client, of, state = kept_file.read_kept(path)
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise ClientError(f"cannot take {path}: {type(error).__name__}: {said} {_WAYS_OUT}") from error
        if (client, of) != (self._client, mark):
            raise ClientError(
                f"cannot take {path}: it holds what client {client} kept of {of}. Has this site the folder of another?"
                f" {_WAYS_OUT}"
            )
        return state

    def save(self, mark: str, state: RecordDict) -> None:
        """Keep what the client has after a piece of work, and forget the oldest.

        An interrupted write leaves what was there before as it was. A folder that is gone is made again.

        Raises:
            ClientError: If it cannot be written.
        """
        try:
            kept_file.write_kept(self._path(mark), self._client, mark, state, durable=True)
            self._forget_all_but(self._path(mark))
        except (OSError, RuntimeError) as error:  # torch has its own for a disk that is full
            raise ClientError(
                f"cannot keep in {self.folder} what it has after this work, which counts as not done: {error}. Is the"
                " disk full, or the folder somebody else's?"
            ) from error

    def _forget_all_but(self, path: Path) -> None:
        """Forget the oldest files, and not this one, whatever its clock says."""
        others = [one for one in self.folder.glob("*.state") if one != path]
        for old in sorted(others, key=lambda one: one.stat().st_mtime_ns)[: 1 - KEPT]:
            old.unlink(missing_ok=True)

    def left_behind(self) -> int:
        """Return the address under which a process on this machine was here that has ended without saying so, or 0."""
        with suppress(OSError, ValueError, AttributeError):
            place = json.loads(self._place.read_text())
            if place.get("host") == socket.gethostname():
                return int(place.get("node_id", 0))
        return 0

    def came(self, node_id: int) -> None:
        """Remember the address under which the client is here, where that can be written: it saves a wait."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._place.write_text(json.dumps({"host": socket.gethostname(), "node_id": node_id}))

    def left(self) -> None:
        """Forget the address: the client is not here any more, and has said so."""
        with suppress(OSError):
            self._place.unlink()

    def _path(self, mark: str) -> Path:
        return self.folder / f"{mark}.state"

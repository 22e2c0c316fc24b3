"""What clients keep from round to round where the server's machine has it: in memory, or in files."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict

from lightning_fed.errors import ConfigurationError
from lightning_fed.wire import kept_file, messages, roll_call
from lightning_fed.wire.checkpoint_file import is_there

# Of so many saves the files are kept at least, whatever has become of them.
PINNED = 4


@dataclass
class SavedMarks:
    """What a checkpoint names.

    Attributes:
        marks: By client.
        seen: Whether the checkpoint has been where it was saved to.
    """

    marks: dict[int, str]
    seen: bool = False


class StatesInMemory:
    """What clients keep, by client."""

    def __init__(self) -> None:
        self._states: dict[int, RecordDict] = {}
        self._before: dict[int, RecordDict] = {}

    def begin_round(self) -> None:
        """Remember what clients keep as it is now."""
        self._before = {}

    def take(self, client: int) -> RecordDict:
        """Return what a client keeps, which it may change; ``put`` follows."""
        state = self._states.setdefault(client, RecordDict())
        if client not in self._before:
            self._before[client] = messages.copy_for_delivery(state)
        return state

    def read(self, client: int) -> RecordDict:
        """Return what a client keeps, to be read."""
        return self._states.get(client, RecordDict())

    def read_before(self, client: int) -> RecordDict:
        """Return what a client kept when the round began, to be read."""
        return self._before.get(client, self.read(client))

    def put(self, client: int, state: RecordDict, round: int, stage: str) -> None:
        """Keep what a client has after a piece of work."""
        self._states[client] = state

    def undo(self, client: int) -> None:
        """Let a client keep what it kept when the round began."""
        if client in self._before:
            self._states[client] = messages.copy_for_delivery(self._before[client])

    def save(self, *, before_round: bool) -> dict[int, RecordDict]:
        """Return what a checkpoint holds, by client; those that keep nothing are left out."""
        states = dict(sorted(self._states.items()))
        if before_round:
            states |= self._before
        return {client: state for client, state in states.items() if state}

    def saved_at(self, path: str) -> None:
        """Note where the checkpoint is that has what ``save`` gave last."""

    def load(self, states: Mapping[int, RecordDict]) -> None:
        """Take back what ``save`` gave.

        Raises:
            ConfigurationError: If clients kept it elsewhere.
        """
        for client, state in states.items():
            if (mark := roll_call.from_state(state)) is not None:
                raise ConfigurationError(roll_call.kept_elsewhere(client, mark, state))
            self._states[client] = state


class StatesInFiles(StatesInMemory):
    """The same in files of a folder, one a client and piece of work, of which a checkpoint has the names.

    A file stays while a checkpoint is where this process has saved it that names the file, and while one of its last
    saves does; those that the process finds stay in any case.

    Args:
        folder: Made if it is not there.

    Raises:
        ConfigurationError: If it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self._key = folder, uuid.uuid4().hex[:16]
        self._marks = kept_file.Marks()
        self._written: dict[int, list[str]] = {}
        self._pinned: deque[dict[int, str]] = deque(maxlen=PINNED)
        self._checkpoints: dict[str, SavedMarks] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"client_storage={str(folder)!r}: {error}. Write a folder of your own.") from error

    def begin_round(self) -> None:
        """See the base."""
        self._marks.begin_round()

    def take(self, client: int) -> RecordDict:
        """See the base."""
        return self.read(client)

    def read(self, client: int) -> RecordDict:
        """See the base.

        Raises:
            ConfigurationError: If its file is gone or damaged.
        """
        return self._of(client, self._marks.now.get(client))

    def read_before(self, client: int) -> RecordDict:
        """See the base; raises as ``read``."""
        return self._of(client, self._marks.before.get(client))

    def _of(self, client: int, mark: str | None) -> RecordDict:
        if mark is None:
            return RecordDict()
        path = self._path(client, mark)
        try:
            *of, state = kept_file.read_kept(path)
            if of != [client, mark]:
                raise TypeError("it is of something else")
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise ConfigurationError(
                f"What client {client} keeps should be in {path}, which cannot be read: {type(error).__name__}: {said}."
                " Put the folder back as it was, or begin with the weights alone: MyModule.load_from_checkpoint(path),"
                " and fit that without ckpt_path."
            ) from error
        return state

    def put(self, client: int, state: RecordDict, round: int, stage: str) -> None:
        """See the base; clients change what they keep only in training."""
        if stage != "train" or (not state and client not in self._marks.now):
            return
        mark = roll_call.mark_of(self._key, round, stage)
        path = self._path(client, mark)
        try:
            kept_file.write_kept(path, client, mark, state)
        except (OSError, RuntimeError) as error:  # torch has its own for a disk that is full
            raise ConfigurationError(f"client_storage: {path} cannot be written: {error}. Is the disk full?") from error
        self._marks.now[client] = mark
        self._written.setdefault(client, []).append(mark)
        self._tidy(client)

    def undo(self, client: int) -> None:
        """See the base."""
        self._marks.undo(client)

    def _tidy(self, client: int) -> None:
        saved = [*self._pinned, *(checkpoint.marks for checkpoint in self._checkpoints.values())]
        needed = {self._marks.now[client], self._marks.before.get(client), *(marks.get(client) for marks in saved)}
        for mark in [mark for mark in self._written[client] if mark not in needed]:
            self._written[client].remove(mark)
            self._path(client, mark).unlink(missing_ok=True)

    def save(self, *, before_round: bool) -> dict[int, RecordDict]:
        """See the base: names of files."""
        marks = self._marks.saved(before_round=before_round)
        self._pinned.append(marks)
        return {client: roll_call.as_state(mark, in_files=True) for client, mark in marks.items()}

    def saved_at(self, path: str) -> None:
        """See the base. A checkpoint that is written later, or was replaced at its path, is told from one removed."""
        for other, checkpoint in list(self._checkpoints.items()):
            there = is_there(other)
            if checkpoint.seen and not there:
                del self._checkpoints[other]
            checkpoint.seen |= there
        self._checkpoints[path] = SavedMarks(self._pinned[-1])

    def load(self, states: Mapping[int, RecordDict]) -> None:
        """See the base; what a checkpoint itself holds goes into files.

        Raises:
            ConfigurationError: If a client kept it on its own disk, or its file is not there.
        """
        for client, state in states.items():
            mark = roll_call.from_state(state)
            if mark is None:
                self.put(client, state, 0, "train")
            elif not roll_call.is_in_files(state):
                raise ConfigurationError(roll_call.kept_elsewhere(client, mark, state))
            else:
                self._marks.now[client] = mark
                if not self._path(client, mark).exists():
                    self.read(client)

    def _path(self, client: int, mark: str) -> Path:
        return self._folder / f"client-{client}" / f"{mark}.state"

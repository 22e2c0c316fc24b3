"""What a server and its sites tell each other over a SuperLink beside the work itself: who they are, and what is kept.

A site keeps what its client keeps (optimizers with ``client_state="carry"``, a method's memory) on its own disk, under
one mark for each piece of work. The server knows the mark of the last that it took, and its checkpoint has it: so work
that is done again, after whatever restart, begins with what it began with the first time.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from lightning_fed._compat.flower_address import LinkLost
from lightning_fed.wire import messages

_FORM, _SETUP, KEPT = "lightning-fed.module", "lightning-fed.setup", "lightning-fed.kept"
_MARK = re.compile(r"([0-9a-f]{16})-(\d{1,9})-(train|evaluate)")


def mark_of(run: str, round: int, stage: str) -> str:
    """Return the mark of a piece of work.

    >>> mark_of("0123456789abcdef", 7, "train")
    '0123456789abcdef-7-train'
    """
    return f"{run}-{round}-{stage}"


def group_of(mark: str = "") -> str:
    """Return a new ``group_id`` for a message: the mark of its work, and what only its receiver is told.

    Flower puts it into the reply, and tells it nobody else. It does not check whose name stands in a reply.
    """
    return f"{mark}/{secrets.token_hex(16)}"


def is_overtaken(earlier: str, later: str) -> bool:
    """Return whether a server that asks for the later of two pieces of work has given the earlier one up.

    Args:
        earlier: Its mark, or the ``group_id`` of its message.
        later: The other's.

    >>> is_overtaken("0123456789abcdef-7-train", "0123456789abcdef-7-evaluate")
    True
    >>> is_overtaken("0123456789abcdef-10-train", "0123456789abcdef-9-evaluate")
    False
    """
    parts = [mark.groups() for one in (earlier, later) if (mark := _MARK.fullmatch(one.partition("/")[0]))]
    if len(parts) < 2 or parts[0][0] != parts[1][0]:
        return False
    before, after = [(int(round), stage == "evaluate") for _, round, stage in parts]
    return before < after


def round_of(message: Message) -> int:
    """Read the round that a message is of; 0 if it is of none."""
    config = messages.first(message.content, ConfigRecord) or ConfigRecord()
    round = config.get(messages.ROUND, 0)
    return round if isinstance(round, int) else 0


@dataclass
class WorkMarks:
    """What work begins with and what it leaves, by mark.

    Attributes:
        base: Of the work before it; empty if there is none.
        mark: Its own.
    """

    base: str
    mark: str


def question(
    form: Mapping[str, str], seed: int, rounds: int = -1, setup: Mapping[str, str] | None = None
) -> RecordDict:
    """Ask a site which client it is, and whether it is set up as the server is.

    Args:
        form: Of the server's module.
        seed: The run's seed.
        rounds: The rounds of the run, or -1 for no limit.
        setup: What the server's script says of clients' training.
    """
    config = messages.round_config(0, seed, rounds)
    return RecordDict({messages.CONFIG: config, _FORM: _lines(form), _SETUP: _lines(setup or {})})


def take_form(content: RecordDict) -> dict[str, str] | None:
    """Take the form of the server's module off a question; ``None`` where it has none."""
    return _take_lines(content, _FORM)


def take_setup(content: RecordDict) -> dict[str, str] | None:
    """Take off what the server's script says of clients' training; ``None`` where a question has nothing of it."""
    return _take_lines(content, _SETUP)


def _lines(texts: Mapping[str, str]) -> ConfigRecord:
    return ConfigRecord({"names": list(texts), "forms": list(texts.values())})


def _take_lines(content: RecordDict, key: str) -> dict[str, str] | None:
    record = content.pop(key, None)
    if not isinstance(record, ConfigRecord):
        return None
    names, forms = record["names"], record["forms"]
    assert isinstance(names, list)
    assert isinstance(forms, list)
    return {str(name): str(form) for name, form in zip(names, forms, strict=True)}


def with_kept(content: RecordDict, kept: WorkMarks) -> RecordDict:
    """Return the same records, and what the work begins with."""
    return RecordDict({**content, KEPT: ConfigRecord({"base": kept.base, "mark": kept.mark})})


def take_kept(content: RecordDict) -> WorkMarks | None:
    """Take off what ``with_kept`` put on.

    Raises:
        ValueError: If these are no marks; they become names of files.
    """
    record = content.pop(KEPT, None)
    if not isinstance(record, ConfigRecord):
        return None
    kept = WorkMarks(str(record["base"]), str(record["mark"]))
    if not _MARK.fullmatch(kept.mark) or (kept.base and not _MARK.fullmatch(kept.base)):
        raise ValueError(f"{kept} are no marks of work")
    return kept


def say_kept(content: RecordDict) -> None:
    """Tell in a reply that the site keeps something of this work, whether the rest of the reply can be used or not."""
    content[KEPT] = ConfigRecord({})


def takes_kept(content: RecordDict) -> bool:
    """Return whether a reply tells that, which is taken off it."""
    return content.pop(KEPT, None) is not None


def is_lost(reply: Message | Exception) -> bool:
    """Return whether it is no reply of a site's, but word that none will come: its node or the message is gone."""
    if isinstance(reply, Exception):
        return isinstance(reply, LinkLost)
    return reply.has_error() and reply.error.code != messages.CLIENT_RAISED


def as_state(mark: str, *, in_files: bool = False) -> RecordDict:
    """Return what a checkpoint has of a client that keeps something on its own disk.

    Args:
        mark: Of the work after which it is so.
        in_files: Whether it is on the server's disk.
    """
    return RecordDict({KEPT: ConfigRecord({"mark": mark, **({"files": True} if in_files else {})})})


def is_in_files(state: RecordDict) -> bool:
    """Return whether what ``as_state`` gave says that it is on the server's disk."""
    record = state.get(KEPT)
    return isinstance(record, ConfigRecord) and record.get("files") is True


def kept_elsewhere(client: int, mark: str, state: RecordDict) -> str:
    """Return why a run cannot go on with what a client has kept somewhere else."""
    if is_in_files(state):
        return (
            f"What client {client} keeps is in a file ({mark}.state), and not in the checkpoint: go on with"
            " client_storage= as the run did, with the same folder, on this machine."
        )
    return (
        f"What client {client} keeps is on its site's own disk, and not in the checkpoint: go on with"
        " engine=engines.SuperLink(...), as the run did."
    )


def from_state(state: RecordDict) -> str | None:
    """Return the mark that a checkpoint has; ``None`` if the client's state was somewhere else.

    Raises:
        ValueError: If it is no mark.
    """
    record = state.get(KEPT)
    if not isinstance(record, ConfigRecord):
        return None
    mark = str(record.get("mark"))
    if not _MARK.fullmatch(mark):
        raise ValueError(f"{mark!r} is no mark of work")
    return mark

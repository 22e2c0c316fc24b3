"""What keeps the clients of one process apart: each finds everything but weights as the first one did."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_module, rank_zero_warn
from torch import Tensor

from lightning_fed.errors import ClientError
from lightning_fed.seeding import random_states_kept, seed_all, seed_for
from lightning_fed.state.access import memory_of
from lightning_fed.state.snapshot import DataSnapshot, Snapshot
from lightning_fed.views import move_to_class

# Gives the seed of the generator that is found at a path.
SeedOf = Callable[[str], int]


class Isolation:
    """Puts module and datamodule back after each local run: attributes, containers, buffers, hooks, generators, ...

    One for each run and process. What they hold is noted once; from then on only what changed costs time.
    """

    def __init__(self) -> None:
        self._noted: tuple[Any, ...] = ()
        self._snapshots: list[Snapshot] = []
        self._lost: str | None = None
        self._named: set[str] = set()

    def __reduce__(self) -> Any:
        return Isolation, ()  # another process has objects of its own

    @contextmanager
    def around(self, module: LightningModule, datamodule: LightningDataModule | None) -> Iterator[Sequence[Snapshot]]:
        """Let the block change what it likes; give what was noted.

        Raises:
            ClientError: If something was written to that is too large to have been copied; and at each later call, for
                then nothing is as it was.
        """
        if self._lost is not None:
            raise ClientError(self._lost)
        self._note(module, datamodule)
        try:
            with restoring(self._snapshots):
                yield self._snapshots
            self.say_grown(self._snapshots)
        except ContentLost as error:
            self._lost = str(error)
            raise

    def release(self) -> None:
        """Forget what was noted."""
        self._noted, self._snapshots = (), []

    def say_grown(self, snapshots: Sequence[Snapshot]) -> None:
        """Name what grew: whoever collects what clients do, or keeps what was read, will look for it."""
        if multiprocessing.parent_process() is not None:
            return
        for is_data, kept in ((False, _COLLECTED), (True, _READ)):
            some = [one for one in snapshots if isinstance(one, DataSnapshot) is is_data]
            if kept not in self._named and (grown := [path for snapshot in some for path in snapshot.grown]):
                self._named.add(kept)
                rank_zero_warn(f"{', '.join(grown)} grew in a client's fit. {kept}")

    def _note(self, module: LightningModule, datamodule: LightningDataModule | None) -> None:
        for instance in (module, datamodule):
            move_to_class(instance)
        if self._noted and self._noted[0] is module and self._noted[1] is datamodule:
            for snapshot in self._snapshots:
                snapshot.renew()
            return
        self._noted = module, datamodule
        self._snapshots = [Snapshot({"module": module}, lambda: weights_of(module))]
        if datamodule is not None:
            self._snapshots.append(DataSnapshot({"datamodule": datamodule}))
        self.say_endless(self._snapshots)
        if unseen := [node.path for node in self._snapshots[0].unseen]:
            rank_zero_warn(
                f"{', '.join(unseen)}: what is held there is not looked at, so what a client's fit changes in it stays,"
                " and the clients after it find that. Keep what changes in a buffer, or in an attribute of its own."
            )

    def say_endless(self, snapshots: Sequence[Snapshot]) -> None:
        """Name the iterators among what was noted, each once."""
        names = {node.path for snapshot in snapshots for node in snapshot.endless} - self._named
        if names:
            self._named |= names
            rank_zero_warn(
                f"{', '.join(sorted(names))}: what a client takes from an iterator cannot be restored, so the clients"
                " after it, and those in other processes, find another one. Make it anew in `on_train_start`, or in the"
                " data set's `__iter__`."
            )


_COLLECTED = (
    "What a module holds is restored after each client, so that the next one finds what this one found: to collect what"
    " clients do, log it, or append to a list that is a variable of your script."
)
_READ = (
    "What data holds is restored after each client, so that the next one finds what this one found: to keep what was"
    " read in memory, write `Partition(..., cache=True)`, or read it before `fit`."
)


class ContentLost(ClientError):
    """A client wrote into something too large to have been copied."""


def weights_of(module: LightningModule) -> list[Tensor]:
    """Return the tensors that are loaded for each client: the state dict's own, not copies that it may make."""
    return [value for value in module.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]


@contextmanager
def restoring(snapshots: Sequence[Snapshot]) -> Iterator[None]:
    """Restore all that was noted after the block; an error of the block's own stays the error.

    Raises:
        ContentLost: If the block wrote into something too large to have been copied.
    """
    try:
        yield
    except BaseException as error:
        for snapshot in reversed(snapshots):
            try:
                snapshot.restore()
            except Exception as other:
                error.add_note(f"What it had changed could not all be restored: {type(other).__name__}: {other}")
        raise
    for snapshot in reversed(snapshots):  # a later one may have found what an earlier one had seeded
        snapshot.restore()
    if lost := [node for snapshot in snapshots for node in snapshot.lost]:
        sizes = ", ".join(f"{node.path} ({memory_of(node.thing) / 2**20:.1f} MiB)" for node in lost)
        raise ContentLost(
            f"wrote into {sizes}. What is so large is not copied for each client, so it cannot be restored, and the"
            " clients after it would find what was written. Write into a copy (`x = x.clone()`), or make it a buffer of"
            " the module's state dict, which travels with the weights."
        )


class LocalData:
    """The loaders of one local run, as Lightning asks for them: noted, seeded, and restored at the end.

    Args:
        seed_of: Gives the seed of the generator that is found at a path.
        isolation: That of the run, which says what cannot be restored.
    """

    def __init__(self, seed_of: SeedOf, isolation: Isolation) -> None:
        self._seed_of, self._isolation = seed_of, isolation
        self.snapshots: list[DataSnapshot] = []

    def take(self, loader: Any, seed_of: SeedOf | None = None) -> DataSnapshot:
        """Note what a loader holds, with its data set, sampler and transforms, and seeds their generators.

        Args:
            loader: A train or validation loader, of whatever kind.
            seed_of: As for the class, where it is another client's.
        """
        number = len(self.snapshots) if seed_of is None else 0
        snapshot = DataSnapshot({f"loader_{number}" if number else "loader": loader})
        self.snapshots.append(snapshot)
        self._isolation.say_endless([snapshot])
        snapshot.seed(seed_of or self._seed_of)
        return snapshot


@contextmanager
def making_data(makers: DataSnapshot, seed: int, client: int = -1, keeps: bool = True) -> Iterator[None]:
    """Let the user's code make data in the block: whenever it does, and wherever, it draws the same.

    Args:
        makers: What holds that code, and maybe generators of its own.
        seed: The run's seed.
        client: Whose data it is; -1 for that of all.
        keeps: Whether to put everybody's generators back; if not that is the caller's matter.
    """

    def seed_of(path: str) -> int:
        return seed_for(seed, f"data/{path}" if path else "data", client=client)

    with random_states_kept() if keeps else nullcontext(), makers.drawing(seed_of):
        seed_all(seed_of(""))
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning from telling the same about every client's trainer."""
    logger = rank_zero_module.log
    logger.addFilter(_is_warning)  # to set its level would make all loggers forget theirs
    try:
        yield
    finally:
        logger.removeFilter(_is_warning)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def signal_handlers() -> dict[int, Any]:
    """Return the server's signal handlers: a client must not swallow a SIGTERM, nor leave Ctrl-C ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def restore_handlers(handlers: dict[int, Any]) -> None:
    """Take back what ``signal_handlers`` gave, where it was changed."""
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)

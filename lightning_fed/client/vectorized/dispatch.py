"""Several clients vectorized where that can be done, else one after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed.client.local.run import LocalResult
from lightning_fed.client.local.work import LocalTask, LocalWork, WorkOf
from lightning_fed.client.vectorized.compiled_step import CompiledStep
from lightning_fed.client.vectorized.fit import StackOptions, vectorized_evaluate, vectorized_fit
from lightning_fed.client.vectorized.malloc_trim import Heap
from lightning_fed.client.vectorized.probe import Candidate, ProbeResult, count_batches, explain, run_probe
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import random_states_kept


class Dispatcher:
    """Decides once a run whether clients can be trained (and evaluated) vectorized, and does it.

    Args:
        wanted: How many at once; ``True`` for as many as fit memory, where that is expected to be faster; ``"require"``
            for that many in any case, or an error.
        compiled: The module's compiled step, or ``None``.
        workers: How many processes train at a time.
    """

    def __init__(self, wanted: int | str, compiled: CompiledStep | None = None, workers: int = 1) -> None:
        self.wanted, self._compiled, self._workers = wanted, compiled, workers
        self._probed: dict[str, ProbeResult] = {}
        self._most: dict[str, int] = {}
        self._said: set[str] = set()
        self._heap = Heap()

    def probe(self, stage: str, tasks: Sequence[LocalTask], work_of: WorkOf, has_mods: bool) -> None:
        """Find out, before the first round.

        Args:
            stage: ``"train"`` or ``"evaluate"``.
            tasks: Those of the first two clients, or of the only one.
            work_of: Gives what a client works on.
            has_mods: Whether there are client mods in this stage.

        Raises:
            ConfigurationError: If clients cannot be vectorized, and that is required.
        """
        with random_states_kept():
            try:
                works = [work_of(task) for task in tasks]
            except Exception as error:  # that is the client's own, when its turn comes
                self._give_up(stage, ProbeResult(explain(error)))
                return
            loaders = [one.loaders for one in works]
            if stage == "train" or any(one.val is not None or one.datamodule is not None for one in loaders):
                self._probe(Candidate(works, stage, has_mods, must_pay=self.wanted is True))

    def _probe(self, candidate: Candidate) -> None:
        result = self._probed[candidate.stage] = run_probe(candidate)
        if result.reason is None:
            memory = _memory(candidate.device) // self._workers
            self._most[candidate.stage] = result.cost.stack_size(candidate.device, memory, candidate.must_pay)
            if result.draws and self._compiled is not None and candidate.stage == "train":
                self._say(
                    "compile_clients: clients train uncompiled, for their steps draw random numbers (Dropout, ...)."
                )
            return
        self._give_up(candidate.stage, result, required=candidate.stage == "train")

    def refuse(self, reason: str) -> None:
        """Note that clients cannot be vectorized; raises as ``probe``."""
        self._give_up("train", ProbeResult(reason), required=True)

    def _give_up(self, stage: str, result: ProbeResult, *, required: bool = False) -> None:
        if self.wanted == "require" and required:
            raise ConfigurationError(
                f"vectorize_clients='require': clients cannot be vectorized: {result.reason}. Write"
                " vectorize_clients=True to train them one after the other where that is so."
            )
        self._probed[stage] = result
        self._say(f"vectorize_clients: clients {stage} one after the other: {result.reason}.")

    def size(self, stage: str) -> int:
        """Return how many clients to serve at once."""
        result = self._probed.get(stage)
        if result is None or result.reason is not None:
            return 1
        if self.wanted is not True and isinstance(self.wanted, int):
            return self.wanted
        return self._most[stage]

    def run(self, stage: str, tasks: Sequence[LocalTask], work_of: WorkOf) -> list[LocalResult | None]:
        """Run clients; ``None`` for one that has to be served alone, where also its errors are its own."""
        with random_states_kept():
            return self._run(stage, tasks, work_of)

    def _run(self, stage: str, tasks: Sequence[LocalTask], work_of: WorkOf) -> list[LocalResult | None]:
        results: list[LocalResult | None] = [None] * len(tasks)
        works: dict[int, LocalWork] = {}
        groups: dict[int, list[int]] = {}
        for i, task in enumerate(tasks):
            try:
                works[i] = work_of(task)
                groups.setdefault(count_batches(works[i].loaders, stage), []).append(i)
            except Exception:
                continue
        together = vectorized_fit if stage == "train" else vectorized_evaluate
        draws = self._probed[stage].draws
        how = StackOptions(draws, None if draws else self._compiled)
        if len(works) > 1 and all(len(members) == 1 for members in groups.values()):
            alone = f"vectorize_clients: clients {stage} one after the other"
            self._say(f"{alone}: no two of them have equally many batches an epoch.", f"{stage} uneven")
        for members in groups.values():
            if len(members) == 1:
                continue
            try:
                found = together([works[i] for i in members], how)
            except Exception as error:
                here, reason = f"in round {tasks[0].round} clients", explain(error)
                self._say(f"vectorize_clients: {here} {stage} one after the other: {reason}.", f"{stage} {reason}")
                continue
            for i, result in zip(members, found, strict=True):
                results[i] = result
        self._heap.tidy()
        return results

    def _say(self, what: str, once: str = "") -> None:
        """Say something, unless it has been said; ``once`` is what it comes to, where that is not the text itself."""
        if (once or what) not in self._said:
            self._said.add(once or what)
            rank_zero_warn(what)


def _memory(device: torch.device) -> int:
    """Return the bytes that stacks may take: a part of what there is, not of what is free, which changes by run."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 2
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    return 1 << 30

"""What came of a federation to which something was done: how it ended, what is left, what one process gives."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from benchmarks import tiny
from benchmarks.chaos import Chaos, Hung
from benchmarks.forked import children, keep_orphans
from tests.deployment.processes import answers


@dataclass
class Outcome:
    """What came of a scenario.

    Attributes:
        ended: How the server's script ended; empty if with 0.
        end: What it left, or an empty dict.
        failures: Round, stage, client and words of each.
        left: What was there after all had been asked to end.
        round_s: Seconds of each round.
        load: Of the machine in the last five minutes, in processes that compute.
    """

    rounds: int
    kills: int
    seconds: float
    ended: str
    end: dict[str, Any]
    failures: list[tuple[int, str, int, str]]
    left: list[str] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    load: float = 0.0


def run(chaos: Chaos, act: Callable[[Chaos], None], sites: dict[int, dict[str, Any]]) -> Outcome:
    """Train while something happens, end everybody, and look at what is there."""
    keep_orphans()
    began, ended = time.monotonic(), ""
    try:
        for client in range(chaos.clients):
            chaos.join(client, **sites.get(client, {}))
        chaos.serve()
        assert chaos.server is not None
        act(chaos)
        chaos.until(lambda: False)
        if code := chaos.server.process.poll():
            ended = f"exit code {code}: {(chaos.server.log.strip().splitlines() or [''])[-1]}"
    except Hung as error:
        ended = f"hung {error}"
    except BaseException:
        chaos.scripts.end()
        raise
    seconds, load = time.monotonic() - began, os.getloadavg()[1]
    left = end_all(chaos)
    path = chaos.folder / "server" / "end.pt"
    end = torch.load(path) if path.exists() else {}
    ends = [note[2] for note in chaos.notes() if note[0] == "end"]
    round_s = [after - before for before, after in pairwise(ends)]
    return Outcome(chaos.round, chaos.kills, seconds, ended, end, chaos.failures(), left, round_s, load)


def end_all(chaos: Chaos) -> list[str]:
    """Ask all processes to end, the SuperLink last; return what is left: processes, ports, files."""
    left = []
    link, others = chaos.link.link, [script for script in chaos.scripts.all if script is not chaos.link.link]
    for script in (*others, link):
        if script.process.poll() is None and script.end() > 15:
            left.append(f"{script.log_path.stem} had to be killed")
    left += [f"process {command}" for command in children()]
    left += [f"port {chaos.link.port}"] if answers(chaos.link.port) else []
    left += [f"tmp/{path.name}" for path in sorted((chaos.folder / "tmp").iterdir())]
    for folder in sorted(chaos.folder.glob("site-*/client-*")):
        expected = {"lock"} | {path.name for path in folder.glob("*.state")}
        left += [f"{folder.name}/{path.name}" for path in sorted(folder.iterdir()) if path.name not in expected]
        states = len(expected) - 1
        left += [f"{states} states of {folder.name}"] if states > 20 else []
    checkpoints = len(list((chaos.folder / "server").glob("*.ckpt")))
    return left + ([f"{checkpoints} checkpoints"] if checkpoints > 2 else [])


def in_process(chaos: Chaos, failed: list[tuple[int, int]], refused: bool) -> dict[str, Any]:
    """Return the weights of one process in which the same clients failed in the same rounds."""
    given = {"rounds": chaos.rounds, "clients": chaos.clients, "failed": failed, "refused": refused}
    script = chaos.run(tiny.alone, "alone", given)
    if script.process.wait(600):
        raise RuntimeError(script.log)
    return torch.load(chaos.folder / "alone" / "end.pt")["weights"]

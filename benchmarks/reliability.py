"""What a federation over a network survives, and what it costs: real processes on 127.0.0.1, figures as tables.

::

    python benchmarks/reliability.py chaos                        # all scenarios: an hour
    python benchmarks/reliability.py chaos garbage kill-link --rounds 30
    python benchmarks/reliability.py soak                         # 2,000 rounds: three quarters of an hour
    python benchmarks/reliability.py speed                        # a round and an idle minute: ten minutes
    python benchmarks/reliability.py stock                        # a round of `flwr run`: three minutes

Sites and servers are forks of this process, so that one that was killed is back in tenths of a second; the SuperLink is
Flower's own program. Each prints a table for RELIABILITY.md. With ``--keep FOLDER`` logs and checkpoints stay there.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import chaos, hostile, link, outcome, soak  # noqa: E402

Failures = list[tuple[int, str, int, str]]
# Seconds that a site has to come back, and a stage: where nothing may be lost, and where something is meant to be.
PATIENT, SHORT = {"return_timeout": 120.0}, {"return_timeout": 3.0, "timeout": 20.0}
SECONDS = 3000.0  # after which a scenario counts as hung
LATE = "did not reply within 20 s"
ABSENT = (LATE, "is not here")


@dataclass
class Scenario:
    """Something that happens to a federation.

    Attributes:
        what: In words.
        act: Does it.
        promised: What is wrong with the failures, by what was promised, or ``""``; of all rounds.
        server: What the server's script is told.
        sites: What sites' scripts are told, by client.
        refused: Whether clients failed by what they sent, after they had trained.
    """

    what: str
    act: Callable[[chaos.Chaos], None]
    promised: Callable[[Failures, int], str]
    server: dict[str, Any] = field(default_factory=lambda: dict(PATIENT))
    sites: dict[int, dict[str, Any]] = field(default_factory=dict)
    refused: bool = False


def no_failures(failures: Failures, rounds: int) -> str:
    return f"{len(failures)} failures, the first: {failures[0][-1]}" if failures else ""


def only_client_3(failures: Failures, within: Callable[[int], bool], words: tuple[str, ...]) -> str:
    """Say which failure is of another client, of a round that it should not be of, or says something else."""
    for round, stage, client, said in failures:
        if client != 3 or not within(round) or not any(word in said for word in words):
            return f"round {round}, {stage}, client {client}: {said}"
    return "" if failures else "no failure"


def hung_twice(failures: Failures, rounds: int) -> str:
    times = {round for round, *_ in failures}
    missing = [round for round in (20, 60) if round <= rounds and round not in times]
    if missing:
        return f"no failure in {missing}"
    return only_client_3(failures, lambda round: 20 <= round < 30 or 60 <= round < 70, (LATE,))


def was_frozen(failures: Failures, rounds: int) -> str:
    return only_client_3(failures, lambda round: 20 < round < rounds, ABSENT)


def garbage_was_refused(failures: Failures, rounds: int) -> str:
    sent = {round: kind for round in range(1, rounds + 1) if (kind := hostile.kind_of(round))}
    failed = {round for round, stage, *_ in failures if stage == "train"}
    accepted = {kind for round, kind in sent.items() if round not in failed}
    if accepted:
        return "accepted: " + ", ".join(sorted(accepted))
    return only_client_3(failures, lambda round: round in sent, ("",))


def was_late(failures: Failures, rounds: int) -> str:
    absent = {round for round, stage, *_ in failures if stage == "train"}
    gaps = absent != set(range(1, len(absent) + 1)) or len(absent) > 30
    return f"absent in {sorted(absent)}" if gaps else only_client_3(failures, lambda round: True, ABSENT)


def has_left(failures: Failures, rounds: int) -> str:
    absent = {round for round, stage, *_ in failures if stage == "train"}
    gaps = absent != set(range(rounds - len(absent) + 1, rounds + 1)) or len(absent) < rounds - 45
    return f"absent in {sorted(absent)}" if gaps else only_client_3(failures, lambda round: True, ABSENT)


# Sites' scripts run in the scenario's folder; there they tell each other by files.
VICTIM = {"sends": {"kind": "victim", "path": "leak"}}
FORGER = {"kind": "forger", "path": "leak"}
SCENARIOS = {
    "kill-sites": Scenario("a site killed -9 every few seconds and restarted", chaos.kill_sites, no_failures),
    "kill-server": Scenario("the server killed -9 ten times and resumed", chaos.kill_server, no_failures),
    "kill-link": Scenario("the SuperLink killed -9 eight times and restarted", chaos.kill_link, no_failures),
    "kill-any": Scenario("any of these six killed -9 every 2 to 8 s", chaos.kill_any, no_failures),
    "hang": Scenario(
        "a site that hangs for 45 s, twice; timeout 20 s",
        chaos.look_on,
        hung_twice,
        SHORT,
        {3: {"hangs": {"rounds": [20, 60], "seconds": 45}}},
    ),
    "freeze": Scenario("a site stopped for 60 s; timeout 20 s", chaos.freeze_site, was_frozen, SHORT),
    "garbage": Scenario(
        f"a site that sends garbage every other round, {len(hostile.KINDS)} kinds",
        chaos.look_on,
        garbage_was_refused,
        PATIENT,
        {3: {"sends": {"kind": "garbage"}}},
        refused=True,
    ),
    "for-another": Scenario(
        "a site that answers another's messages first",
        chaos.look_on,
        no_failures,
        PATIENT,
        {2: VICTIM, 3: {"sends": FORGER}},
    ),
    "forged-sender": Scenario(
        "the same, in the other's name, whose secrets have leaked",
        chaos.look_on,
        no_failures,
        PATIENT,
        {2: VICTIM, 3: {"sends": {**FORGER, "as_the_other": True}}},
    ),
    "joiner": Scenario(
        "a site that joins at round 20",
        chaos.join_late,
        was_late,
        {**SHORT, "min_clients": 3},
        {3: {"wait": "now"}},
    ),
    "leaver": Scenario("a site that leaves at round 40", chaos.leave, has_left, SHORT),
}

COLUMNS = (
    "scenario | rounds | kills | seconds | a round, s | load | failures | as promised | finite | bitwise | server MB"
    " | left"
)


def row(name: str, folder: Path, rounds: int) -> str:
    """Run a scenario, and return its line in the table."""
    scenario = SCENARIOS[name]
    happened = chaos.Chaos(folder, rounds, SECONDS, scenario.server)
    came = outcome.run(happened, scenario.act, scenario.sites)
    kept = came.ended or scenario.promised(came.failures, rounds)
    finite = bitwise = "-"
    if came.end:
        weights = came.end["weights"]
        finite = "yes" if all(tensor.isfinite().all() for tensor in weights.values()) else "NO"
        failed = sorted({(round, client) for round, stage, client, _ in came.failures if stage == "train"})
        expected = outcome.in_process(happened, failed, scenario.refused)
        bitwise = "yes" if all(torch.equal(weights[key], tensor) for key, tensor in expected.items()) else "NO"
    cells = [
        f"{name}: {scenario.what}",
        came.rounds,
        came.kills,
        f"{came.seconds:.0f}",
        f"{median(came.round_s):.2f}" if came.round_s else "-",
        f"{came.load:.1f}",
        count(came.failures),
        f"NO: {kept}" if kept else "yes",
        finite,
        bitwise,
        f"{came.end.get('peak', 0):.0f}",
        ", ".join(came.left) or "nothing",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def count(failures: Failures) -> str:
    """Return how often each client failed to train and to evaluate."""
    clients = sorted({client for _, _, client, _ in failures})
    by_stage = {
        client: [sum(c == client and s == stage for _, s, c, _ in failures) for stage in ("train", "evaluate")]
        for client in clients
    }
    return ", ".join(f"client {c}: {train} + {evaluate}" for c, (train, evaluate) in by_stage.items()) or "none"


def head(columns: str) -> str:
    """Return the date, the versions, and the top of a table."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "flwr"))
    where = f"{len(os.sched_getaffinity(0))} cores, one torch thread a process, Python {platform.python_version()}"
    lines = [f"{datetime.datetime.now():%Y-%m-%d %H:%M}: {where}, {packages}", "", f"| {columns} |"]
    return "\n".join([*lines, "|---" * (columns.count("|") + 1) + "|"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["chaos", "soak", "speed", "stock"])
    parser.add_argument("names", nargs="*", help="scenarios; by default all")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="an empty folder for logs and checkpoints")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reliability-", ignore_cleanup_errors=True) as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.what == "chaos":
            print(head(COLUMNS), flush=True)
            for name in args.names or SCENARIOS:
                (folder / name).mkdir()
                print(row(name, (folder / name).resolve(), args.rounds or 100), flush=True)
        elif args.what == "soak":
            print(f"{head(soak.COLUMNS)}\n{soak.table(folder.resolve(), args.rounds or 2000)}", flush=True)
        elif args.what == "speed":
            print(f"{head(link.COLUMNS)}\n{link.table(folder.resolve(), args.repeats)}", flush=True)
        else:
            print(f"{head(link.COLUMNS)}\n{link.stock(folder.resolve() / 'stock')}", flush=True)


if __name__ == "__main__":
    main()

"""Runs workloads with ours and the peers interleaved, each in a fresh process, and writes a table.

::

    python benchmarks/run.py W1 W4 --repeats 3
    python benchmarks/run.py W1 --peers ours_processes pfl --rounds 5 --out /tmp/table.md
    python benchmarks/run.py W1 W3 --peers ours:1 --before ../an-earlier-checkout

Each repeat has a seed of its own: the spread of a metric is that over seeds, and ``differs`` says that a peer's lies
apart from all of ours. A round's seconds are those after the first three, which warm up, as median, minimum and maximum
over all repeats. A ratio is that of the medians of two peers within one repeat, as median, minimum and maximum over
repeats: below 1 ours is faster. What was compiled in an earlier run is in torch's cache. Memory is looked at twice a
second, or less often, so that to look takes at most a twentieth of a core; shared pages count once; the first process'
own peak, with all that it shares, is known and counts if larger.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from peers import version  # noqa: E402

# Vectorized clients, in one process and in one for each core.
AS_ONE = ["ours_vectorized:2", "ours_processes_vectorized:2", "ours_compiled:2", "ours_processes_compiled:2"]
# What a user would pick, with its threads; ours first.
CHOICE = {
    "W1": [
        *("ours:1", "ours_processes:1", *AS_ONE, "loop:1", "loop:2", "central:1"),
        *("flower:1", "flower_lightning:1", "pfl:1", "pfl:2"),
    ],
    "W2": ["ours:1", "ours_processes:1", "ours_vectorized:1", "ours_compiled:1", "loop:1", "jax:2"],
    "W3": ["ours:1", "ours_processes:1", *AS_ONE, "loop:1", "loop:2", "pfl:1", "pfl:2"],
    "W4": ["ours:1", "ours_processes:1", *AS_ONE, "loop:1", "flower:1", "pfl:1"],
    "W5": ["ours:1", "ours_processes:1", "steps:1", "loop:1", "flower:1"],
    "W6-10": ["ours:1", "ours_processes:1", "ours_vectorized:1", "steps:1", "pfl:1"],
    "W6-100": ["ours:1", "ours_processes:1", "ours_vectorized:1", "steps:1", "pfl:1"],
    "W6-1000": ["ours:1", "ours_processes:1", "ours_vectorized:1", "steps:1", "pfl:1"],
    "W6-100-of-1000": ["ours:1", "ours_processes:1", "ours_vectorized:1", "steps:1", "pfl:1"],
}  # fmt: skip
PACKAGES = ("torch", "lightning", "flwr", "ray", "pfl", "jax", "flax", "optax")
NEEDS = {"flower": "ray", "flower_lightning": "ray", "pfl": "pfl", "jax": "jax"}


def memory_of(pid: int) -> float:
    """The memory of a process and all below it, in MB; what they share counts once (PSS)."""
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        try:
            todo += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
            total += int(Path(f"/proc/{one}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
        except (OSError, IndexError):
            continue
    return total / 1024


def run_one(
    workload: str, peer: str, rounds: int | None, device: str, seed: int, before: Path | None = None
) -> dict[str, Any]:
    name, threads = peer.split(":")
    name, is_before = name.removesuffix("@before"), "@before" in name
    command = [sys.executable, str(HERE / "peers.py"), workload, name, "--threads", threads]
    command += ["--rounds", str(rounds)] if rounds else []
    env = {**os.environ, "BENCH_BEGAN": str(time.time()), "OMP_NUM_THREADS": threads}
    env |= {"BENCH_SEED": str(seed), "BENCH_DEVICE": device, "PFL_PYTORCH_DEVICE": device}
    env["PYTHONPATH"] = str(before.resolve() if is_before and before else HERE.parent)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        took = 0.0
        while not over.wait(max(0.5, 20 * took)):  # it takes the time of the cores that are measured
            began = time.perf_counter()
            peak[0] = max(peak[0], memory_of(process.pid))
            took = time.perf_counter() - began

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    over.set()
    watcher.join()
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"error": (err.strip().splitlines() or ["no result"])[-1][:120]}
    result = json.loads(lines[-1].removeprefix("RESULT "))
    return {**result, "peak": max(peak[0], result["peak"])}


def warm(rounds: list[float]) -> list[float]:
    return rounds[3:] or rounds[1:] or rounds


def spread(values: list[float], digits: int = 3) -> str:
    return f"{median(values):.{digits}g} ({min(values):.{digits}g}-{max(values):.{digits}g})"


def table(workload: str, results: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        f"### {workload}",
        "",
        "| peer:threads | start s | first round s | s a round | total s | peak MB | metric |",
        "|---|---|---|---|---|---|---|",
    ]
    for peer, runs in results.items():
        good = [run for run in runs if "error" not in run]
        if not good:
            lines.append(f"| {peer} | {runs[0]['error']} |" + " |" * 5)
            continue
        cells = [
            peer,
            spread([run["start"] for run in good]),
            spread([run["rounds"][0] for run in good]),
            spread([second for run in good for second in warm(run["rounds"])]),
            spread([run["total"] for run in good]),
            f"{max(run['peak'] for run in good):.0f}",
            spread([run["metric"] for run in good]) + differs(good, results),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        *ratios("a round", results, lambda run: median(warm(run["rounds"]))),
        *ratios("in total", results, lambda run: run["total"]),
    ]


def differs(runs: list[dict[str, Any]], results: dict[str, list[dict[str, Any]]]) -> str:
    """Says so where a peer's metrics lie apart from all of ours, over all seeds."""
    ours = [run["metric"] for peer in results if peer.startswith("ours") for run in results[peer] if "metric" in run]
    own = [run["metric"] for run in runs]
    return " differs" if ours and (min(own) > max(ours) or max(own) < min(ours)) else ""


def ratios(what: str, results: dict[str, list[dict[str, Any]]], of: Callable[[dict[str, Any]], float]) -> list[str]:
    """Ours over each peer, pairwise within a repeat."""
    mine = [peer for peer in results if peer.startswith("ours")]
    lines = ["", f"| {what}: ours / it | {' | '.join(mine)} |", "|---" * (len(mine) + 1) + "|"]
    for peer in results:
        cells = []
        for one in mine:
            pairs = zip(results[one], results[peer], strict=False)
            values = [of(a) / of(b) for a, b in pairs if "error" not in a and "error" not in b]
            cells.append(spread(values) if values and one != peer else "")
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return [*lines, ""]


def peers_of(workload: str, args: argparse.Namespace) -> list[str]:
    """Who runs, in turn."""
    peers: list[str] = args.peers or CHOICE[workload]
    if args.before is None:
        return peers
    both = [[peer, peer.replace(":", "@before:")] if peer.startswith("ours") else [peer] for peer in peers]
    return [peer for one in both for peer in one]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=[])
    parser.add_argument("--peers", nargs="+", help="name:threads; by default all that the workload has")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="jax runs on the CPU either way")
    parser.add_argument("--before", type=Path, help="a checkout of another version: each of ours runs from it, too")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    args = parser.parse_args()
    machine = f"{args.device}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    head = [
        f"## {datetime.date.today()}: {machine}, {version(*PACKAGES)}",
        "",
        f"{args.repeats} repeats, interleaved, each in a fresh process; median (min-max).",
        "",
        "",
    ]
    text = "\n".join(head)
    before = args.out.read_text() + "\n" if args.out.exists() else "# Results\n\n"
    for workload in args.workloads or list(CHOICE):
        results: dict[str, list[dict[str, Any]]] = {}
        for repeat in range(args.repeats):
            for peer in peers_of(workload, args):
                missing = NEEDS.get(peer.split(":")[0])
                if missing and "missing" in version(missing):
                    results.setdefault(peer, []).append({"error": f"{missing} is not installed"})
                    continue
                results.setdefault(peer, []).append(
                    run_one(workload, peer, args.rounds, args.device, repeat, args.before)
                )
                last = results[peer][-1]
                said = (
                    last.get("error") or f"{median(warm(last['rounds'])):.3f} s a round, {last['total']:.1f} s in all"
                )
                print(f"{workload} {repeat + 1}/{args.repeats} {peer:<20} {said}", flush=True)
        part = "\n".join(table(workload, results)) + "\n"
        print(part, flush=True)
        text += part
        args.out.write_text(before + text)


if __name__ == "__main__":
    main()

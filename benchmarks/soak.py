"""Many rounds of a tiny model over three sites: what server, sites and SuperLink hold after each fifty of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos import Chaos
from benchmarks.outcome import end_all

EVERY, WARM = 50, 200
COLUMNS = (
    "who | what | after 50 rounds | 200 | 1,000 | the last sample | from 200 on | from 200 on, change per 1,000 rounds"
)


@dataclass
class Sample:
    """What one process holds.

    Attributes:
        round: After which round.
        rss: Its resident memory, MB.
        descriptors: How many are open.
        disk: Of its files, MB, without its log.
    """

    round: int
    rss: float
    descriptors: int
    disk: float


def size(paths: list[Path]) -> float:
    total = 0
    for path in paths:
        for one in path.rglob("*") if path.is_dir() else [path]:
            try:
                total += one.stat().st_size if one.is_file() else 0
            except FileNotFoundError:  # a checkpoint that was just replaced
                continue
    return total / 1e6


def look(pid: int, round: int, paths: list[Path]) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
    return Sample(round, rss, len(os.listdir(f"/proc/{pid}/fd")), size(paths))


def slope(points: list[tuple[float, float]]) -> float:
    """Return the change of a line through points, by least squares, per 1,000."""
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 1000 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def table(folder: Path, rounds: int, clients: int = 3) -> str:
    """Train so many rounds, and return the table's lines."""
    chaos = Chaos(folder, rounds, 7200.0, {}, clients)
    for client in range(clients):
        chaos.join(client)
    chaos.serve()
    samples = watch(chaos)
    notes = [note for note in chaos.notes() if note[0] == "end"]
    seconds, logs = notes[-1][2] - notes[0][2], size([script.log_path for script in chaos.scripts.all])
    left, lines = end_all(chaos), []
    for who, seen in samples.items():
        for what, digits in (("rss", 1), ("descriptors", 0), ("disk", 2)):
            lines.append(line(who, what, digits, [(sample.round, getattr(sample, what)) for sample in seen]))
    return "\n".join(
        [
            *lines,
            "",
            f"{chaos.round} rounds of {clients} sites in {seconds:.0f} s; {len(chaos.failures())} failures; all logs"
            f" {logs:.1f} MB; left: {', '.join(left) or 'nothing'}.",
        ]
    )


def watch(chaos: Chaos) -> dict[str, list[Sample]]:
    """Look at all processes after each fifty rounds."""
    assert chaos.server is not None
    folder, links = chaos.folder, [chaos.folder / f"link.db{end}" for end in ("", "-wal", "-shm")]
    watched = {"server": (chaos.server, [folder / "server"]), "SuperLink": (chaos.link.link, links)}
    watched |= {f"site {k}": (script, [folder / f"site-{k}"]) for k, script in chaos.sites.items()}
    samples: dict[str, list[Sample]] = {who: [] for who in watched}
    for due in range(EVERY, chaos.rounds, EVERY):
        chaos.until(lambda: chaos.round >= due)  # noqa: B023  it is called at once
        if chaos.is_over:
            break
        round = chaos.round
        for who, (script, paths) in watched.items():
            samples[who].append(look(script.process.pid, round, paths))
        print(*(f"{who} {seen[-1]}" for who, seen in samples.items()), sep="\n", flush=True)
    chaos.until(lambda: False)
    return samples


def line(who: str, what: str, digits: int, points: list[tuple[float, float]]) -> str:
    named = {"rss": "resident memory, MB", "descriptors": "open descriptors", "disk": "files, MB"}[what]
    warm = [point for point in points if point[0] >= WARM] or points
    values = [value for _, value in warm]
    change = f"{slope(warm):+.{digits + 1}f}"
    half = next((value for round, value in points if round >= 1000), warm[-1][1])
    cells = [who, named, *(f"{value:.{digits}f}" for value in (points[0][1], warm[0][1], half, warm[-1][1]))]
    return f"| {' | '.join([*cells, f'{min(values):.{digits}f} to {max(values):.{digits}f}', change])} |"

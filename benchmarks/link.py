"""What the way over a SuperLink costs: an idle minute, and a round over its local steps beside the bytes' own time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks import loopback, square
from benchmarks.forked import Forked
from benchmarks.square import SITES, cpu
from tests.deployment.processes import Script, Scripts, free_port

ROUNDS, STOCK_ROUNDS = 8, 3
COLUMNS = "what | median | least to most | of"
# Weights of a square layer: 90 thousand of them, and 25 MB.
WIDTHS = {"90k parameters": 300, "25 MB of weights": 2500}
LINKS = {"in memory": (), "with a database": ("--database", "link.db")}
OVER = "a round over its local steps, s"


class Fits:
    """A SuperLink, and sites that train with one server after the other.

    Args:
        folder: For everything that it writes.
        width: Of the layer.
        options: Of the SuperLink.
    """

    def __init__(self, folder: Path, width: int, options: tuple[str, ...]) -> None:
        folder.mkdir()
        self.folder, self._width, self._scripts, port = folder, width, Scripts(folder), free_port()
        self.link, self._address = self._scripts.link(port, "--insecure", *options), f"127.0.0.1:{port}"
        self.sites = [self._run(square.site, f"site-{k}", client=k) for k in range(SITES)]
        for one in self.sites:
            one.says("has joined", seconds=200)

    def _run(self, function: Callable[..., None], name: str, **given: object) -> Script:
        given = {"address": self._address, "width": self._width, **given}
        self._scripts.all.append(Forked(function, given, self.folder, name))
        return self._scripts.all[-1]

    def fit(self) -> dict[str, list[float]]:
        """Train some rounds; return, without the first two, the seconds over the slowest site's steps, and of CPU."""
        before = {path: len(path.read_text().splitlines()) for path in self.folder.glob("steps-*.jsonl")}
        name = f"server-{len(self._scripts.all)}"
        pids = {"the SuperLink": self.link.process.pid, "a site": self.sites[0].process.pid}
        ends = self.folder / f"{name}.jsonl"
        server = self._run(square.server, name, rounds=ROUNDS, ends=str(ends), pids=pids)
        if server.process.wait(900):
            raise RuntimeError(server.log)
        steps: dict[int, float] = {}
        for path in self.folder.glob("steps-*.jsonl"):
            for line in path.read_text().splitlines()[before.get(path, 0) :]:
                round, seconds = json.loads(line)
                steps[round] = max(steps.get(round, 0.0), seconds)
        notes = read_ends(ends)[1:]
        took = {OVER: [after[1] - before[1] - steps[after[0]] for before, after in pairwise(notes)]}
        (_, _, first), *_, (_, _, last) = notes
        for who, spent in last.items():
            took[f"a round: CPU of {who}, s"] = [(spent - first[who]) / (len(notes) - 1)]
        return took

    def end(self) -> None:
        for script in reversed(self._scripts.all):  # the SuperLink last
            script.end()


def read_ends(path: Path) -> list[tuple[int, float, dict[str, float]]]:
    """Return what a ``Clock`` has written: round, time and seconds of CPU."""
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


def table(folder: Path, repeats: int) -> str:
    """Measure all of it, and return the table's lines."""
    lines, port = [], free_port()
    plain = Forked(loopback.serve, {"port": port}, folder, "loopback")
    try:
        for name, width in WIDTHS.items():
            for link, options in LINKS.items():
                fits = Fits(folder / f"{width}-{len(lines)}", width, options)
                try:
                    lines += measured(fits, f"{name}, SuperLink {link}", 4 * width * width, port, repeats)
                    lines += idle(fits, f"SuperLink {link}") if width == min(WIDTHS.values()) else []
                finally:
                    fits.end()
    finally:
        plain.kill()
    return "\n".join(lines)


def measured(fits: Fits, name: str, size: int, port: int, repeats: int) -> list[str]:
    """Measure rounds of one size, interleaved with the same bytes on other ways."""
    ways: dict[str, Callable[[], float]] = {
        "its bytes through a socket, s": partial(loopback.by_socket, port, (1 + 3 * SITES) * size),
        "its bytes over plain HTTP, s": partial(loopback.by_http, port, size, SITES),
    }
    took: dict[str, list[list[float]]] = {}
    for _ in range(repeats):
        found = fits.fit() | {way: [measure()] for way, measure in ways.items()}
        for what, values in found.items():
            took.setdefault(what, []).append(values)
            print(f"{name}: {what}: {median(values):.3f}", flush=True)
    lines = [line(f"{name}: {what}", values) for what, values in took.items()]
    for way in ways:
        ratios = [[median(a) / median(b)] for a, b in zip(took[OVER], took[way], strict=True)]
        lines.append(line(f"{name}: a round over {way.removesuffix(', s')}", ratios))
    return lines


def idle(fits: Fits, name: str) -> list[str]:
    """Measure what processes do in a minute in which nobody trains."""
    watched = {"the SuperLink": fits.link, "a site": fits.sites[0]}
    before = {who: cpu(script.process.pid) for who, script in watched.items()}
    time.sleep(60)
    return [
        line(f"{name}: CPU of {who} in an idle minute, s", [[cpu(script.process.pid) - before[who]]])
        for who, script in watched.items()
    ]


def stock(folder: Path) -> str:
    """Measure rounds of Flower's own programs, a process for each message, and return the table's line."""
    (folder / "app").mkdir(parents=True)
    scripts, port, ends = Scripts(folder), free_port(), folder / "ends.jsonl"
    (folder / "app" / "pyproject.toml").write_text(square.PROJECT)
    (folder / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    given = f'max_rounds={STOCK_ROUNDS} ends="{ends}"'
    try:
        scripts.link(port, "--insecure", isolation="subprocess")
        for k in range(SITES):
            where = ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            command = ["flower-supernode", "--insecure", *where, "--node-config", f"partition-id={k}"]
            scripts.start(command, f"node-{k}")
        run = scripts.start(["flwr", "run", str(folder / "app"), "here", "--stream", "--run-config", given], "run")
        if run.process.wait(1500):
            raise RuntimeError(run.log)
    finally:
        for script in reversed(scripts.all):
            script.end()
    took = [after[1] - before[1] for before, after in pairwise(read_ends(ends))]
    return line("90k parameters, Flower's own `flwr run`: a whole round, s", [took])


def line(what: str, values: list[list[float]]) -> str:
    every = [value for one in values for value in one]
    of = f"{len(values)} repeats x {len(values[0])}"
    return f"| {what} | {median(every):.3f} | {min(every):.3f} to {max(every):.3f} | {of} |"

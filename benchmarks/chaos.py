"""What benchmarks/reliability.py does to a federation of real processes while it trains.

Four sites and a server, plain scripts, around a SuperLink with TLS, node authentication, a secret and a database.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import tiny
from benchmarks.forked import Forked
from tests.deployment.processes import Script, Scripts, SecureLink, make_keys

CLIENTS = 4


class Hung(Exception):
    """Something did not come to its end."""


class Chaos:
    """A federation that is about to train, and what happens to it.

    Args:
        folder: For everything that it writes.
        rounds: How many it trains.
        seconds: After which it counts as hung.
        server: What the server's script is told besides.
        clients: How many there are.

    Attributes:
        kills: How many processes were killed.
    """

    def __init__(
        self, folder: Path, rounds: int, seconds: float, server: dict[str, Any], clients: int = CLIENTS
    ) -> None:
        self.folder, self.rounds, self.clients, self._server_options = folder, rounds, clients, server
        self.kills, self.random = 0, random.Random(0)
        (folder / "tmp").mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        names = [f"site-{client}" for client in range(clients)]
        make_keys(folder / "keys", ["localhost", "127.0.0.1"], names)
        self.scripts = Scripts(folder)
        self.link = SecureLink(self.scripts, folder / "keys", names)
        self.sites: dict[int, Script] = {}
        self.server: Script | None = None
        self._until = time.monotonic() + seconds

    def join(self, client: int, **given: Any) -> None:
        """Start a client's site."""
        given = {"rounds": self.rounds, "clients": self.clients, **self.link.site(client), **given}
        self.sites[client] = self.run(tiny.site, f"site-{client}", given)

    def serve(self, resume: bool = False) -> None:
        """Start the server."""
        given = {"rounds": self.rounds, "clients": self.clients, "address": self.link.address, **self.link.engine}
        self.server = self.run(tiny.server, "server", {**given, **self._server_options, "resume": resume})

    def run(self, function: Callable[..., None], name: str, given: dict[str, Any]) -> Script:
        """Run a function of ``tiny.py`` in a process of its own."""
        given = {"root": str(self.folder / name), **given}
        self.scripts.all.append(Forked(function, given, self.folder, name))
        return self.scripts.all[-1]

    @property
    def is_over(self) -> bool:
        """Whether the server's script has ended."""
        return self.server is not None and self.server.process.poll() is not None

    def notes(self, last: int = 0) -> list[list[Any]]:
        """Return what the server has written down; only of the last bytes, if told how many."""
        path = self.folder / "server" / "notes.jsonl"
        if not path.exists():
            return []
        with path.open() as file:
            file.seek(max(0, path.stat().st_size - last) if last else 0)
            lines = file.read().splitlines()
        return [json.loads(line) for line in lines if line.startswith("[") and line.endswith("]")]

    @property
    def round(self) -> int:
        """The last round that has ended."""
        return max((note[1] for note in self.notes(10_000) if note[0] == "end"), default=0)

    def failures(self) -> list[tuple[int, str, int, str]]:
        """Return round, stage, client and words of each failure; of a round done again, those of the last time."""
        found: dict[int, list[tuple[int, str, int, str]]] = {}
        for what, round, _, *more in self.notes():
            if what == "start":
                found[round] = []
            elif what == "failed":
                found[round].append((round, *more))
        return [failure for round in sorted(found) for failure in found[round]]

    def pause(self, seconds: float) -> None:
        """Wait, or until the server has ended."""
        until = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > until)

    def pause_after_a_round(self, least: float, most: float) -> None:
        """Wait until a round has ended, and for some seconds more."""
        before = self.round
        self.until(lambda: self.round > before)
        self.pause(self.random.uniform(least, most))

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until something is true, or the server has ended.

        Raises:
            Hung: If that takes too long.
        """
        while not self.is_over and not true():
            if time.monotonic() > self._until:
                raise Hung(f"after round {self.round}")
            time.sleep(0.05)

    def until_joined(self, client: int, times: int) -> None:
        """Wait until a site has joined so many times."""
        log = self.sites[client].log_path
        self.until(lambda: log.exists() and log.read_text(errors="replace").count("has joined") >= times)

    def kill(self, script: Script) -> None:
        """Kill a process."""
        script.kill()
        self.kills += 1


# ------------------------------------------------------------------------------------------------- what is done


def kill_sites(chaos: Chaos) -> None:
    """A site is killed 1 to 4 s after the last one that was has come back and a round has ended."""
    joined = Counter(range(chaos.clients))
    while not chaos.is_over:
        chaos.pause_after_a_round(1, 4)
        if not chaos.is_over:
            victim = chaos.random.randrange(chaos.clients)
            chaos.kill(chaos.sites[victim])
            chaos.join(victim)
            joined[victim] += 1
            chaos.until_joined(victim, joined[victim])


def kill_server(chaos: Chaos) -> None:
    """The server is killed within its next rounds, ten times, and run again at once."""
    for _ in range(10):
        chaos.pause_after_a_round(0, 2)
        if not chaos.is_over:
            assert chaos.server is not None
            chaos.kill(chaos.server)
            chaos.serve(resume=True)


def kill_link(chaos: Chaos) -> None:
    """The SuperLink is killed, eight times, and is away for up to 5 s."""
    for _ in range(8):
        chaos.pause_after_a_round(0, 2)
        if not chaos.is_over:
            chaos.kill(chaos.link.link)
            time.sleep(chaos.random.uniform(0, 5))
            chaos.link.restart_link()


def kill_any(chaos: Chaos) -> None:
    """A site, the server or the SuperLink is killed every 2 to 8 s, whether those before are back or not."""
    chaos.until(lambda: chaos.round >= 1)
    for _ in range(25):
        chaos.pause(chaos.random.uniform(2, 8))
        if chaos.is_over:
            return
        victim = chaos.random.choice([*range(chaos.clients), "server", "link"])
        if isinstance(victim, int):
            chaos.kill(chaos.sites[victim])
            chaos.join(victim)
        elif victim == "server":
            assert chaos.server is not None
            chaos.kill(chaos.server)
            chaos.serve(resume=True)
        else:
            chaos.kill(chaos.link.link)
            chaos.link.restart_link()


def freeze_site(chaos: Chaos) -> None:
    """A site is stopped (SIGSTOP) for 60 s: no sign of life, but its connections stay."""
    chaos.until(lambda: chaos.round >= 20)
    chaos.sites[3].process.send_signal(signal.SIGSTOP)
    try:
        chaos.pause(60)
    finally:
        chaos.sites[3].process.send_signal(signal.SIGCONT)


def join_late(chaos: Chaos) -> None:
    """A site joins after round 20."""
    chaos.until(lambda: chaos.round >= 20)
    (chaos.folder / "now").touch()


def leave(chaos: Chaos) -> None:
    """A site leaves (SIGTERM) after round 40."""
    chaos.until(lambda: chaos.round >= 40)
    chaos.sites[3].end()


def look_on(chaos: Chaos) -> None:
    """The sites do it themselves."""

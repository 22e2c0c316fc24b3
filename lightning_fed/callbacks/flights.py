"""Clients that train all the time: who arrives next, and on which version of the weights, by durations alone."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_fed.seeding import seed_for

_TRIES = 64


class Flight(NamedTuple):
    """One client's work, from when it is sent the weights to when its reply arrives; they sort by arrival.

    Attributes:
        end: When it arrives, in virtual seconds.
        number: It is the so manieth of the run, from 0.
        client: The client's index.
        version: The server updates that the weights had had with which it began.
        start: When it began, in virtual seconds.
    """

    end: float
    number: int
    client: int
    version: int
    start: float


@dataclass(frozen=True)
class Flights:
    """The clients that are at work when a server update is done.

    Attributes:
        now: The virtual time, in seconds.
        started: How many have begun in the run.
        flying: Those at work, as a heap.
        clients: Whose they are.
        versions: How many of them began with each version of the weights.
    """

    now: float = 0.0
    started: int = 0
    flying: tuple[Flight, ...] = ()
    clients: frozenset[int] = frozenset()
    versions: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, now: float, started: int, flying: Iterable[Flight]) -> Flights:
        """Return those at work, in any order."""
        heap = tuple(sorted(flying))
        clients = frozenset(flight.client for flight in heap)
        return cls(now, started, heap, clients, Counter(flight.version for flight in heap))

    def among(self, num_clients: int) -> Flights:
        """Return those of the first so many clients."""
        return Flights.of(self.now, self.started, (one for one in self.flying if one.client < num_clients))


@dataclass
class Schedule:
    """The rule by which clients follow one another.

    At one instant arrivals come first, then the server's update if the buffer is full, then clients begin in the places
    that are free. A client whose reply waits in the buffer does not begin before the update.

    Attributes:
        concurrency: How many clients are at work at once.
        buffer_size: How many replies an update takes.
        max_staleness: Replies whose weights are older, in updates, are dropped; ``None`` for none.
        num_clients: How many clients there are.
        seed: The run's seed.
        duration: ``duration(round, client)`` tells how long a client takes that begins when ``round - 1`` updates are
            done, in seconds.
    """

    concurrency: int
    buffer_size: int
    max_staleness: int | None
    num_clients: int
    seed: int
    duration: Callable[[int, int], float]

    def next_update(self, before: Flights, version: int) -> Update:
        """Return what happens from one server update to the next.

        Args:
            before: Who was at work when the last update was done.
            version: How many updates are done.
        """
        heap, busy, versions = [*before.flying], set(before.clients), Counter(before.versions)
        draws = random.Random(seed_for(self.seed, "flights", round=version + 1))
        now, started = before.now, before.started
        update = Update(before)
        while len(update.arrived) < self.buffer_size:
            if heap and heap[0].end <= now:
                flight = heapq.heappop(heap)
                is_late = self.max_staleness is not None and version - flight.version > self.max_staleness
                (update.dropped if is_late else update.arrived).append(flight)
                versions[flight.version] -= 1
                if is_late:
                    busy.remove(flight.client)
                continue
            for _ in range(min(self.concurrency - len(heap), self.num_clients - len(busy))):
                client = self._idle(busy, draws)
                busy.add(client)
                end = now + self.duration(version + 1, client)
                heapq.heappush(heap, Flight(end, started, client, version, now))
                versions[version] += 1
                started += 1
            now = heap[0].end
        working = frozenset(busy.difference([flight.client for flight in update.arrived]))
        update.after = Flights(now, started, tuple(heap), working, +versions)
        return update

    def _idle(self, busy: AbstractSet[int], draws: random.Random) -> int:
        """Return one of those who are not at work, all equally likely."""
        idle = self.num_clients - len(busy)
        if idle * _TRIES < self.num_clients:  # to make the list takes no longer than so many tries
            return [client for client in range(self.num_clients) if client not in busy][draws.randrange(idle)]
        while (client := draws.randrange(self.num_clients)) in busy:
            pass
        return client


@dataclass
class Update:
    """One server update.

    Attributes:
        after: Who is at work when it is done.
        arrived: Those whose replies it is made of, as they arrived.
        dropped: Those whose weights were too old.
    """

    after: Flights
    arrived: list[Flight] = field(default_factory=list)
    dropped: list[Flight] = field(default_factory=list)

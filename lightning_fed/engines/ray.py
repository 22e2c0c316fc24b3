"""The Ray engine: clients in Ray actors, on this machine or on the cluster that the user has.

The process engine with other processes: contexts stay with the grid, replies come out in the order of the messages, an
actor that dies takes one client's work with it. What passes is pickled as between our own processes, through Ray's
object store; the round's weights are put there once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed._compat.flower import server_identity
from lightning_fed.engines import transport
from lightning_fed.engines.base import Engine
from lightning_fed.engines.ray_actors import Actor, Actors, as_array, how_it_ended
from lightning_fed.engines.remote import AHEAD, RemoteGrid, TimeLimit, packed
from lightning_fed.engines.worker import Start
from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.tracebacks import words
from lightning_fed.wire import messages

T = TypeVar("T")


class Ray(Engine):
    """Runs clients in Ray actors, which start once a run. Needs ``pip install "lightning_fed[ray]"``.

    A Ray that runs already is used and left running. Else one is started on this machine, which listens on the loopback
    interface only, and ended with the run.

    Args:
        num_workers: How many actors; by default as many as the cluster has room for.
        client_resources: What Ray keeps free for each, in Ray's words: ``{"num_cpus": 1, "num_gpus": 0.5}``. An actor
            gives torch as many threads as it has CPUs.
        address: The cluster's, as ``ray.init`` takes it; ``None`` for this machine.

    Raises:
        ConfigurationError: If ``num_workers`` is smaller than 1.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, engine=Ray(client_resources={"num_cpus": 2}))
    """

    name = "ray"
    can_vectorize = False

    def __init__(
        self,
        num_workers: int | None = None,
        client_resources: dict[str, float] | None = None,
        address: str | None = None,
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise ConfigurationError(f"Ray(num_workers={num_workers}) must be at least 1.")
        self.num_workers, self.address = num_workers, address
        self.client_resources = {"num_cpus": 1, "num_gpus": 0} | (client_resources or {})

    @property
    def shows_one_device(self) -> bool:
        """See ``Engine``."""
        return True

    def run(self, main: Callable[[Grid], T], client_app: ClientApp, num_clients: Callable[[], int]) -> T:
        """See ``Engine``.

        Raises:
            ConfigurationError: If Ray is not installed, has no room for one client, or cannot start an actor.
        """
        ray = _ray(self.address)
        is_ours = not ray.is_initialized()
        if is_ours:
            _start_ray(ray, self.address)
        grid = RayGrid(ray, client_app, num_clients, self)
        try:
            with server_identity(grid.run.run_id):
                return main(grid)
        finally:
            grid.end()
            if is_ours:
                ray.shutdown()


class RayGrid(RemoteGrid):
    """A Grid over Ray actors."""

    def __init__(self, ray: Any, client_app: ClientApp, num_clients: Callable[[], int], engine: Ray) -> None:
        super().__init__(client_app, num_clients)
        self._ray, self._engine = ray, engine
        self._start = Start(self.app, self.run.run_id, max(1, int(engine.client_resources["num_cpus"])))
        self._actors: Actors | None = None
        self._told: dict[Any, int] = {}  # how many changes each actor knows of
        self._begins_with = 0

    def _exchange(self, sent: list[Message], call: int, timeout: float | None) -> Iterator[Message]:
        actors, deadline = self._enough_for(len(sent)), TimeLimit(timeout)
        waiting, idle = deque(range(len(sent))), list(actors.live)
        at: dict[Any, tuple[int, Any]] = {}
        there: dict[int, Message] = {}
        shared: dict[int, tuple[int, Any]] = {}
        try:
            for index in range(len(sent)):
                while index not in there:
                    ahead = len(sent) if deadline.presses else AHEAD * len(actors)
                    while idle and waiting and waiting[0] <= index + ahead and not deadline.is_up:
                        actor, number = idle.pop(), waiting.popleft()
                        at[self._give(actor, sent[number], call, shared)] = number, actor
                    is_up = deadline.is_up  # what is there by then is taken in below, and waited for no more
                    listened = [*at] if is_up else [*at, *actors.starting]
                    ready, _ = self._ray.wait(listened, timeout=deadline.seconds) if listened else ([], [])
                    for reference in ready:
                        if reference in at:
                            number, actor = at.pop(reference)
                            there[number], free = self._take(sent[number], reference, actor)
                        else:
                            free = actors.started(reference)
                        idle += [] if free is None else [free]
                    if is_up and not ready:
                        break
                if index in there:
                    yield there.pop(index)
        finally:
            for _, actor in at.values():  # nobody waits for these any more
                self._replace(actor)

    def end(self) -> None:
        """End all actors."""
        if self._actors is not None:
            self._actors.end()

    def _enough_for(self, clients: int) -> Actors:
        """Ask for actors, as late as this: by now Lightning has set module and data up."""
        wanted = min(clients, self._wanted())
        if self._actors is None:
            kind = self._ray.remote(Actor).options(**self._engine.client_resources)
            self._begins_with = len(self.changes)
            start = packed(self._start, self._engine.name, transport.to_bytes)
            self._actors = Actors(self._ray, partial(kind.remote, self._ray.put(as_array(start))))
        self._actors.grow(wanted)
        return self._actors

    def _replace(self, actor: Any) -> None:
        assert self._actors is not None
        self._told.pop(actor, None)
        self._actors.replace(actor)

    def _wanted(self) -> int:
        """Return how many actors there may be: all that the cluster, or what Ray Tune gave a trial, has room for."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        needs = {names.get(name, name): need for name, need in self._engine.client_resources.items() if need}
        given, own = self._engine.num_workers, _rest_of_trial(self._ray)
        if given is not None and own is None:
            return given  # a cluster may grow
        if not needs:
            return given or os.cpu_count() or 1
        places = [self._ray.cluster_resources()] if own is None else own
        room = sum(min(int(has.get(name, 0) / need) for name, need in needs.items()) for has in places)
        if room < 1:
            present = {name: sum(has.get(name, 0) for has in places) for name in needs}
            raise ConfigurationError(f"A client asks Ray for {needs}, and {_NO_ROOM[own is not None].format(present)}")
        return min(room, given or room)

    def _give(self, actor: Any, message: Message, call: int, shared: dict[int, tuple[int, Any]]) -> Any:
        new = self.changes[self._told.get(actor, self._begins_with) :]
        self._told[actor] = len(self.changes)
        content: dict[str, Any] = {}
        ahead = []
        for name, record in message.content.items():
            if not isinstance(record, ArrayRecord):
                content[name] = record
                continue
            key = id(record)  # the messages keep it alive
            if key not in shared:
                shared[key] = len(shared), self._ray.put(as_array(transport.to_bytes(record)))
            content[name], reference = shared[key]
            ahead += [content[name], reference]
        return actor.work.remote(as_array(transport.to_bytes([self.task(message, content, call, new)])), *ahead)

    def _take(self, message: Message, reference: Any, actor: Any) -> tuple[Message, Any | None]:
        """Return a reply as the loop gets it, and the actor if it is free now."""
        try:
            [done] = transport.from_bytes(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            self._replace(actor)
            lost = ClientError(f"was lost: its Ray actor {how_it_ended(error)}. Another takes its place.")
            return messages.error_reply(message, lost), None
        except Exception as error:
            return messages.error_reply(message, ClientError(f"sent what cannot be read: {words(error)}")), actor
        return self.take_back(message, done), actor


_NO_ROOM = {
    False: "the cluster has {}: lower Ray(client_resources=...).",
    True: (
        "beside itself its trial of Ray Tune has {}: give trials more, tune.with_resources(objective,"
        ' tune.PlacementGroupFactory([{{"CPU": 1}}] * 3)) for two actors.'
    ),
}


def _rest_of_trial(ray: Any) -> list[dict[str, float]] | None:
    """Return what a trial of Ray Tune has beside what it runs in, by machine; ``None`` where there is no trial.

    Ray starts actors of a trial in its placement group and nowhere else: where that has no room they never start.
    """
    group = ray.util.get_current_placement_group()
    if group is None or not ray.get_runtime_context().should_capture_child_tasks_in_placement_group:
        return None
    first, *others = group.bundle_specs
    taken = ray.get_runtime_context().get_assigned_resources()
    return [{name: has - taken.get(name, 0) for name, has in first.items()}, *others]


# Ray reads these when it is imported. Without the first it listens on all interfaces, and no argument helps.
_LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
_QUIET = (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"))


def _ray(address: str | None) -> Any:
    for name, value in (*_QUIET, *([_LOOPBACK] if address is None else [])):
        if name == _LOOPBACK[0] and name not in os.environ and _is_imported_only():
            rank_zero_warn(
                "Ray was imported before engine='ray' could keep it on the loopback interface: other machines can reach"
                f" its ports. Set {'='.join(_LOOPBACK)} before `import ray`, or leave that import out."
            )
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError("engine='ray' needs Ray: pip install 'lightning_fed[ray]'.") from error
    return ray


def _is_imported_only() -> bool:
    """Return whether somebody has imported Ray and has not started it, as Ray Tune has where it runs us."""
    return "ray" in sys.modules and not sys.modules["ray"].is_initialized()


def _start_ray(ray: Any, address: str | None) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    own = {"include_dashboard": False} if address is None else {}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own exits at once: Lightning saves and stops

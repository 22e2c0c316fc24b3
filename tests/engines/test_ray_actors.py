"""Actors that start, that get no room, and that end, with toys in place of Ray and its processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_fed import ConfigurationError
from lightning_fed.engines import Ray, transport
from lightning_fed.engines.ray import RayGrid
from lightning_fed.engines.ray_actors import Actor, Actors
from lightning_fed.testing import counting_client
from lightning_fed.wire.messages import CLIENT
from tests.engines.clients import train_messages
from tests.helpers import in_flower

NEVER = float("inf")


class Ended(Exception):
    """What Ray raises of an actor that has ended."""


def raises_ended() -> Any:
    raise Ended("of memory")


class Reference:
    """What ``do`` gives, after some seconds."""

    def __init__(self, do: Callable[[], Any], after: float) -> None:
        self.do, self.at = do, time.monotonic() + after


class Toys:
    """In place of Ray's module.

    Args:
        room: For how many actors there is room; those beyond never start.
        starts: What each actor's start does, one after the other; by default it is well.
        clients: By client, what comes of its work (``None`` for its reply), and after how many seconds.
    """

    exceptions = SimpleNamespace(RayError=Ended)
    util = SimpleNamespace(get_current_placement_group=lambda: None)

    def __init__(self, room: int = 2, starts: tuple[Any, ...] = (), **clients: Any) -> None:
        self.room, self._starts, self.clients = room, iter(starts), clients
        self.made: list[Toy] = []
        self.killed: list[Toy] = []

    def remote(self, kind: type) -> Any:
        assert kind is Actor
        return SimpleNamespace(options=lambda **resources: SimpleNamespace(remote=self.make))

    def make(self, start: Any = None) -> Any:
        has_room = len(self.made) - len(self.killed) < self.room
        self.made.append(Toy(self, start, 0.01 if has_room else NEVER, next(self._starts, None)))
        return self.made[-1]

    def put(self, thing: Any) -> Any:
        return thing

    def wait(self, references: list[Reference], timeout: float | None) -> tuple[list[Reference], list[Reference]]:
        until = time.monotonic() + (10 if timeout is None else timeout)
        while True:
            ready = [one for one in references if one.at <= time.monotonic()][:1]
            if ready or time.monotonic() >= until:
                assert ready or timeout is not None, "this waits for ever"
                return ready, []
            time.sleep(0.005)

    def get(self, reference: Reference) -> Any:
        return reference.do()

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


class Toy:
    """An actor of toys; ``served`` are its clients."""

    def __init__(self, ray: Toys, start: Any, after: float, says: Callable[[], Any] | None) -> None:
        self._actor = None if start is None else Actor(start)
        self.served: list[int] = []
        said = says or (lambda: None if self._actor is None else self._actor.said())
        self.said = SimpleNamespace(remote=lambda: Reference(said, after))
        self.work = SimpleNamespace(remote=self._work)
        self._ray = ray

    def _work(self, task: Any, *ahead: Any) -> Reference:
        client = transport.from_bytes(task)[0].context.node_config[CLIENT]
        self.served.append(client)
        do, after = self._ray.clients.get(f"client_{client}", (None, 0.02))
        assert self._actor is not None
        done = self._actor.work(task, *ahead)
        return Reference(do or (lambda: done), after)


def replies(ray: Toys, clients: int = 8, timeout: float | None = None, rounds: int = 1, workers: int = 2) -> list[Any]:
    """For each round, who replied, negative where it is an error."""
    grid = RayGrid(ray, counting_client(), lambda: clients, Ray(num_workers=workers))

    def round() -> list[int]:
        given = grid.send_and_receive(train_messages(grid), timeout=timeout)
        return [grid.client_of(r.metadata.src_node_id) * (-1 if r.has_error() else 1) for r in given]

    try:
        return in_flower(lambda: [round() for _ in range(rounds)])
    finally:
        grid.end()
        assert set(ray.killed) == set(ray.made)


def test_an_actor_that_gets_no_room_is_given_no_work_while_another_idles() -> None:
    assert replies(Toys(room=2), workers=3, rounds=2) == [list(range(8))] * 2


def test_a_replacement_that_gets_no_room_is_given_no_work_either() -> None:
    ray = Toys(client_3=(raises_ended, 0.02))
    kill = ray.kill

    def and_somebody_else_takes_its_room(actor: Any) -> None:
        kill(actor)
        ray.room -= 1

    ray.kill = and_somebody_else_takes_its_room  # type: ignore[method-assign]
    assert replies(ray) == [[0, 1, 2, -3, 4, 5, 6, 7]]
    assert [bool(one.served) for one in ray.made] == [True, True, False]


def test_replies_that_are_there_when_the_time_is_over_count_and_the_next_round_has_all_actors() -> None:
    ray = Toys(client_1=(None, NEVER))
    grid = RayGrid(ray, counting_client(), lambda: 8, Ray(num_workers=2))

    def who(timeout: float) -> list[int]:
        given = grid.send_and_receive(train_messages(grid), timeout=timeout)
        return [grid.client_of(r.metadata.src_node_id) for r in given]

    assert in_flower(lambda: who(1.0)) == [0, 2, 3, 4, 5, 6, 7]
    del ray.clients["client_1"]
    assert in_flower(lambda: who(9.0)) == list(range(8))
    assert len(ray.made) == 3
    assert ray.made[2].served
    assert len(ray.killed) == 1


def test_one_that_ends_before_it_has_started_is_replaced() -> None:
    ray = Toys(starts=(raises_ended, None, raises_ended))
    assert replies(ray) == [list(range(8))]
    assert len(ray.made) >= 3


def test_the_third_in_a_row_that_ends_before_it_has_started_is_an_error() -> None:
    ray = Toys(starts=(raises_ended,) * 9)
    with pytest.raises(
        ConfigurationError, match=r"^3 Ray actors in a row .*: the last one ended \(Ended: of memory\)\.$"
    ):
        replies(ray, workers=1)


def in_trial(bundles: list[dict[str, float]], has: dict[str, float]) -> Any:
    """Ray, in a trial of Ray Tune with these bundles, which runs in so much of the first."""
    ray: Any = Toys()
    ray.util = SimpleNamespace(get_current_placement_group=lambda: SimpleNamespace(bundle_specs=bundles))
    context = SimpleNamespace(should_capture_child_tasks_in_placement_group=True, get_assigned_resources=lambda: has)
    ray.get_runtime_context = lambda: context
    return ray


@pytest.mark.parametrize(
    ("bundles", "workers", "expected"),
    [
        ([{"CPU": 1}] * 3, 8, 2),
        ([{"CPU": 1}] * 3, 1, 1),
        ([{"CPU": 4}], 8, 3),
        ([{"CPU": 1}, {"CPU": 2}], 8, 2),
    ],
)
def test_in_a_trial_of_ray_tune_there_are_as_many_actors_as_it_has_room_for(bundles, workers, expected) -> None:
    ray = in_trial(bundles, {"CPU": 1})
    ray.room = 99
    replies(ray, workers=workers)
    assert len(ray.made) == expected


def test_a_trial_of_ray_tune_without_room_for_an_actor_is_an_error_and_not_a_wait() -> None:
    said = (
        r"asks Ray for \{'CPU': 1\}, and beside itself its trial of Ray Tune has \{'CPU': 0\}: .*PlacementGroupFactory"
    )
    with pytest.raises(ConfigurationError, match=said):
        replies(in_trial([{"CPU": 1}], {"CPU": 1}))


def test_one_that_cannot_work_is_an_error_with_its_words() -> None:
    with pytest.raises(ConfigurationError, match=r"^A Ray actor cannot start:\nno such thing"):
        replies(Toys(starts=(lambda: "no such thing",)))


def test_actors_are_counted_whether_they_have_started_or_not() -> None:
    ray = Toys(room=1)
    actors = Actors(ray, ray.make)
    actors.grow(2)
    actors.grow(1)
    assert len(actors) == len(actors.starting) == 2
    first, _ = actors.starting
    assert actors.started(first) is ray.made[0]
    assert (actors.live, len(actors)) == ([ray.made[0]], 2)
    actors.replace(ray.made[0])
    assert (actors.live, len(actors), ray.killed) == ([], 2, [ray.made[0]])

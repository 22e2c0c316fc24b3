"""Who arrives when: nobody is at work twice, time goes forward, replies are as old as the updates made meanwhile."""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fed.callbacks import FedBuff
from lightning_fed.callbacks.flights import Flights, Schedule


@st.composite
def fleets(draw: st.DrawFn) -> Schedule:
    """Any fleet: with equal devices, with some that take no time, with others in each round."""
    clients = draw(st.integers(1, 12) | st.just(150))
    concurrency = draw(st.integers(1, clients) | st.just(clients))
    some = st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0]) | st.floats(0, 100)
    table = draw(st.lists(some, min_size=clients, max_size=clients))
    moves = draw(st.booleans())
    return Schedule(
        concurrency,
        draw(st.integers(1, concurrency)),
        draw(st.none() | st.integers(0, 3)),
        clients,
        draw(st.integers(0, 99)),
        lambda round, client: table[(client + round) % clients if moves else client],
    )


@given(fleets())
def test_what_holds_for_every_fleet(schedule: Schedule):
    flights, updates, numbers, stale, at_work = Flights(), 25, [], 0, 0
    most = float("inf") if schedule.max_staleness is None else schedule.max_staleness
    for version in range(updates):
        before, update = flights, schedule.next_update(flights, version)
        flights = update.after
        working = [flight.client for flight in flights.flying]
        again = Flights.of(flights.now, flights.started, reversed(flights.flying))  # as of a checkpoint
        assert (again.clients, again.versions) == (flights.clients, flights.versions)
        assert schedule.next_update(again, version + 1).arrived == schedule.next_update(flights, version + 1).arrived
        assert len(set(working)) == len(working) <= schedule.concurrency
        assert len({flight.client for flight in update.arrived}) == len(update.arrived) == schedule.buffer_size
        ends = [flight.end for flight in update.arrived]
        assert ends == sorted(ends)
        assert before.now <= ends[-1] == flights.now
        for flight in (*update.arrived, *update.dropped):
            assert flight.start <= flight.end <= flights.now
            assert 0 <= flight.version <= version
            assert (version - flight.version > most) == (flight in update.dropped)
        done = [*update.arrived, *update.dropped]
        numbers += [flight.number for flight in done]
        stale += sum(version - flight.version for flight in done)
        at_work += len(flights.flying)
    assert sorted([*numbers, *(flight.number for flight in flights.flying)]) == list(range(flights.started))
    # Each update makes those at work one version older. So the mean staleness is concurrency / buffer_size at most.
    assert stale + sum(updates - flight.version for flight in flights.flying) == at_work
    assert stale <= updates * schedule.concurrency


@given(fleets())
def test_the_versions_that_are_kept_are_those_that_somebody_began_with(fleet: Schedule):
    method = FedBuff(fleet.concurrency, fleet.buffer_size, max_staleness=fleet.max_staleness)
    method._clock = SimpleNamespace(planned=fleet.duration, now=0.0)
    before: set[int] = set()
    for round in range(1, 20):
        cohort = method.sample("train", round, fleet.num_clients, fleet.seed)
        weights = {"w": torch.tensor(float(round - 1))}
        sent = method.weights_to_client(round, weights)
        for flight in method.update.arrived:
            began = sent.get(flight.client, weights)
            assert began["w"] == flight.version
        assert sent.keys() <= set(cohort)
        # Those of the round that runs, for a checkpoint of before and of after it.
        at_work = {flight.version for flight in method.update.after.flying}
        assert method.state_dict()["versions"].keys() == {round - 1} | before | at_work
        before = at_work

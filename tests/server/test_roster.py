"""The roll call: who is there, waited for as long as it takes and no longer."""

from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, strategy_utils

from lightning_fed.callbacks import PartialParticipation
from lightning_fed.errors import ConfigurationError
from lightning_fed.server import roster
from lightning_fed.strategies import WeightedMean
from lightning_fed.testing import toy_weights
from lightning_fed.wire import messages
from tests.helpers import SuperLinkLike, in_flower
from tests.server.round_runs import COUNTING, NODES, grid_of, rounds_on, run


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds, which pass only by sleeping."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        assert now[0] < 200, "waited for ever"

    monkeypatch.setattr(strategy_utils, "sleep", sleep)
    monkeypatch.setattr(roster, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


def test_every_node_is_asked_once_who_it_is():
    grid = grid_of(COUNTING)

    def main():
        rounds = rounds_on(grid)
        for round in (1, 2):
            rounds.run(round, toy_weights(), False)
        return {node: rounds.roster.client_of(node) for node in NODES}, [rounds.roster.node_of(k) for k in range(4)]

    clients, nodes = in_flower(main)
    assert clients == NODES
    assert [NODES[node] for node in nodes] == [0, 1, 2, 3]
    queries = [m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "query"]
    assert sorted(queries) == sorted(NODES)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([0, 1, 1], r"3 nodes say they are clients \[0, 1, 1\]: give them the partition-id 0 to 2"),
        ([0, 1, 7], r"3 nodes say they are clients \[0, 1, 7\]"),
    ],
)
def test_nodes_that_claim_wrong_numbers_are_refused(clients, message):
    grid = grid_of(COUNTING, {100 + i: k for i, k in enumerate(clients)}, order=lambda replies: replies)
    with pytest.raises(ConfigurationError, match=message):
        in_flower(lambda: rounds_on(grid))


def call_of(clients, least, known):
    """The roll call of nodes ``100 + i`` that say they are these clients."""
    grid = grid_of(COUNTING, {100 + i: k for i, k in enumerate(clients)}, order=lambda replies: replies)
    return in_flower(lambda: roster.RollCall(grid, 7.5, least, known))


def test_more_nodes_than_clients_are_left_out_with_a_line():
    said = (
        r"5 nodes say they are clients \[0, 1, 2, 3, 9\], and the run has 3: those beyond are left out, node 100, 103"
    )
    with pytest.warns(UserWarning, match=said):
        called = call_of([3, 0, 1, 9, 2], least=3, known=3)
    assert called.num_clients == 3
    assert [called.node_of(client) for client in range(3)] == [101, 102, 104]


@pytest.mark.parametrize(
    ("clients", "said"),
    [
        ([0, 1, 7], r"3 nodes say they are clients \[0, 1, 7\], and the run has 3: give them the partition-id 0 to 2"),
        ([0, 1, 2, 2], r"4 nodes say they are clients \[0, 1, 2, 2\], and the run has 3: give them .* 0 to 2"),
        ([0, 1, -1], r"3 nodes say they are clients \[-1, 0, 1\]"),
        ([0, 1, "two\x1b[2J" * 9999], r"The node 102 says that it is client 'two\\x1b.{200}"),
        ([0, 1, True], "The node 102 says that it is client True: give it a partition-id from 0"),
    ],
    ids=["one beyond in place of one", "one twice", "one below 0", "a text", "a truth"],
)
def test_nodes_that_are_not_the_runs_clients_are_refused(clients, said):
    with pytest.raises(ConfigurationError, match=said) as error:
        call_of(clients, least=3, known=3)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_node_that_does_not_answer_the_roll_call_is_refused():
    grid = grid_of(COUNTING, order=lambda replies: replies[1:])
    with pytest.raises(ConfigurationError, match="4 nodes say they are clients"):
        in_flower(lambda: rounds_on(grid))


def test_node_without_a_number_is_refused_with_what_it_says():
    grid = SuperLinkLike(COUNTING, {5: {}})
    with pytest.raises(ConfigurationError, match=r"did not say who it is: .*partition-id"):
        in_flower(lambda: rounds_on(grid))


def test_run_does_not_wait_for_ever_for_clients_to_connect(clock):
    cohorts = PartialParticipation(min_available_clients=5)
    with pytest.raises(ConfigurationError, match=r"4 clients connected within 30 s; 5 are needed"):
        in_flower(lambda: rounds_on(grid_of(COUNTING), cohorts=cohorts, timeout=30))


def test_client_that_connects_late_is_waited_for(clock, monkeypatch):
    said = []
    monkeypatch.setattr(roster, "rank_zero_info", said.append)

    class Late(SuperLinkLike):
        asked = 0

        def get_node_ids(self):
            self.asked += 1
            return list(self.contexts)[: None if self.asked > 2 else 2]

    grid = Late(COUNTING, {node: {messages.CLIENT: k} for node, k in NODES.items()})
    cohorts = PartialParticipation(min_available_clients=4)
    assert in_flower(lambda: rounds_on(grid, cohorts=cohorts).roster.num_clients) == 4
    assert said == ["2 of 4 clients are here: waiting for the others"]


def test_strategy_may_ask_for_the_clients_as_often_as_it_likes(clock):
    class Curious(WeightedMean):
        def configure_train(self, server_round, arrays, config, grid):
            assert all(len(list(grid.get_node_ids())) == 4 for _ in range(50))
            return super().configure_train(server_round, arrays, config, grid)

    assert torch.equal(run(COUNTING, Curious()).weights["matrix"], toy_weights()["matrix"] + 3)


def test_strategy_that_waits_for_more_clients_than_the_cohort_is_stopped(clock):
    cohorts = PartialParticipation(fraction_train=0.25)
    with pytest.raises(ConfigurationError, match=r"waits for more clients than take part in the round: 1\. Lower its"):
        run(COUNTING, FedAvg(), cohorts=cohorts)


def test_a_strategy_s_grid_has_the_cohort_and_all_else_of_the_grid_below():
    grid = Mock(Grid, run="the run")
    cohort = roster.CohortGrid(grid, [31, 77])
    assert list(cohort.get_node_ids()) == [31, 77]
    cohort.get_node_ids().clear()  # it is the strategy's own
    assert list(cohort.get_node_ids()) == [31, 77]
    assert cohort.send_and_receive(["a"], timeout=3.0) is grid.send_and_receive.return_value
    assert cohort.push_messages(["a"]) is grid.push_messages.return_value
    assert cohort.pull_messages(["id"]) is grid.pull_messages.return_value
    assert cohort.create_message("content", "train", 31, "group", 5.0) is grid.create_message.return_value
    cohort.set_run("another")
    assert cohort.run == "the run"
    assert grid.mock_calls == [
        call.send_and_receive(["a"], timeout=3.0),
        call.push_messages(["a"]),
        call.pull_messages(["id"]),
        call.create_message("content", "train", 31, "group", 5.0),
        call.set_run("another"),
    ]


def test_a_strategy_may_take_its_time_between_looks(clock):
    cohort = roster.CohortGrid(Mock(Grid), [31])
    for _ in range(3):
        assert list(cohort.get_node_ids()) == [31]
        clock[0] += 30
    with pytest.raises(ConfigurationError, match="waits for more clients than take part in the round: 1"):
        cohort.get_node_ids()


def test_the_roll_call_waits_for_the_replies_as_long_as_it_is_told():
    grid = grid_of(COUNTING)
    called = in_flower(lambda: roster.RollCall(grid, 7.5, least=4))
    assert grid.timeouts == [7.5]
    assert called.num_clients == 4
    assert {called.client_of(node): node for node in NODES} == {k: called.node_of(k) for k in range(4)}
    with pytest.raises(KeyError):
        called.node_of(4)

"""The loop: four steps, client order whatever the grid."""

import gc
import logging
import random
import warnings

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from flwr.serverapp.strategy import FedAvg

from lightning_fed.callbacks import CohortOwner, FaultTolerance, PartialParticipation
from lightning_fed.engines import InProcess
from lightning_fed.server.rounds import quiet_flower
from lightning_fed.strategies import WeightedMean
from lightning_fed.testing import toy_weights
from lightning_fed.values.metrics import COMPUTED, MetricState
from lightning_fed.wire import extras, messages
from tests.helpers import in_flower
from tests.server.round_runs import COUNTING, NODES, Diary, client, grid_of, rounds_on, run, unchanged


@pytest.mark.parametrize("ours", [True, False])
def test_round_gives_the_weighted_mean_in_every_dtype(ours):
    # Client k adds k + 1 and counts k + 1 examples: the mean of 1, 2, 3, 4 weighted by themselves is 3.
    weights = {"steps": torch.tensor(10), **toy_weights(), "on": torch.tensor([True, False])}
    before = {name: tensor.clone() for name, tensor in weights.items()}

    def train(k, message):
        got = messages.read_instruction(message).weights
        return messages.train_reply(message, {n: t + (k + 1) for n, t in got.items()}, k + 1, {"loss": float(k)})

    def train_with_integers(k, message):
        integers = extras.detach_integers(message)
        reply = train(k, message)
        extras.attach(reply, extras.Extras({n: t if n == "on" else t + k for n, t in integers.items()}))
        return reply

    if ours:
        result = InProcess().run(
            lambda grid: rounds_on(grid).run(1, weights, False), client(train_with_integers), lambda: 4
        )
    else:
        result = run(client(train_with_integers), weights=weights)
    assert list(result.weights) == list(weights)
    for name, tensor in toy_weights().items():
        assert result.weights[name].dtype == tensor.dtype
        assert torch.equal(result.weights[name], tensor + 3)
    assert result.weights["steps"].item() == 12
    assert result.weights["steps"].dtype == torch.int64
    assert result.weights["on"].tolist() == [True, False]
    assert result.metrics["loss"] == pytest.approx(2.0)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


def test_hooks_come_in_the_documented_order_and_clients_in_theirs():
    diary = Diary()
    result = run(COUNTING, round=7, evaluate=True, callbacks=[diary])
    assert diary.lines == [
        "7 train starts [0, 1, 2, 3]",
        *(f"7 train client {k} x{k + 1}" for k in range(4)),
        "7 evaluate starts [0, 1, 2, 3]",
        *(f"7 evaluate client {k} x1" for k in range(4)),
        "7 ends",
    ]
    assert result.metrics["added"] == 1.0


def test_training_metrics_keep_their_names_and_the_clients_own_evaluation_gets_a_prefix():
    result = run(COUNTING, evaluate=True)
    assert result.metrics["client"] == pytest.approx(2.0)  # weighted by 1, 2, 3, 4
    assert result.metrics["clients/client"] == pytest.approx(1.5)  # weighted alike


@pytest.mark.parametrize("shuffle", range(3))
def test_order_of_arrival_changes_nothing_to_the_bit(shuffle):
    def train(k, message):
        noise = torch.randn(1000, generator=torch.Generator().manual_seed(k)) * 10.0**k
        return messages.train_reply(message, {"w": noise}, 2 * k + 1, {"loss": 0.1 * k})

    weights = {"w": torch.zeros(1000)}
    order = random.Random(shuffle)
    shuffled = run(client(train), weights=weights, grid=grid_of(client(train), order=lambda r: order.sample(r, len(r))))
    ours = InProcess().run(lambda g: rounds_on(g).run(1, weights, False), client(train), lambda: 4)
    assert torch.equal(shuffled.weights["w"], ours.weights["w"])
    assert shuffled.metrics == ours.metrics


def test_client_gets_the_round_and_the_runs_seed():
    told = []

    def train(k, message):
        instruction = messages.read_instruction(message)
        told.append((k, instruction.round, instruction.seed))
        return messages.train_reply(message, instruction.weights, 1, {})

    run(client(train), round=5, seed=1234)
    assert told == [(k, 5, 1234) for k in range(4)]


def test_only_the_cohort_is_asked_and_is_all_that_a_strategy_sees():
    class Looking(WeightedMean):
        def configure_train(self, server_round, arrays, config, grid):
            self.seen = sorted(grid.get_node_ids())
            return super().configure_train(server_round, arrays, config, grid)

    strategy, diary, grid = Looking(), Diary(), grid_of(COUNTING)
    cohorts = PartialParticipation(fraction_train=0.5)
    run(COUNTING, strategy, grid=grid, cohorts=cohorts, callbacks=[diary])
    cohort = cohorts.sample("train", 1, 4, 0)
    assert len(cohort) == 2
    assert diary.lines[0] == f"1 train starts {cohort}"
    addresses = {node for node, k in NODES.items() if k in cohort}
    assert set(strategy.seen) == addresses
    assert {m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"} == addresses


def test_strategy_may_choose_among_the_cohort():
    diary = Diary()
    run(COUNTING, FedAvg(fraction_train=0.5, min_train_nodes=1), callbacks=[diary])
    assert len(diary.lines) == 1 + 2 + 1


def test_fast_dev_run_truncates_the_cohort():
    diary = Diary()
    run(COUNTING, max_clients=2, callbacks=[diary])
    assert diary.lines[0] == "1 train starts [0, 1]"


def test_nobody_evaluates_where_the_cohort_is_empty():
    diary = Diary()
    result = run(COUNTING, evaluate=True, cohorts=PartialParticipation(fraction_evaluate=0), callbacks=[diary])
    assert not any("evaluate" in line for line in diary.lines)
    assert not any(name.startswith("clients/") for name in result.metrics)


def test_client_without_data_to_evaluate_on_is_no_failure_and_has_no_weight():
    def evaluate(k, message):
        return messages.evaluate_reply(message, 0 if k == 1 else 2, {} if k == 1 else {"acc": float(k)})

    diary = Diary()
    result = run(client(unchanged, evaluate), evaluate=True, callbacks=[diary])
    assert result.metrics["clients/acc"] == pytest.approx(5 / 3)
    assert not diary.errors
    assert "1 evaluate client 1 x0" not in diary.lines


def test_grid_waits_no_longer_than_the_timeout():
    grid = grid_of(COUNTING)
    run(COUNTING, grid=grid, timeout=12.5)
    assert set(grid.timeouts) == {12.5}


class Drawing(WeightedMean):
    """Draws from every global generator, as DP strategies and Flower's sampling do."""

    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, replies)
        self.drawn = (random.random(), float(np.random.rand()), float(torch.rand(1)))
        return result


def test_what_a_strategy_draws_depends_on_seed_and_round_alone():
    def drawn(seed, round, outer):
        torch.manual_seed(outer)
        random.seed(outer)
        np.random.seed(outer)
        strategy = Drawing()
        run(COUNTING, strategy, round=round, seed=seed)
        return strategy.drawn

    assert drawn(0, 1, outer=5) == drawn(0, 1, outer=6)
    assert len({drawn(0, 1, 5), drawn(0, 2, 5), drawn(1, 1, 5)}) == 3


def test_failing_client_that_is_tolerated_does_not_change_what_a_strategy_draws():
    # A client in this process draws, seeds and raises; on another engine it would do so elsewhere.
    from lightning_fed.seeding import seeded

    def train(k, message):
        with seeded(k):
            torch.rand(3)
            if k == 1:
                raise ValueError("no")
        return messages.train_reply(message, messages.read_instruction(message).weights, 1, {})

    failing, good = Drawing(), Drawing()
    run(client(train), failing, failures=FaultTolerance(on_error="ignore"))
    run(COUNTING, good)
    assert failing.drawn == good.drawn


def test_round_leaves_the_global_generators_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run(COUNTING, Drawing())
    assert torch.equal(torch.rand(1), expected)


def test_metric_that_cannot_be_merged_is_said_once_by_name():
    def train(k, message):
        reply = messages.train_reply(message, messages.read_instruction(message).weights, k + 1, {})
        state = MetricState("f1", COMPUTED, {"value": torch.tensor(float(k))})
        extras.attach(reply, extras.Extras(states=[state]))
        return reply

    def main():
        rounds = rounds_on(grid_of(client(train)))
        with pytest.warns(UserWarning, match="The logged 'f1' cannot be merged over clients exactly"):
            first = rounds.run(1, toy_weights(), False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rounds.run(2, toy_weights(), False)
        return first.metrics["f1"]

    assert in_flower(main) == pytest.approx(2.0)


def test_flowers_round_by_round_log_is_quiet_unless_asked_for(monkeypatch):
    logger = logging.getLogger("flwr")
    monkeypatch.delenv("FLWR_LOG_LEVEL", raising=False)
    monkeypatch.setattr(logger, "level", logging.INFO)
    with quiet_flower():
        assert logger.getEffectiveLevel() == logging.WARNING
    assert logger.level == logging.INFO
    monkeypatch.setenv("FLWR_LOG_LEVEL", "INFO")
    with quiet_flower():
        assert logger.level == logging.INFO


class FromElsewhere(CohortOwner):
    """Client 1 begins with sevens."""

    def weights_to_client(self, round, weights):
        return {1: {name: torch.full_like(tensor, 7) for name, tensor in weights.items()}}


@pytest.mark.parametrize("key", ["arrays", "model"])
def test_a_client_begins_with_weights_of_its_own_whatever_the_strategy_calls_them(key: str):
    began = {}

    def train(k, message):
        began[k] = messages.read_instruction(message).weights
        return messages.train_reply(message, began[k], 1, {})

    weights = toy_weights()
    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1, arrayrecord_key=key)
    run(client(train), strategy, weights=weights, cohorts=FromElsewhere())
    for name, tensor in weights.items():
        assert [torch.equal(began[k][name], tensor) for k in range(4)] == [True, False, True, True]
        assert torch.equal(began[1][name], torch.full_like(tensor, 7))


def test_a_reply_that_counts_otherwise_is_not_left_to_the_garbage_collector():
    alive = []

    class Counts(CohortOwner):
        def contribution(self, round, client, trained, weights):
            return {name: tensor.clone() for name, tensor in trained.items()}

    def train(k, message):
        alive.append(sum(isinstance(one, RecordDict) for one in gc.get_objects()))
        return unchanged(k, message)

    gc.collect()
    gc.disable()
    try:
        InProcess().run(lambda g: rounds_on(g, cohorts=Counts()).run(1, toy_weights(), False), client(train), lambda: 4)
    finally:
        gc.enable()
    assert alive == [alive[0]] * 4

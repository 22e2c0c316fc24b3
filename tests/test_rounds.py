"""The loop: four steps, client order whatever the grid, and no failure that goes unsaid."""

import logging
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedMedian, strategy_utils
from torch import nn

from lightning_fed.callbacks import FaultTolerance, FederatedCallback, PartialParticipation
from lightning_fed.callbacks.base import CohortOwner, FailureOwner
from lightning_fed.engines import InProcess
from lightning_fed.errors import ClientError, ConfigurationError, InvalidUpdateError, RoundError
from lightning_fed.server import roster
from lightning_fed.server.rounds import Rounds, quiet_flower
from lightning_fed.strategies import WeightedMean
from lightning_fed.testing import counting_client, failing_client, toy_weights
from lightning_fed.values.metrics import COMPUTED, MetricState
from lightning_fed.wire import beside, messages
from tests.helpers import SuperLinkLike, in_flower

NODES = {9_000_000_017: 2, 31: 0, 5_555_555_555_555: 3, 77: 1}  # address -> client


def grid_of(app: ClientApp, nodes: dict[int, int] = NODES, **kwargs) -> SuperLinkLike:
    return SuperLinkLike(app, {node: {messages.CLIENT: client} for node, client in nodes.items()}, **kwargs)


class Diary(FederatedCallback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[ClientError] = []
        self.logged: dict[str, float] = {}

    def on_round_start(self, trainer, round, stage, cohort):
        self.lines.append(f"{round} {stage} starts {list(cohort)}")

    def on_client_end(self, trainer, round, stage, report):
        self.lines.append(f"{round} {stage} client {report.client} x{report.num_examples:g}")

    def on_client_error(self, trainer, round, stage, error):
        self.lines.append(f"{round} {stage} client {error.client} fails")
        self.errors.append(error)

    def on_round_end(self, trainer, round, metrics):
        self.lines.append(f"{round} ends")
        metrics["added"] = 1.0
        self.logged = metrics


def rounds_on(grid, strategy=None, **kwargs) -> Rounds:
    defaults = {
        "callbacks": [],
        "cohorts": CohortOwner(),
        "failures": FailureOwner(),
        "trainer": None,
        "module": nn.Module(),
        "seed": 0,
        "timeout": 60.0,
    }
    arguments = {**defaults, **kwargs}
    known = roster.RollCall(grid, arguments["timeout"], arguments["cohorts"].min_available_clients)
    return Rounds(grid, known, strategy or WeightedMean(), **arguments)


def run(app, strategy=None, round=1, weights=None, evaluate=False, grid=None, **kwargs):
    """One round on a grid that is not ours."""
    grid = grid or grid_of(app)
    weights = toy_weights() if weights is None else weights
    return in_flower(lambda: rounds_on(grid, strategy, **kwargs).run(round, weights, evaluate))


def unchanged(client: int, message: Message) -> Message:
    """Replies with the weights that came."""
    return messages.train_reply(message, messages.read_instruction(message).weights, 1, {})


def client(train, evaluate=None) -> ClientApp:
    """An app of two functions ``f(client, message) -> reply`` that also answers the roll call."""
    app = ClientApp()
    for kind, function in (("train", train), ("evaluate", evaluate)):
        if function is not None:

            def serve(message, context, function=function):
                return function(int(context.node_config[messages.CLIENT]), message)

            getattr(app, kind)()(serve)
    return with_query(app)


def with_query(app: ClientApp) -> ClientApp:
    """The public toys do not answer the roll call; now they do."""

    @app.query()
    def who(message, context):
        record = ConfigRecord({messages.CLIENT: context.node_config[messages.CLIENT]})
        return Message(RecordDict({messages.CONFIG: record}), reply_to=message)

    return app


COUNTING = with_query(counting_client())


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


# ------------------------------------------------------------------------------------------------- a good round


@pytest.mark.parametrize("ours", [True, False])
def test_round_gives_the_weighted_mean_in_every_dtype(ours):
    # Client k adds k + 1 and counts k + 1 examples: the mean of 1, 2, 3, 4 weighted by themselves is 3.
    weights = {"steps": torch.tensor(10), **toy_weights(), "on": torch.tensor([True, False])}
    before = {name: tensor.clone() for name, tensor in weights.items()}

    def train(k, message):
        got = messages.read_instruction(message).weights
        return messages.train_reply(message, {n: t + (k + 1) for n, t in got.items()}, k + 1, {"loss": float(k)})

    def train_with_integers(k, message):
        integers = beside.detach(message)
        reply = train(k, message)
        beside.attach_extras(reply, beside.Extras({n: t if n == "on" else t + k for n, t in integers.items()}))
        return reply

    if ours:
        result = InProcess().run(
            lambda grid: rounds_on(grid).run(1, weights, False), client(train_with_integers), lambda: 4
        )
    else:
        result = run(client(train_with_integers), weights=weights)
    assert list(result.weights) == list(weights)
    for name, tensor in toy_weights().items():
        assert result.weights[name].dtype == (tensor.dtype if ours or name != "narrow" else torch.float32)
        assert torch.equal(result.weights[name].to(tensor.dtype), tensor + 3)
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


# ------------------------------------------------------------------------------------------------- randomness


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


# ------------------------------------------------------------------------------------------------- roll call


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


def test_client_that_connects_late_is_waited_for(clock):
    class Late(SuperLinkLike):
        asked = 0

        def get_node_ids(self):
            self.asked += 1
            return list(self.contexts)[: None if self.asked > 2 else 2]

    grid = Late(COUNTING, {node: {messages.CLIENT: k} for node, k in NODES.items()})
    cohorts = PartialParticipation(min_available_clients=4)
    assert in_flower(lambda: rounds_on(grid, cohorts=cohorts).roster.num_clients) == 4


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


# ------------------------------------------------------------------------------------------------- failures


FAILING = with_query(failing_client(lambda k: k in (1, 3)))


def test_first_failure_stops_the_run_with_client_round_stage_and_traceback():
    diary = Diary()
    with pytest.raises(ClientError, match=r"Round 4, train: client 1 raised ValueError: client 1 fails\n") as caught:
        InProcess().run(
            lambda grid: rounds_on(grid, callbacks=[diary]).run(4, toy_weights(), False), FAILING, lambda: 4
        )
    error = caught.value
    assert (error.client, error.round, error.stage) == (1, 4, "train")
    assert "\nThe client's traceback:\n" in str(error)
    assert not any("ends" in line for line in diary.lines)


def test_exception_of_a_client_in_this_process_is_the_cause():
    with pytest.raises(ClientError, match="client 1 raised ValueError") as caught:
        InProcess().run(lambda grid: rounds_on(grid).run(1, toy_weights(), False), FAILING, lambda: 2)
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.__cause__.__traceback__ is not None


def test_tolerated_failures_are_told_and_the_mean_is_over_the_rest():
    diary = Diary()
    with pytest.warns(UserWarning, match=r"client 1 raised ValueError: client 1 fails \(1 of 4 failed so far"):
        result = run(FAILING, failures=FaultTolerance(min_results=2), callbacks=[diary])
    # Clients 0 and 2 add 1 and 3 with 1 and 3 examples.
    assert torch.equal(result.weights["matrix"], toy_weights()["matrix"] + 2.5)
    assert [line for line in diary.lines if "fails" in line] == ["1 train client 1 fails", "1 train client 3 fails"]
    assert [error.client for error in diary.errors] == [1, 3]


def test_round_with_too_few_good_replies_is_an_error():
    with pytest.raises(
        RoundError, match=r"Round 2: 2 of 4 clients gave a good train reply, and 3 are needed"
    ) as caught:
        run(FAILING, round=2, failures=FaultTolerance(min_results=3, on_error="ignore"))
    assert (caught.value.round, caught.value.stage) == (2, "train")


def test_round_in_which_all_fail_is_an_error_and_keeps_no_old_weights():
    app = with_query(failing_client(lambda k: True))
    with pytest.raises(RoundError, match="0 of 4 clients gave a good train reply, and 1 are needed"):
        run(app, failures=FaultTolerance(on_error="ignore"))


def test_failed_evaluation_is_a_failure_of_its_stage():
    def evaluate(k, message):
        raise LookupError("no data")

    app = client(unchanged, evaluate)
    with pytest.raises(ClientError, match=r"Round 1, evaluate: client 0 raised LookupError: no data") as caught:
        run(app, evaluate=True)
    assert caught.value.stage == "evaluate"


def test_client_that_does_not_reply_has_failed():
    def drop(replies):
        return [r for r in replies if r.metadata.message_type != "train" or NODES[r.metadata.src_node_id] != 2]

    with pytest.raises(ClientError, match=r"Round 1, train: client 2 did not reply within 60 s") as caught:
        run(COUNTING, grid=grid_of(COUNTING, order=drop))
    assert caught.value.client == 2


def nan(weights):
    weights["matrix"][0, 1] = float("nan")


def missing(weights):
    del weights["scalar"]


def reshaped(weights):
    weights["matrix"] = weights["matrix"].reshape(3, 2)


@pytest.mark.parametrize(
    ("spoil", "tensor", "message"),
    [
        (nan, "matrix", "client 2 sent 'matrix' with NaN or Inf"),
        (missing, "scalar", "client 2 sent no 'scalar'"),
        (reshaped, "matrix", r"client 2 sent 'matrix' of shape \(3, 2\), the global model has \(2, 3\)"),
    ],
)
def test_update_that_cannot_be_used_is_a_failure_that_names_client_and_tensor(spoil, tensor, message):
    def train(k, m):
        weights = {name: t.clone() for name, t in messages.read_instruction(m).weights.items()}
        if k == 2:
            spoil(weights)
        return messages.train_reply(m, weights, 1, {})

    with pytest.raises(InvalidUpdateError, match=r"Round 1, train: " + message) as caught:
        run(client(train))
    assert (caught.value.client, caught.value.tensor, caught.value.round) == (2, tensor, 1)
    result = run(client(train), failures=FaultTolerance(min_results=3, on_error="ignore"))
    assert torch.equal(result.weights["matrix"], toy_weights()["matrix"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metrics": MetricRecord({"num-examples": 3})}, "client 0 sent no weights"),
        ({"arrays": messages.pack(toy_weights())}, "client 0 reports 0 examples; it cannot be averaged"),
        (
            {"arrays": messages.pack(toy_weights()), "metrics": MetricRecord({"num-examples": -2})},
            "client 0 reports -2 examples",
        ),
        (
            {"arrays": messages.pack(toy_weights()), "metrics": MetricRecord({"num-examples": float("nan")})},
            "client 0 reports nan examples",
        ),
    ],
)
def test_reply_without_weights_or_examples_is_a_failure(content, message):
    with pytest.raises(ClientError, match=message):
        run(client(lambda k, m: Message(RecordDict(content), reply_to=m)))


def test_failure_is_not_hidden_by_a_strategy_that_stops_reading():
    class Hasty(WeightedMean):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, [next(iter(replies))])

    with pytest.raises(ClientError, match="client 1 fails"):
        run(FAILING, Hasty())


def test_exception_of_a_callback_is_its_own_and_not_the_strategys():
    class Broken(FederatedCallback):
        def on_client_end(self, trainer, round, stage, report):
            raise ZeroDivisionError("in the callback")

    with pytest.raises(ZeroDivisionError, match="in the callback"):
        run(COUNTING, callbacks=[Broken()])


# ------------------------------------------------------------------------------------------------- strategies that fail


class Gives(FedAvg):
    """Aggregates to what it is told to."""

    def __init__(self, gives):
        super().__init__()
        self.gives = gives

    def aggregate_train(self, server_round, replies):
        list(replies)
        return self.gives(), None


def explode():
    raise ArithmeticError("boom")


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda: None, "Round 3: Gives gave no new weights"),
        (explode, "Round 3: Gives could not aggregate the train replies: ArithmeticError: boom"),
        (lambda: ArrayRecord(), "Round 3: Gives gave weights that sent no 'matrix'"),
        (
            lambda: messages.pack({**toy_weights(), "scalar": torch.tensor(float("inf"))}),
            "Round 3: Gives gave weights that sent 'scalar' with NaN or Inf",
        ),
    ],
)
def test_strategy_that_gives_no_usable_weights_is_an_error_of_the_round(gives, message):
    with pytest.raises(RoundError, match=message) as caught:
        run(COUNTING, Gives(gives), round=3)
    assert caught.value.round == 3


def test_robust_strategy_of_flowers_own_runs_on_any_grid():
    weights = {"w": torch.zeros(2)}
    result = run(COUNTING, FedMedian(), weights=weights)
    assert result.weights["w"].tolist() == [2.5, 2.5]


# ------------------------------------------------------------------------------------------------- what is said


def test_metric_that_cannot_be_merged_is_said_once_by_name():
    def train(k, message):
        reply = messages.train_reply(message, messages.read_instruction(message).weights, k + 1, {})
        state = MetricState("f1", COMPUTED, {"value": torch.tensor(float(k))})
        beside.attach_extras(reply, beside.Extras(states=[state]))
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

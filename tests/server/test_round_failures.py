"""A round's failures: none goes unsaid, of a client or of a strategy."""

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian

from lightning_fed.callbacks import FaultTolerance, FederatedCallback
from lightning_fed.engines import InProcess
from lightning_fed.errors import ClientError, InvalidUpdateError, RoundError
from lightning_fed.strategies import WeightedMean
from lightning_fed.testing import failing_client, toy_weights
from lightning_fed.wire import messages
from tests.server.round_runs import (
    COUNTING,
    NODES,
    Diary,
    Gives,
    client,
    grid_of,
    rounds_on,
    run,
    unchanged,
    with_query,
)

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

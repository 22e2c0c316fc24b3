"""What a reply may hold: whatever a client sends, it is a good update or a failure that names the client."""

import gc
import warnings
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict

from lightning_fed.callbacks import FaultTolerance
from lightning_fed.engines import InProcess
from lightning_fed.errors import ClientError, InvalidUpdateError, RoundError
from lightning_fed.testing import toy_weights
from lightning_fed.values.metrics import MEAN, MetricState
from lightning_fed.wire import extras, messages
from tests.server.round_runs import COUNTING, Diary, Gives, client, grid_of, rounds_on, run, unchanged

WEIGHTS = {**toy_weights(), "steps": torch.tensor(10), "on": torch.tensor([True, False]), "z": torch.ones(2) * 1j}


def honest(k: int, message: Message) -> Message:
    """Sends the weights back as they came, integers and one metric's state, too."""
    integers = extras.detach_integers(message)
    reply = messages.train_reply(message, messages.read_instruction(message).weights, 1, {"loss": 1.0})
    loss = MetricState("loss", MEAN, {"value": torch.tensor(1.0), "weight": torch.tensor(1.0)})
    extras.attach(reply, extras.Extras(integers, [loss]))
    return reply


def spoiled(spoil: Callable[[RecordDict], None]):
    """Client 2 sends something else."""

    def train(k: int, message: Message) -> Message:
        reply = honest(k, message)
        if k == 2:
            spoil(reply.content)
        return reply

    return client(train)


def as_dtype(name: str, dtype: torch.dtype, key: str = "arrays") -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        tensor = messages.tensor_of(content[key][name]).clone()
        content[key][name] = messages.TensorArray(tensor.real.to(dtype) if tensor.is_complex() else tensor.to(dtype))

    return spoil


def put(name: str, tensor: torch.Tensor, key: str = "arrays") -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        content[key][name] = messages.TensorArray(tensor)

    return spoil


INTEGERS, STATES, SPECS = (f"lightning-fed.{kind}" for kind in ("integers", "states", "specs"))


@pytest.mark.parametrize(
    ("spoil", "tensor", "text"),
    [
        (as_dtype("matrix", torch.int32), "matrix", "'matrix' as int32, the global model has float32"),
        (as_dtype("matrix", torch.bool), "matrix", "'matrix' as bool, the global model has float32"),
        (as_dtype("matrix", torch.complex64), "matrix", "'matrix' as complex64, the global model has float32"),
        (as_dtype("z", torch.float32), "z", "'z' as float32, the global model has complex64"),
        (as_dtype("steps", torch.float32, INTEGERS), "steps", "'steps' as float32, the global model has int64"),
        (as_dtype("steps", torch.int8, INTEGERS), "steps", "'steps' as int8, the global model has int64"),
        (as_dtype("on", torch.int64, INTEGERS), "on", "'on' as int64, the global model has bool"),
        # Beside the weights that a strategy sees, where it would take their place unseen.
        (
            put("matrix", torch.zeros(2, 3), INTEGERS),
            "matrix",
            "'matrix' among its integer and bool tensors, .* float32",
        ),
        (put("other", torch.tensor(1), INTEGERS), "other", "'other', which the global model does not have"),
        (put("steps", torch.tensor(1)), "steps", "'steps' among its floating and complex tensors, .* int64"),
        (lambda content: content.pop(INTEGERS), "on", "no 'steps'"),
    ],
)
def test_update_of_another_kind_is_refused_by_name(spoil, tensor, text):
    with pytest.raises(InvalidUpdateError, match=rf"Round 1, train: client 2 sent {text}") as caught:
        run(spoiled(spoil), weights=WEIGHTS)
    assert caught.value.client == 2
    assert caught.value.tensor in (tensor, "steps")
    good = run(spoiled(spoil), weights=WEIGHTS, failures=FaultTolerance(min_results=3, on_error="ignore"))
    assert all(torch.equal(good.weights[name].to(value.dtype), value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_width_of_floats_may_differ(dtype):
    result = run(spoiled(as_dtype("matrix", dtype)), weights=WEIGHTS)
    assert torch.equal(result.weights["matrix"], WEIGHTS["matrix"])


def test_strategy_that_gives_integers_for_floats_is_refused():
    with pytest.raises(RoundError, match=r"Gives gave weights that sent 'matrix' as int64, the global model has"):
        run(COUNTING, Gives(lambda: messages.pack({**toy_weights(), "matrix": torch.zeros(2, 3, dtype=torch.int64)})))


# ---------------------------------------------------------------------------------------------- numbers of examples


def counts(value: float) -> MetricRecord:
    return MetricRecord({"num-examples": value})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, -0.5, 0])
def test_training_reply_counts_a_finite_positive_number_of_examples(value):
    app = spoiled(lambda content: content.update({"metrics": counts(value)}))
    with pytest.raises(
        ClientError, match=rf"train: client 2 reports {value:g} examples; it cannot .* finite and greater than 0"
    ):
        run(app, weights=WEIGHTS)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1])
def test_evaluation_reply_counts_a_finite_number_of_examples_that_may_be_zero(value):
    def evaluate(k, message):
        return messages.evaluate_reply(message, value if k == 2 else k, {"acc": float(k)})

    with pytest.raises(
        ClientError, match=rf"evaluate: client 2 reports {value:g} examples; it cannot .* finite and at least 0"
    ):
        run(client(unchanged, evaluate), evaluate=True)
    diary = Diary()
    failures = FaultTolerance(min_results=3, on_error="ignore")
    result = run(client(unchanged, evaluate), evaluate=True, failures=failures, callbacks=[diary])
    assert result.metrics["clients/acc"] == pytest.approx((1 + 9) / 4)
    assert [error.client for error in diary.errors] == [2]


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_number_of_examples_that_is_a_list_is_refused(stage):
    def spoil(k, message):
        reply = honest(k, message) if stage == "train" else messages.evaluate_reply(message, 1, {})
        reply.content["metrics"] = MetricRecord({"num-examples": [1, 2]})
        return reply

    app = client(spoil) if stage == "train" else client(honest, spoil)
    with pytest.raises(ClientError, match=rf"Round 1, {stage}: client 0 sent .*num-examples.*\[1, 2\]"):
        run(app, weights=WEIGHTS, evaluate=stage == "evaluate")


# ---------------------------------------------------------------------------------------------- what cannot be read


def garble(content: RecordDict) -> None:
    content["arrays"]["matrix"] = Array("float32", (2, 3), "numpy.ndarray", b"\x93NUMPY no more")


def other_form(content: RecordDict) -> None:
    whole = content["arrays"]["matrix"]
    content["arrays"]["matrix"] = Array(whole.dtype, whole.shape, "my.tensor", whole.data)


def words(content: RecordDict) -> None:
    content["arrays"]["matrix"] = Array(np.array(["a", "b"]))


def specs(json: str) -> Callable[[RecordDict], None]:
    return lambda content: content.update({SPECS: ConfigRecord({"json": json})})


@pytest.mark.parametrize(
    "spoil",
    [
        garble,
        other_form,
        words,
        specs("{"),
        specs("[1]"),
        specs("[[1, 2, 3, 4]]"),
        specs('[["loss", "mean", "", "many"]]'),
        specs("[]"),
        lambda content: content.update({SPECS: ConfigRecord({})}),
        lambda content: content.pop(SPECS),
        lambda content: content.pop(STATES),
        lambda content: content.update({STATES: ConfigRecord({})}),
        lambda content: content.update({INTEGERS: ConfigRecord({})}),
        put("no index", torch.zeros(1), STATES),
    ],
)
def test_reply_that_cannot_be_read_is_a_failure_that_fault_tolerance_is_asked_about(spoil):
    with pytest.raises(ClientError, match=r"Round 1, train: client 2 sent what cannot be read: .+") as caught:
        run(spoiled(spoil), weights=WEIGHTS)
    assert (caught.value.client, caught.value.stage, caught.value.round) == (2, "train", 1)
    diary, failures = Diary(), FaultTolerance(min_results=3, on_error="ignore")
    result = run(spoiled(spoil), weights=WEIGHTS, failures=failures, callbacks=[diary])
    assert [error.client for error in diary.errors] == [2]
    assert torch.equal(result.weights["matrix"], WEIGHTS["matrix"])
    assert result.metrics["loss"] == 1.0


def test_reply_that_cannot_be_read_never_runs_what_is_in_it():
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    def spoil(content: RecordDict) -> None:
        import io

        buffer = io.BytesIO()
        np.save(buffer, np.array([Trap()], dtype=object), allow_pickle=True)
        content["arrays"]["matrix"] = Array("object", (1,), "numpy.ndarray", buffer.getvalue())

    with pytest.raises(ClientError, match="client 2 sent what cannot be read"):
        run(spoiled(spoil), weights=WEIGHTS)


def test_second_reply_of_a_client_and_one_of_a_stranger_do_not_count():
    def twice(replies):
        return replies if replies[0].metadata.message_type != "train" else [*replies, *replies[:2]]

    def train(k, message):
        got = messages.read_instruction(message).weights
        return messages.train_reply(message, {name: tensor + k for name, tensor in got.items()}, 1, {})

    once = run(client(train))
    with pytest.warns(UserWarning, match=r"Round 1, train: a reply of node \d+ is left out: .*nobody asked"):
        result = run(client(train), grid=grid_of(client(train), order=twice))
    assert all(torch.equal(result.weights[name], value) for name, value in once.weights.items())

    def stranger(replies):
        if replies[0].metadata.message_type == "train":
            replies[0].metadata.__dict__["_src_node_id"] = 424242
        return replies

    lost = pytest.raises(ClientError, match="did not reply")
    with pytest.warns(UserWarning, match="a reply of node 424242 is left out"), lost:
        run(client(train), grid=grid_of(client(train), order=stranger))


def test_strategy_that_gives_what_cannot_be_read_is_an_error_of_the_round():
    def gives():
        arrays = messages.pack(toy_weights())
        arrays["matrix"] = Array("float32", (2, 3), "numpy.ndarray", b"not an array")
        return arrays

    with pytest.raises(RoundError, match=r"Round 1: Gives gave weights that cannot be read: "):
        run(COUNTING, Gives(gives))


@pytest.mark.parametrize("spoil", [garble, put("other", torch.tensor(1))])
def test_tolerated_failure_keeps_nothing_of_the_client(spoil):
    kept: list[ClientError] = []
    sent = []

    def train(k, message):
        update = {name: tensor.clone() for name, tensor in messages.read_instruction(message).weights.items()}
        reply = messages.train_reply(message, update, 1, {})
        if k == 2:
            sent.append(weakref.ref(reply.content["arrays"]["matrix"].__dict__["tensor"]))
            spoil(reply.content)
        elif k == 3:
            local = torch.zeros(1)
            sent.append(weakref.ref(local))
            raise ValueError("no")
        return reply

    failures = FaultTolerance(min_results=2, on_error=kept.append)
    InProcess().run(lambda g: rounds_on(g, failures=failures).run(1, toy_weights(), False), client(train), lambda: 4)
    gc.collect()
    assert [error.client for error in kept] == [2, 3]
    assert [tensor() for tensor in sent] == [None, None]


def test_good_reply_is_read_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(client(honest), weights=WEIGHTS).metrics == {"loss": 1.0}

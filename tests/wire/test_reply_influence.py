"""What no client decides for the others: the model's dtype, the order of tensors, how often it counts."""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp.mod import adaptiveclipping_mod
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedMedian,
    Krum,
    QFedAvg,
)

from lightning_fed._compat.flower_link import assembled
from lightning_fed.callbacks import FaultTolerance
from lightning_fed.callbacks.flower_strategy import FlowerStrategy
from lightning_fed.strategies import AdamMean
from lightning_fed.values.weights import Weights
from lightning_fed.wire import messages
from tests.helpers import in_flower
from tests.server.round_runs import Diary, client, run
from tests.wire.parts import parts_of
from tests.wire.replies import HOSTILE, WEIGHTS, app, content, ended, honest, metrics, same, tensors

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ours": lambda: None,
    "our FedAdam": lambda: AdamMean(learning_rate=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3),
    **{
        name: lambda build=build: FlowerStrategy(build()).server_strategy(None)
        for name, build in {
            "FedAvg": FedAvg,
            "FedMedian": FedMedian,
            "Krum": lambda: Krum(num_malicious_nodes=1),
            "Bulyan": lambda: Bulyan(num_malicious_nodes=0),
            "clipping": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1e-9, 100.0, 4),
        }.items()
    },
}


def whole_numbers(weights: Weights) -> Weights:
    return {name: tensor.float().round() for name, tensor in weights.items()}


def narrow(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: tensor.to(dtype) for name, tensor in whole_numbers(weights).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_client_s_narrow_floats_are_its_numbers_and_not_the_model_s_dtype(name, dtype):
    np.random.seed(0)
    wide, _ = ended(tensors(whole_numbers), STRATEGIES[name](), hostile=0)
    np.random.seed(0)
    result, errors = ended(tensors(lambda w: narrow(w, dtype)), STRATEGIES[name](), hostile=0)
    assert errors == []
    assert same(result, wide) or dtype == torch.float64  # in which Flower's strategies then compute
    torch.testing.assert_close(result.weights, wide.weights)
    assert {name: tensor.dtype for name, tensor in result.weights.items()} == {n: t.dtype for n, t in WEIGHTS.items()}


@pytest.mark.parametrize("hostile", [0, HOSTILE])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_a_client_s_tensors_is_of_no_consequence(name, hostile):
    np.random.seed(0)
    ordered, unchanged = ended(lambda reply: reply, STRATEGIES[name](), hostile=hostile)
    np.random.seed(0)
    result, errors = ended(tensors(lambda w: dict(reversed(w.items()))), STRATEGIES[name](), hostile=hostile)
    assert [error.client for error in errors] == [error.client for error in unchanged] == [0] * (name == "clipping")
    assert same(result, ordered)


@pytest.mark.parametrize(
    ("build", "spoil", "text"),
    [
        (
            lambda: QFedAvg(client_learning_rate=0.1, train_loss_key="loss"),
            {"loss": None},
            "no number 'loss', which",
        ),
        (lambda: QFedAvg(client_learning_rate=0.1, train_loss_key="loss"), {"loss": -1.0}, "loss=-1, by which QFedAvg"),
        (lambda: QFedAvg(client_learning_rate=0.1, train_loss_key="loss"), {"loss": 1e300}, r"loss=1e\+300, by which"),
        (
            lambda: DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.001, 4),
            {"norm_bit": None},
            "no number 'norm_bit', which DifferentialPrivacyClientSideAdaptiveClipping",
        ),
        (
            lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.01, 1.0, 4),
            WEIGHTS,
            "the global weights unchanged; DifferentialPrivacyServerSideFixedClipping",
        ),
        (
            lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.01, 1.0, 4),
            {**WEIGHTS, "zeros": torch.full((2,), 1e-30)},
            "the global weights unchanged; DifferentialPrivacyServerSideFixedClipping",
        ),
    ],
)
def test_what_a_strategy_of_flower_s_fails_over_is_a_failure_of_its_client(build, spoil, text):
    def change(c: RecordDict) -> None:
        c["metrics"].setdefault("norm_bit", 1)
        for name, value in spoil.items():
            if isinstance(value, torch.Tensor):
                c["arrays"] = messages.pack({name: spoil[name] for name in c["arrays"]})
            elif value is None:
                del c["metrics"][name]
            else:
                c["metrics"][name] = value

    def train(k: int, message: Message) -> Message:
        reply = honest(k + 1, message)
        reply.content["metrics"]["norm_bit"] = 1
        return content(change)(reply) if k == HOSTILE else reply

    strategy = FlowerStrategy(build(), mods=[adaptiveclipping_mod]).server_strategy(None)
    diary = Diary()
    failures = FaultTolerance(min_results=3, on_error="ignore")
    weights = {**WEIGHTS, "zeros": torch.zeros(2)}
    spoil = {**weights, **spoil} if "matrix" in spoil else spoil
    run(client(train), strategy, weights=weights, failures=failures, callbacks=[diary], max_examples=1e9)
    assert [error.client for error in diary.errors] == [HOSTILE]
    assert re.search(text, str(diary.errors[0]))


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_number_by_which_a_strategy_weighs_is_missing_at_its_client(stage):
    def numbers(k: int, reply: Message) -> Message:
        reply.content["metrics"]["mine"] = 2.0
        return metrics_without_mine(reply) if k == HOSTILE else reply

    def metrics_without_mine(reply: Message) -> Message:
        return content(lambda c: c["metrics"].pop("mine"))(reply)

    def train(k: int, message: Message) -> Message:
        reply = honest(k, message)
        reply.content["metrics"]["mine"] = 2.0
        return numbers(k, reply) if stage == "train" else reply

    def evaluate(k: int, message: Message) -> Message:
        reply = messages.evaluate_reply(message, 1, {"mine": 2.0})
        return numbers(k, reply) if stage == "evaluate" else reply

    strategy, diary = FlowerStrategy(FedAvg(weighted_by_key="mine")).server_strategy(None), Diary()
    failures = FaultTolerance(min_results=3, on_error="ignore")
    run(client(train, evaluate), strategy, weights=WEIGHTS, evaluate=True, failures=failures, callbacks=[diary])
    assert [(error.client, error.stage) for error in diary.errors] == [(HOSTILE, stage)]
    assert "no number 'mine', by which the strategy weighs it" in str(diary.errors[0])


@pytest.mark.parametrize(
    "name", ["val\u00a0loss", "损失\u3000值", "\N{MAN}\u200d\N{WOMAN} acc", "co\u00adop", "a\u200fb"]
)
def test_names_of_any_script_are_taken(name):
    result, errors = ended(metrics(**{name: 1.0}))
    assert errors == []
    assert result.metrics[name] == 1.0


def test_a_large_module_may_log_more_names():
    large = {**WEIGHTS, **{f"layer{i}": torch.zeros(1) for i in range(200)}}
    diary = Diary()
    logs = metrics(**{f"layer{i}/norm": 1.0 for i in range(3000)})
    result = run(app(logs), weights=large, callbacks=[diary])
    assert len(result.metrics) > 3000


def test_one_array_under_many_names_takes_memory_once():
    array = Array(np.zeros(1000, dtype=np.float32))
    record = RecordDict({"arrays": ArrayRecord({f"n{i}": array for i in range(100)})})
    got = in_flower(lambda: messages.unpack(assembled(*parts_of(Message(record, 1, "train"))).content["arrays"]))
    assert len(got) == 100
    assert len({tensor.data_ptr() for tensor in got.values()}) == 1


def test_a_chunk_that_an_array_lists_many_times_is_counted_before_memory_is_taken():
    def of(kind: str, children: list[str], body: bytes) -> tuple[str, bytes]:
        made = f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body
        return hashlib.sha256(made).hexdigest(), made

    chunk, chunk_bytes = of("ArrayChunk", [], bytes(1 << 20))
    said = {"dtype": "uint8", "shape": [3], "stype": "numpy.ndarray", "arraychunk_ids": [0] * 1000}
    array, array_bytes = of("Array", [chunk], json.dumps(said).encode())
    parts = {chunk: chunk_bytes, array: array_bytes}
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"arrays of 1,0\d\d,\d{3},\d{3} bytes; at most 10,000,000 are taken"):
        assembled(array, parts, most=1e7)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()

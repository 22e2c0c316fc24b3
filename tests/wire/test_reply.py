"""The trust boundary: whatever a client sends, its reply is what an honest one says or a failure of this client."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAvg,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fed._compat.flower_link import assembled
from lightning_fed.callbacks.flower_strategy import FlowerStrategy
from lightning_fed.errors import ClientError
from lightning_fed.tracebacks import plain
from lightning_fed.values.metrics import COMPUTED, KINDS, LAST, MEAN, METRIC, SUM, MetricState
from lightning_fed.wire import extras, messages
from lightning_fed.wire.packing import Packer
from lightning_fed.wire.reply import Expected, read_reply
from lightning_fed.wire.tensor_array import decoded
from tests.helpers import in_flower
from tests.server.round_runs import run
from tests.wire.parts import parts_of
from tests.wire.replies import HOSTILE, WEIGHTS, app, content, ended, metrics, same, tensors

SPECS, STATES, NOTES = (f"lightning-fed.{kind}" for kind in ("specs", "states", "notes"))


@pytest.fixture(scope="module")
def whole():
    return ended(lambda reply: reply)[0]


@pytest.fixture(scope="module")
def without():
    """The round without the hostile client."""

    def nothing(reply: Message) -> Message:
        raise ValueError("nothing")

    result, errors = ended(nothing)
    assert [error.client for error in errors] == [HOSTILE]
    return result


def npy(header: str, values: bytes, version: bytes = b"\x01\x00") -> Array:
    head = header.encode() + b"\n"
    return Array(
        "float32", (2, 3), "numpy.ndarray", b"\x93NUMPY" + version + len(head).to_bytes(2, "little") + head + values
    )


def array(made: Array) -> Callable[[Message], Message]:
    return content(lambda c: c["arrays"].__setitem__("matrix", made))


def states(*specs: Any, **tensors: torch.Tensor) -> Callable[[Message], Message]:
    def change(c: RecordDict) -> None:
        c[SPECS] = ConfigRecord({"json": json.dumps(specs)})
        c[STATES] = messages.pack({key[1:].replace("_", "/", 1): tensor for key, tensor in tensors.items()})

    return content(change)


def packed(spoil: Callable[[Message], Message]) -> Callable[[Message], Message]:
    """The same by way of a SuperLink, where each dtype travels as it is."""

    def send(reply: Message) -> Message:
        spoil(reply)
        reply.content = Packer().pack(reply.content, is_reply=True)
        return reply

    return send


def index(of_matrix: str) -> Callable[[Message], Message]:
    """The index of all tensors as one piece says something else of one of them."""

    def spoil(reply: Message) -> Message:
        reply.content = Packer().pack(reply.content, is_reply=True)
        [record] = [record for record in reply.content.values() if "bytes" in record or "" in record]
        data = record["bytes"] if "bytes" in record else record[""].data
        length = int.from_bytes(data[:8], "little")
        index = json.loads(data[8 : 8 + length])
        index[0][0][1][0] = "HERE"
        text = json.dumps(index).replace('"HERE"', of_matrix).encode()
        head = len(text).to_bytes(8, "little") + text
        tensors = data[-(-(8 + length) // 64) * 64 :]
        reply.content["lightning-fed.tensors"] = ConfigRecord({"bytes": head + bytes(-len(head) % 64) + tensors})
        return reply

    return spoil


def pickled() -> Array:
    class Canary:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary()], dtype=object), allow_pickle=True)
    return Array("object", (1,), "numpy.ndarray", buffer.getvalue())


VALUE, NARROW = torch.tensor(1.0), torch.tensor(1, dtype=torch.uint8).view(torch.float8_e4m3fn)
LOSS = ["loss", SUM, "", 0, True, False]
HOSTILE_REPLIES: dict[str, tuple[Callable[[Message], Message], str]] = {
    "a header without bytes": (
        array(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", b"")),
        "0 bytes for",
    ),
    "a huge shape": (
        array(npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40}, 3), }}", b"\0" * 24)),
        "24 bytes for an array of",
    ),
    "sizes below zero": (
        array(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -3), }", b"\0" * 24)),
        "cannot be read",
    ),
    "a header of code": (array(npy("__import__('os').abort()", b"")), "cannot be read"),
    "another version": (array(npy("{}", b"", b"\x09\x00")), "no tensor in NumPy's format"),
    "a pickle": (array(pickled()), "cannot be read"),
    "objects of no size": (
        array(npy("{'descr': '|O', 'fortran_order': False, 'shape': (0,), }", b"")),
        "for an array of .* object",
    ),
    "words": (array(Array(np.array(["a", "b"]))), "for an array of"),
    "a bool of 7": (
        content(
            lambda c: c["lightning-fed.integers"].__setitem__("on", Array("bool", (2,), "numpy.ndarray", _bool(7)))
        ),
        "neither True nor False",
    ),
    "deep JSON": (content(lambda c: c.update({SPECS: ConfigRecord({"json": "[" * 100_000})})), "RecursionError"),
    "infinitely many examples": (metrics(**{"num-examples": float("inf")}), "inf examples; .* at most 1e\\+09"),
    "almost no examples": (metrics(**{"num-examples": 1e-300}), "1e-300 examples; .* between 0 and one by that"),
    "more examples than there are": (metrics(**{"num-examples": 2**62}), "4.61169e\\+18 examples; .*max_examples"),
    "10,000 names": (metrics(**{f"m{i}": 1.0 for i in range(10_000)}), "10001 names; at most 2050"),
    "a long name": (metrics(**{"n" * 100_000: 1.0}), "the name 'nnn"),
    "a name that moves the cursor": (metrics(**{"\x1b[2Jloss": 1.0}), r"the name '\\x1b\[2Jloss'"),
    "a tensor of a long name": (
        content(lambda c: c["arrays"].__setitem__("n" * 100_000, messages.TensorArray(VALUE))),
        "the name 'nnn",
    ),
    "a second record of tensors": (
        content(lambda c: c.update({"more": messages.pack({})})),
        r"3 records \(arrays, metrics, more\)",
    ),
    "a second record of numbers": (
        content(lambda c: c.update({"more": MetricRecord()})),
        r"3 records \(arrays, metrics, more\)",
    ),
    "records of other names": (content(lambda c: c.update({"x": c.pop("metrics")})), r"2 records \(arrays, x\)"),
    "no record of numbers": (content(lambda c: c.pop("metrics")), "0 examples"),
    "a state of no kind": (
        states(["loss", "share_memory_", "", 0, True, False], _0_value=VALUE),
        "name of a metric state",
    ),
    "a mean without a weight": (states(["loss", MEAN, "", 0, True, False], _0_value=VALUE), "half of 'loss'"),
    "a mean of a heavy weight": (
        states(["loss", MEAN, "", 0, True, False], _0_value=VALUE, _0_weight=torch.tensor(1e300, dtype=torch.float64)),
        r"1e\+300 examples for 'loss'",
    ),
    "a mean of a NaN weight": (
        states(["loss", MEAN, "", 0, True, False], _0_value=VALUE, _0_weight=torch.tensor(torch.nan)),
        "nan examples for 'loss'",
    ),
    "a sum of several": (
        states(["loss", SUM, "", 0, True, False], _0_value=torch.ones(3)),
        "several numbers for 'loss'",
    ),
    "a complex number": (states(["loss", SUM, "", 0, True, False], _0_value=VALUE * 1j), "as a complex number"),
    "updates below zero": (states(["loss", SUM, "", -1, True, False], _0_value=VALUE), "name of a metric state"),
    "a state of many names": (
        states(*([f"n{i}", SUM, "", 0, True, False] for i in range(3000))),
        "cannot be read|names",
    ),
    "a state sent twice": (states(LOSS, LOSS, _0_value=VALUE, _1_value=VALUE), "2 states of 'loss'"),
    "a state of float8": (packed(states(LOSS, _0_value=NARROW)), "'loss' as torch.float8_e4m3fn"),
    "a weight of float8": (
        packed(states(["loss", MEAN, "", 0, True, False], _0_value=VALUE, _0_weight=NARROW)),
        "'loss' as torch.float8_e4m3fn",
    ),
    "a mean of nothing that is something": (
        states(["loss", MEAN, "", 0, True, False], _0_value=VALUE * 1e30, _0_weight=VALUE * 0),
        "'loss' as a sum over no examples",
    ),
    "an infinite step": (metrics(step=float("inf")), "logged 'step' as inf: .* x axis"),
    "a step beyond all integers": (
        states(["step", *LOSS[1:]], _0_value=VALUE * 1e30),
        "'step' as 1e\\+30",
    ),
    "a step that is no number": (
        states(["step", *LOSS[1:]], _0_value=VALUE * torch.nan),
        "'step' as nan",
    ),
    "a number without a square": (
        tensors(lambda w: {**w, "matrix": w["matrix"] * 1e30}),
        "'matrix' with numbers beyond",
    ),
    "sizes of thousands of digits": (
        index(f'["matrix", "float32", [{", ".join(["9" * 4299] * 60)}]]'),
        "999, which is no integer of 64 bits",
    ),
    "many dimensions": (index(f'["matrix", "float32", [{", ".join(["1"] * 9999)}]]'), "for a tensor"),
    "a size that is a word": (index('["matrix", "float32", "23"]'), "float32 23 for a tensor"),
    "a dtype that moves the cursor": (index('["matrix", "\\u001b[2J", [2, 3]]'), r"\?\[2J \[2, 3\] for a tensor"),
    "a dtype of half a byte": (index('["matrix", "int4", [2, 3]]'), r"int4 \[2, 3\] for a tensor"),
    "a record whose name moves the cursor": (
        content(lambda c: c.update({"\x1b[2J": MetricRecord()})),
        r"3 records \(\?\[2J, arrays, metrics\)",
    ),
    "a metric as the step": (
        states(["step", METRIC, "acc", 1, True, False], _0_value=VALUE * torch.nan),
        "logged a metric as 'step'",
    ),
    "many records": (content(lambda c: c.update({f"{i}": MetricRecord() for i in range(9999)})), "10001 records"),
}


def _bool(value: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([True, False]))
    return buffer.getvalue()[:-1] + bytes([value])


@pytest.mark.parametrize("flowers", [False, True], ids=["ours", "Flower's FedAvg"])
@pytest.mark.parametrize("what", HOSTILE_REPLIES)
def test_hostile_reply_is_a_failure_of_its_client(what, flowers, without):
    spoil, text = HOSTILE_REPLIES[what]
    build = (lambda: FlowerStrategy(FedAvg()).server_strategy(None)) if flowers else lambda: None
    with pytest.raises(ClientError, match=rf"Round 1, train: client {HOSTILE} .*{text}") as caught:
        run(app(spoil), build(), weights=WEIGHTS, max_examples=1e9)
    said = str(caught.value)
    assert (caught.value.client, len(said) < 2000, plain(said, 2000)) == (HOSTILE, True, said)
    result, errors = ended(spoil, build(), max_examples=1e9)
    assert [error.client for error in errors] == [HOSTILE]
    assert flowers or same(result, without)


def test_array_takes_no_more_memory_than_the_bytes_that_came():
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**28},), }}"
    tracemalloc.start()
    with pytest.raises(ValueError, match="1000 bytes for an array"):
        decoded(npy(header, b"\0" * 1000))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize(
    "values", [np.arange(6.0).reshape(2, 3), np.array(3), np.empty((0, 2)), np.array([True, False])]
)
def test_array_is_read_as_numpy_reads_it(values, order):
    values = np.asarray(values, order=order)
    buffer = io.BytesIO()
    np.save(buffer, values)
    got = decoded(Array(str(values.dtype), values.shape, "numpy.ndarray", buffer.getvalue())).numpy()
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, values, strict=True)


def test_what_a_client_says_goes_to_the_terminal_without_control_characters():
    notes = [f"\x1b[31mnote {i}: " + "x" * 100_000 for i in range(1000)]
    spoil = content(lambda c: c.update({NOTES: ConfigRecord({"texts": notes})}))
    with pytest.warns(UserWarning, match="note") as caught:
        run(app(spoil), weights=WEIGHTS)
    said = [str(one.message) for one in caught if "note" in str(one.message)]
    assert len(said) == 20
    assert all(len(text) <= 2000 and text.startswith("?[31mnote") for text in said)


def test_nan_in_a_metric_is_said_by_name_once():
    def spoil(reply: Message) -> Message:
        reply.content["lightning-fed.states"] = messages.pack({"0/value": VALUE * torch.nan, "0/weight": VALUE})
        return reply

    with pytest.warns(UserWarning, match=r"'loss' is NaN: in round 1, train, NaN came from client 2\."):
        result = run(app(spoil), weights=WEIGHTS)
    assert np.isnan(result.metrics["loss"])


def test_what_is_said_of_many_names_is_a_few_lines():
    specs = [[f"{kind}{i}" + "x" * 450, kind, "", 0, True, False] for kind in (LAST, COMPUTED) for i in range(500)]
    tensors = {f"_{i}_value": VALUE * torch.nan if i % 2 else torch.ones(2) for i in range(1000)}
    with pytest.warns(UserWarning, match="and 240 more") as caught:
        run(app(states(*specs, **tensors)), weights=WEIGHTS)
    assert sum(len(str(one.message)) for one in caught) < 30_000


def test_tensors_that_are_none_are_a_failure_of_their_client():
    def spoil(reply: Message) -> Message:
        reply.content = messages.copy_for_delivery(reply.content)
        reply.content["arrays"] = messages.pack(
            {n: t.to("meta") for n, t in messages.unpack(reply.content["arrays"]).items()}
        )
        return reply

    expected = Expected({n: t for n, t in WEIGHTS.items() if t.is_floating_point()}, trains=True)
    reply = in_flower(lambda: spoil(messages.train_reply(Message(RecordDict(), 1, "train"), expected.weights, 1, {})))
    with pytest.raises(ClientError, match="sent what cannot be read"):
        read_reply(reply, expected)


def test_numbers_of_different_forms_are_left_out_where_the_strategy_cannot_add_them(whole):
    strategy = FlowerStrategy(FedAvg()).server_strategy(None)
    result, errors = ended(metrics(loss=[1.0, 2.0]), strategy)
    assert errors == []
    torch.testing.assert_close(result.weights["matrix"], whole.weights["matrix"])


# ------------------------------------------------------------------------------------------------ mutated at random


def _mutate(data: st.DataObject, parts: dict[str, bytes], names: list[str]) -> None:
    """Flip, cut, double or swap bytes of what Flower sends."""
    name = data.draw(st.sampled_from(names))
    old = parts[name]
    how = data.draw(st.sampled_from(["flip", "cut", "double", "another's", "drop", "digit"]))
    at = data.draw(st.integers(0, max(len(old) - 1, 0)))
    if how == "flip":
        parts[name] = old[:at] + bytes([old[at] ^ data.draw(st.integers(1, 255))]) + old[at + 1 :] if old else b"x"
    elif how == "cut":
        parts[name] = old[:at]
    elif how == "double":
        parts[name] = old[:at] + old[at:] * 2
    elif how == "another's":
        parts[name] = parts[data.draw(st.sampled_from(names))]
    elif how == "drop":
        del parts[name]
    else:  # the figures of shapes, counts and dtypes
        figures = [i for i, byte in enumerate(old) if chr(byte).isdigit()] or [0]
        at = data.draw(st.sampled_from(figures))
        parts[name] = old[:at] + str(data.draw(st.integers(0, 9))).encode() + old[at + 1 :]


def _check_mutated(data: st.DataObject, packed: bool, honest_end: Any, end_without: Any) -> None:
    def spoil(reply: Message) -> Message:
        if packed:
            reply.content = Packer().pack(reply.content, is_reply=True)
        top, parts = parts_of(reply)
        _mutate(data, parts, sorted(set(parts) - {top}))
        try:
            got = assembled(top, parts)
        except Exception as error:  # as a SuperLink's grid does
            return messages.error_reply(reply, ClientError(str(error)))
        reply.content = got.content
        return reply

    result, errors = ended(spoil, max_examples=1e9)
    if errors:
        assert [error.client for error in errors] == [HOSTILE]
        assert same(result, end_without)
    elif not same(result, honest_end):  # other numbers, as any client may send: finite, and of the module's form
        assert list(result.weights) == list(WEIGHTS)
        for name, tensor in result.weights.items():
            assert (tensor.shape, tensor.dtype) == (honest_end.weights[name].shape, honest_end.weights[name].dtype)
            assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "NumPy's format"])
@settings(max_examples=100)
@given(data=st.data())
def test_mutated_reply_is_an_honest_one_or_a_failure_of_its_client(packed, whole, without, data):
    _check_mutated(data, packed, whole, without)


@pytest.mark.landing
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "NumPy's format"])
@settings(max_examples=2000)
@given(data=st.data())
def test_2000_mutated_replies(packed, whole, without, data):
    _check_mutated(data, packed, whole, without)


def test_every_kind_of_state_is_read_back():
    tensors = {"value": VALUE, "weight": VALUE}
    kinds = [MetricState(kind, kind, dict(tensors)) for kind in sorted(KINDS)]

    def spoil(reply: Message) -> Message:
        extras.attach(reply, extras.Extras(states=kinds))
        return reply

    result, errors = ended(spoil)
    assert errors == []
    assert set(result.metrics) >= {SUM, MEAN}

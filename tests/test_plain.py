"""Records, arrays and containers of them come back from a checkpoint as they were."""

import io
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, MetricRecord, RecordDict

from lightning_fed.messages import pack, unpack
from lightning_fed.plain import from_plain, to_plain
from tests.test_messages import TENSORS


def through_a_checkpoint(value):
    buffer = io.BytesIO()
    torch.save(to_plain(value), buffer)
    buffer.seek(0)
    return from_plain(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -0.5,
        math.inf,
        "text",
        b"",
        b"\0bytes",
        [],
        (),
        {},
        [1, (2, [None])],
        {1: "a", "b": {"c": (1.0,)}, (1, 2): b"x"},
        {"__bytes__": "a user's own key"},
        np.float64(0.1),
        np.float32(0.1),
        np.int64(2**40),
        np.bool_(True),
        ConfigRecord({"i": 1, "f": [0.5], "s": "x", "b": b"\0", "l": [True, False]}),
        MetricRecord({"loss": 0.5, "counts": [1, 2]}),
        RecordDict({"m": MetricRecord({"n": 3}), "c": ConfigRecord({})}),
    ],
    ids=repr,
)
def test_value_comes_back_from_a_checkpoint_that_is_loaded_with_weights_only(value):
    again = through_a_checkpoint(value)
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize("value", [np.str_("text"), np.bytes_(b"bytes")])
def test_numpys_text_and_bytes_come_back_as_pythons(value):
    again = through_a_checkpoint(value)
    assert again == value
    assert type(again) in (str, bytes)


@pytest.mark.parametrize(
    "array",
    [
        np.array(0.5),
        np.arange(6.0).reshape(2, 3).T,
        np.array([1, 2], dtype=np.int8),
        np.zeros((0, 2)),
        np.array([True]),
        np.arange(4)[::-1],
        np.arange(3, dtype=">f4"),
    ],
    ids=lambda a: f"{a.dtype}-{a.shape}",
)
def test_numpy_array_comes_back_and_is_a_copy(array):
    again = through_a_checkpoint(array)
    assert isinstance(again, np.ndarray)
    assert np.array_equal(again, array)
    assert again.dtype == array.dtype.newbyteorder("=")
    plain = from_plain(to_plain(array))
    plain[...] = 1
    assert np.array_equal(again, array)


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "float8"])
def test_arrays_come_back_in_their_dtype(name):
    record = through_a_checkpoint(RecordDict({"arrays": pack({name: TENSORS[name]})}))
    got = unpack(record["arrays"])[name]
    assert got.dtype == TENSORS[name].dtype
    assert torch.equal(got, TENSORS[name])


def test_array_of_flowers_own_comes_back():
    again = through_a_checkpoint([Array(np.arange(3.0))])
    assert again[0].numpy().tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 1, [object()], {"a": object()}, np.array(["text"])])
def test_what_is_not_plain_is_refused_and_not_pickled(value):
    with pytest.raises(TypeError):
        to_plain(value)

"""Equal values have the same line of text, and no others."""

import enum
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner
from torch import nn
from torch.distributions import HalfNormal

from lightning_fed.wire.fingerprint import describe, text_of
from lightning_fed.wire.plain import Classes, to_plain
from tests.wire.tensors import TENSORS


class Color(enum.Enum):
    RED = 1
    BLUE = 2


CLASSES = Classes({f"{Color.__module__}:{Color.__qualname__}": Color})
DIFFERENT = [
    None,
    True,
    1,
    1.0,
    "1",
    float("nan"),
    b"1",
    (1,),
    [1],
    {1},
    {1: 1},
    {"a": {"b": 1}},
    {"a": {"b": 2}},
    np.float64(1),
    np.float32(1),
    np.array([1.0]),
    np.array([2.0]),
    np.array([[1.0]]),
    torch.ones(1),
    torch.zeros(1),
    torch.ones(1, 1),
    torch.ones(1, dtype=torch.float64),
    nn.Parameter(torch.ones(1)),
    Color.RED,
    Color.BLUE,
    ConfigRecord({"a": 1}),
    ConfigRecord({"a": 2}),
    list(range(1000)),
    [*range(999), 0],
]


def test_different_values_have_different_lines_and_equal_ones_the_same():
    lines = [text_of(to_plain(value, CLASSES)) for value in DIFFERENT]
    assert len(set(lines)) == len(DIFFERENT)
    assert lines == [text_of(to_plain(value, CLASSES)) for value in DIFFERENT]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", [name for name, tensor in TENSORS.items() if tensor.numel()])
def test_one_changed_element_is_seen_in_every_dtype(name):
    tensor = TENSORS[name].contiguous()
    other = tensor.clone()
    other.view(-1)[-1] = 0 if other.view(-1)[-1].item() else 1
    assert text_of(tensor) == text_of(tensor.clone())
    assert text_of(tensor) != text_of(other)
    assert text_of(tensor, contents=False) == text_of(other, contents=False)


def test_sets_are_told_in_any_order():
    assert text_of({"__set__": ["b", "a", 1]}) == text_of({"__set__": [1, "a", "b"]}) == "set('a', 'b', 1)"


def test_lines_can_be_read():
    assert text_of(to_plain({"rates": (0.1, np.float32(0.5))})) == "{'rates': (0.1, float32(0.5))}"
    assert text_of(to_plain(Color.RED, CLASSES)) == "Color.RED"
    assert text_of(torch.ones(2, 3), contents=False) == "float32[2, 3]"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (0.5, "0.5"),
        (Color.RED, "Color.RED"),
        (len, "len"),
        (nn.Linear, "Linear"),
        (partial(len, 1), "partial(len)"),
        ([len, object()], "[len, object()]"),
        (HalfNormal(0.5), "HalfNormal(scale=0.5)"),
        (IidPartitioner(3), "IidPartitioner(num_partitions=3)"),
    ],
)
def test_any_value_is_described(value, line):
    assert describe(value) == line


def test_an_object_is_described_by_its_simple_attributes():
    lines = [describe(DirichletPartitioner(3, partition_by="label", alpha=0.5, seed=seed)) for seed in (1, 1, 2)]
    assert lines[0] == lines[1] != lines[2]
    assert lines[0].startswith("DirichletPartitioner(")

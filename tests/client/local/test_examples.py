"""Counting examples: by lengths the same as by iterating, and of batches of any form."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.data import extract_batch_size
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_fed.client.local.examples import batch_size, examples_in
from lightning_fed.values.data import gathering

DATA = TensorDataset(torch.zeros(30, 2))


@given(
    count=st.integers(0, 30),
    size=st.integers(1, 9),
    drop_last=st.booleans(),
    limit=st.one_of(st.integers(0, 6), st.just(float("inf"))),
    form=st.sampled_from(["loader", "batch sampler", "batches as items", "gathered"]),
)
def test_lengths_tell_what_iterating_gives(count, size, drop_last, limit, form):
    sampler = SubsetRandomSampler(range(count))
    plan = BatchSampler(sampler, size, drop_last)
    loader = {
        "loader": lambda: DataLoader(DATA, size, sampler=sampler, drop_last=drop_last),
        "batch sampler": lambda: DataLoader(DATA, batch_sampler=plan),
        "batches as items": lambda: DataLoader(DATA, sampler=plan, batch_size=None),
        "gathered": lambda: gathering(DataLoader(TensorDataset(torch.zeros(count)), size, drop_last=drop_last)),
    }[form]()
    batches = loader if limit == float("inf") else islice(loader, limit)
    assert examples_in(loader, limit) == sum(len(batch[0]) for batch in batches)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))

    def __len__(self):
        return 7  # which may be anything


@pytest.mark.parametrize("loader", [DataLoader(Stream()), iter([1, 2]), range(3), None, {"a": DataLoader(DATA)}])
def test_what_has_no_length_that_tells_is_left_to_counting(loader):
    assert examples_in(loader) is None


@dataclass
class Pair:
    name: str
    x: torch.Tensor


Named = namedtuple("Named", "x y")
X = torch.zeros(3, 4)

LIKE_LIGHTNING = [
    X,
    torch.tensor(1.0),
    [X, X],
    (torch.zeros(0, 2), X),
    {"x": X},
    UserDict(x=X),
    {"inner": [{"x": X}]},
    Named(X, X),
    Pair("a", X),
    (["a", "b", "c"], X),
    [None, X],
    {"x": torch.zeros(3, 2).to_sparse()},
]


@pytest.mark.parametrize("batch", LIKE_LIGHTNING, ids=lambda batch: type(batch).__name__)
@pytest.mark.filterwarnings("ignore:.*ambiguous collection")
def test_a_batch_with_a_tensor_counts_as_lightning_counts_it(batch):
    assert batch_size(batch) == extract_batch_size(batch)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (np.zeros((3, 4)), 3),
        ({"x": np.zeros((3, 4)), "id": 1}, 3),
        (["a", "b", "c"], 3),
        ((["a", "b", "c"], [1, 2, 3]), 3),
        ({"question": ["a", "b", "c"], "answer": ["d", "e", "f"]}, 3),
        ([{"text": "a"}, {"text": "b"}, {"text": "c"}], 3),
        ("abc", None),
        ({"text": "abc"}, None),
        (object(), None),
        ([], None),
        (pack_sequence([torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(1, 2)]), 3),
        ({"t": torch.tensor(0.5), "x": X}, 3),
        ((np.array(1), {"x": X}), 3),
    ],
)
def test_a_batch_without_a_tensor_counts_its_texts_or_items(batch, size):
    assert batch_size(batch) == size

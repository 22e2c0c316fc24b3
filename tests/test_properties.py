"""Promises that hold for all inputs, tried on many."""

import io
import math

import numpy as np
import pytest
import torch
from flwr_datasets.partitioner import DirichletPartitioner
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader, Dataset

from lightning_fed.callbacks import FaultTolerance, PartialParticipation, Partition
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for
from lightning_fed.values.running_mean import RunningMean
from lightning_fed.wire.plain import from_plain, to_plain

# ------------------------------------------------------------------------------------------------- the running mean

SIZES = st.integers(min_value=1, max_value=10_000)


def clients(dtype: str, **kwargs):
    """Lists of ``(num_examples, values)`` with as many values a client."""
    element = st.floats(-1e6, 1e6, width=32) if dtype == "float32" else st.integers(-(2**62), 2**62)
    values = st.lists(element, min_size=3, max_size=3)
    return st.lists(st.tuples(SIZES, values), min_size=1, max_size=8, **kwargs)


def mean(updates, dtype: torch.dtype) -> torch.Tensor:
    running = RunningMean()
    for n, values in updates:
        running.add({"w": torch.tensor(values, dtype=dtype)}, n)
    return running.value()["w"]


@given(clients("float32"), st.randoms())
def test_order_of_clients_hardly_matters_to_the_mean(updates, random):
    shuffled = random.sample(updates, len(updates))
    for dtype, exact in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        largest = max(abs(v) for _, values in updates for v in values)
        torch.testing.assert_close(
            mean(updates, dtype), mean(shuffled, dtype), rtol=exact, atol=exact * max(largest, 1e-30)
        )


@given(clients("float32"))
def test_mean_lies_among_the_clients(updates):
    value = mean(updates, torch.float64)
    stacked = torch.tensor([values for _, values in updates], dtype=torch.float64)
    slack = 1e-12 * stacked.abs().amax(0)
    assert torch.all(value >= stacked.amin(0) - slack)
    assert torch.all(value <= stacked.amax(0) + slack)


@given(clients("float32"))
def test_mean_over_clients_is_the_mean_over_all_their_examples(updates):
    # Each client's value stands for n examples that all have it.
    total = math.fsum(n for n, _ in updates)
    for i, value in enumerate(mean(updates, torch.float64).tolist()):
        pooled = math.fsum(n * values[i] for n, values in updates) / total
        assert value == pytest.approx(pooled, rel=1e-9, abs=1e-9)


@given(clients("float32"), st.integers(0, 7))
def test_mean_of_means_is_the_mean(updates, cut):
    assume(0 < cut < len(updates))
    parts = updates[:cut], updates[cut:]
    nested = [(sum(n for n, _ in part), mean(part, torch.float64).tolist()) for part in parts]
    torch.testing.assert_close(mean(nested, torch.float64), mean(updates, torch.float64), rtol=1e-9, atol=1e-9)


@given(clients("int64"))
def test_integer_mean_is_a_nearest_integer_and_lies_among_the_clients(updates):
    total = sum(n for n, _ in updates)
    for i, value in enumerate(mean(updates, torch.int64).tolist()):
        own = [values[i] for _, values in updates]
        exact = sum(n * v for n, v in zip((n for n, _ in updates), own, strict=True))
        spread = max(own) - min(own)
        assert abs(value * total - exact) <= total * (0.5 + 1e-9 + spread * 1e-15)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), st.lists(SIZES, min_size=1, max_size=6))
def test_mean_of_equal_clients_is_what_they_sent(values, sizes):
    assert mean([(n, values) for n in sizes], torch.int64).tolist() == values
    floats = torch.tensor(values, dtype=torch.float64).div(3)
    assert torch.equal(mean([(n, floats.tolist()) for n in sizes], torch.float64), floats)


# ------------------------------------------------------------------------------------------------- partitions


class Labelled(Dataset):
    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        raise AssertionError("read")


def assert_dealt(partition: Partition, size: int, fraction: float) -> None:
    split = [partition.split(client) for client in range(partition.num_clients)]
    everything = [i for train, val in split for i in (*train.tolist(), *val.tolist())]
    assert sorted(everything) == list(range(size))
    for client, (train, val) in enumerate(split):
        own = partition.indices(client)
        assert len(train) + len(val) == len(own)
        assert len(train) >= min(1, len(own))
        assert abs(len(val) - fraction * len(own)) <= 0.5 or len(train) == 1
        assert np.all(np.diff(own) > 0)


FRACTIONS = st.floats(0, 0.99)


def prepared(build, fraction: float, labels: list[int], seed: int) -> Partition:
    """A partition that is dealt out; where it is refused, nobody has an example to hold out."""
    whole, partition = Partition(build()), Partition(build(), val_fraction=fraction)
    loader = DataLoader(Labelled(labels))
    whole.prepare(loader, seed)
    parts = [len(whole.indices(client)) for client in range(whole.num_clients)]
    if fraction and all(size < 2 or int(fraction * size + 0.5) == 0 for size in parts):
        with pytest.raises(ConfigurationError, match="holds nothing out"):
            partition.prepare(loader, seed)
        reject()
    partition.prepare(loader, seed)
    return partition


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 12), FRACTIONS, st.integers(0, 2**32 - 1))
def test_iid_partition_is_disjoint_complete_and_even(size, num_clients, fraction, seed):
    assume(num_clients <= size)
    partition = prepared(lambda: num_clients, fraction, [0] * size, seed)
    assert_dealt(partition, size, fraction)
    sizes = [len(partition.indices(client)) for client in range(num_clients)]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 3), min_size=12, max_size=60),
    st.integers(1, 12),
    st.floats(0.05, 100),
    FRACTIONS,
    st.integers(0, 2**32 - 1),
)
def test_dirichlet_partition_is_disjoint_and_complete(labels, num_clients, alpha, fraction, seed):
    def build():
        return DirichletPartitioner(num_clients, "label", alpha=alpha, min_partition_size=0, seed=seed)

    partition = prepared(build, fraction, labels, seed)
    assert_dealt(partition, len(labels), fraction)


# ------------------------------------------------------------------------------------------------- cohorts, failures


@given(
    st.floats(0.001, 1),
    st.integers(1, 20),
    st.integers(1, 300),
    st.integers(1, 10**6),
    st.integers(0, 2**32 - 1),
)
def test_cohort_is_the_fraction_rounded_never_below_the_minimum_and_never_beyond_all(
    fraction, minimum, num_clients, round, seed
):
    assume(minimum <= num_clients)
    method = PartialParticipation(fraction, min_train_clients=minimum)
    cohort = method.sample("train", round, num_clients, seed)
    assert minimum <= len(cohort) <= num_clients
    assert len(cohort) == minimum or abs(len(cohort) - fraction * num_clients) <= 0.5 + 1e-6
    assert cohort == sorted(set(cohort))
    assert set(cohort) <= set(range(num_clients))
    assert method.sample("train", round, num_clients, seed) == cohort


@given(st.floats(0.001, 1), st.integers(1, 1000))
def test_part_of_the_cohort_that_must_succeed_is_the_least_that_suffices(part, cohort):
    needed = FaultTolerance(min_results=part).min_results(cohort)
    assert 1 <= needed <= cohort
    assert needed >= part * cohort - 1e-6
    assert needed == 1 or needed - 1 < part * cohort


# ------------------------------------------------------------------------------------------------- seeds

ARGUMENTS = st.tuples(
    st.integers(-(2**63), 2**63),
    st.text(max_size=20),
    st.integers(0, 10**9),
    st.integers(-1, 10**9),
)


@given(ARGUMENTS, ARGUMENTS)
def test_seeds_are_32_bit_repeatable_and_differ_where_the_arguments_do(first, second):
    a, b = (seed_for(seed, purpose, round=round, client=client) for seed, purpose, round, client in (first, second))
    assert 0 <= a < 2**32
    np.random.RandomState(a)  # takes no more
    assert (a == b) == (first == second)


# ------------------------------------------------------------------------------------------------- checkpoints

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.floats(allow_nan=False).map(np.float64)
    | st.integers(-(2**63), 2**63 - 1).map(np.int64)
    | st.booleans().map(np.bool_)
)
KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.sampled_from(["__bytes__", "__dict__", "__tuple__", "__scalar__"]), inner, max_size=2)
    ),
    max_leaves=12,
)


def types(value):
    if isinstance(value, (list, tuple)):
        return type(value), [types(item) for item in value]
    if isinstance(value, dict):
        return dict, [(types(k), types(v)) for k, v in value.items()]
    return type(value)


@given(VALUES)
def test_nested_values_come_back_from_a_checkpoint_with_their_types(value):
    buffer = io.BytesIO()
    torch.save(to_plain(value), buffer)
    buffer.seek(0)
    again = from_plain(torch.load(buffer, weights_only=True))
    assert again == value
    assert types(again) == types(value)


ARRAYS = hnp.arrays(
    dtype=hnp.floating_dtypes(sizes=(32, 64))
    | hnp.integer_dtypes()
    | hnp.boolean_dtypes()
    | hnp.complex_number_dtypes(sizes=(64, 128)),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


@given(ARRAYS)
def test_numpy_arrays_come_back_from_a_checkpoint(array):
    again = from_plain(to_plain(array))
    assert np.array_equal(again, array, equal_nan=array.dtype.kind in "fc")
    assert (again.dtype, again.shape) == (array.dtype, array.shape)

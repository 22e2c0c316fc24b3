"""Batches of vectorized clients: each client's own examples, however their tensors lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, TensorDataset

from lightning_fed.client.vectorized.data import StackedLoader
from lightning_fed.client.vectorized.rng import NotStackable, Streams

X, Y = torch.randn(60, 4, 3), torch.arange(60)
NUMPY, COMPLEX = np.random.default_rng(0).random((60, 3)), torch.randn(12, 3, dtype=torch.complex64)
TRANSPOSED = torch.randn(3, 4, 60).permute(2, 1, 0)


class Calls(TorchDispatchMode):
    """Counts the indexing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "index_select" in str(func)
        return func(*args, **(kwargs or {}))


def parts(x: Tensor, y: Tensor) -> list[TensorDataset]:
    return [TensorDataset(x[:10], y[:10]), TensorDataset(x[40:54], y[40:54]), TensorDataset(x[5:17], y[5:17])]


def some(indices: Sequence[int]) -> Any:
    return Subset(TensorDataset(X, Y), indices)


CASES = {
    "subsets of one": ([some(range(3, 13)), some([59, 0, *range(20, 32)]), some(range(12))], True),
    "the same": ([TensorDataset(X, Y)] * 3, True),
    "slices": (parts(X, Y), True),
    "slices in another order of memory": (parts(TRANSPOSED, Y), True),
    "columns that begin elsewhere": ([TensorDataset(X[i : i + 10], Y[:10]) for i in (0, 3, 7)], False),
    "apart": ([TensorDataset(X[i : i + 10].clone(), Y[i : i + 10].clone()) for i in (0, 3, 7)], False),
    "arrays that begin alike": ([TensorDataset(torch.from_numpy(NUMPY[:n])) for n in (8, 10, 12)], False),
    "conjugated": ([TensorDataset(one) for one in (COMPLEX, COMPLEX.conj(), COMPLEX)], False),
    "indices from the end": ([some([-1, *range(9)]), some(range(10)), some([*range(-10, 0)])], True),
    "rows that overlap in part": ([TensorDataset(X.view(-1)[i : i + 30].view(10, 3)) for i in (0, 3, 31)], False),
}


def loader(dataset: Any) -> Any:
    return DataLoader(dataset, batch_size=4, shuffle=True)


def with_a_batch_sampler(dataset: Any) -> Any:
    return DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 4, drop_last=False))


@pytest.mark.parametrize("loader", [loader, with_a_batch_sampler])
@pytest.mark.parametrize(("datasets", "is_one"), CASES.values(), ids=CASES)
def test_batches_are_those_of_each_client_alone(datasets: list[Any], is_one: bool, loader: Any) -> None:
    streams = Streams(range(3), torch.device("cpu"))
    steps = -(-min(len(one) for one in datasets) // 4)
    batches = StackedLoader([loader(one) for one in datasets], streams)
    found: list[list[Any]] = [[], [], []]
    shapes = 0
    with Calls() as calls:
        for step in batches:
            for part in step:
                shapes += 1
                for row, client in enumerate([0, 1, 2] if part.rows is None else part.rows.tolist()):
                    found[client].append([tensor[row].clone() for tensor in part.batch])
    alone = Streams(range(3), torch.device("cpu"))
    for client, dataset in enumerate(datasets):
        with alone.torch_of(client):
            expected = list(loader(dataset))[:steps]
        assert len(found[client]) == steps
        for one, other in zip(found[client], expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert calls.count == len(expected[0]) * (shapes if is_one else 3 * steps)


@pytest.mark.parametrize(
    "other", [(torch.zeros(4, 3),), (torch.zeros(4, 2), torch.zeros(4))], ids=["shapes", "numbers"]
)
def test_examples_that_differ_are_refused(other: tuple[Tensor, ...]) -> None:
    datasets = [TensorDataset(torch.zeros(4, 2)), TensorDataset(*other)]
    with pytest.raises(NotStackable, match="clients' examples have different"):
        next(iter(StackedLoader([loader(one) for one in datasets], Streams(range(2), torch.device("cpu")))))


@pytest.mark.parametrize("indices", [[0, 10], [-11]])
def test_an_example_that_is_not_there_is_nobody_elses(indices: list[int]) -> None:
    datasets = [TensorDataset(X[:4]), Subset(TensorDataset(X[20:30]), indices), TensorDataset(X[30:34])]
    with pytest.raises(IndexError, match="out of range: its dataset has 10 examples"):
        list(StackedLoader([loader(one) for one in datasets], Streams(range(3), torch.device("cpu"))))

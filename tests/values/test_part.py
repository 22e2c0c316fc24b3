"""A client's data set shows the client's own examples."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import Partition
from lightning_fed.errors import ClientError
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.part import Part, TransformedPart
from tests.helpers import QUIET


class Pictures(Dataset):
    """As torchvision's data sets are."""

    classes = ("cat", "dog")

    def __init__(self) -> None:
        self.data, self.targets = torch.arange(12.0).reshape(6, 2), [0, 0, 0, 1, 1, 1]
        self.names = np.array(list("abcdef"))
        self.transform = torch.nn.Identity()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return self.data[index], self.targets[index]

    def get_labels(self) -> list[int]:
        return self.targets


def test_what_there_is_for_each_example_is_there_for_the_client_s_own() -> None:
    part = Part(Pictures(), [1, 4, 5])
    assert part.targets == [0, 1, 1]
    assert part.data.tolist() == [[2, 3], [8, 9], [10, 11]]
    assert part.names.tolist() == ["b", "e", "f"]
    assert part.classes == ("cat", "dog")
    assert isinstance(part.transform, torch.nn.Identity)
    assert [y for _, y in part] == [0, 1, 1]


def test_methods_would_speak_of_everybody_s_examples() -> None:
    with pytest.raises(AttributeError, match=r"Pictures.get_labels speaks of the examples of all clients"):
        Part(Pictures(), [0]).get_labels()
    assert not hasattr(Part(Pictures(), [0]), "no_such_thing")


def test_a_part_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(Part(Pictures(), [3]))).targets == [1]


FOUND: list[Any] = []


class ClassWeights(ToyModule):
    """Weighs classes by how often they are in what it trains on."""

    def on_train_start(self) -> None:
        for loader in (self.trainer.train_dataloader, self.trainer.datamodule.train_dataloader()):
            FOUND.append((self.trainer.client_id, loader.dataset.tensors[1].tolist()))


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, torch.arange(30) % 2), 5, shuffle=True)


def test_class_weights_are_those_of_the_client_s_own_labels() -> None:
    FOUND.clear()
    partition = Partition(3)
    FederatedTrainer(max_rounds=1, seed=0, callbacks=[partition], **QUIET).fit(ClassWeights(), datamodule=Data())
    expected = [(client, [int(i) % 2 for i in partition.indices(client)]) for client in range(3) for _ in range(2)]
    assert expected == FOUND


def test_a_whole_tensor_data_set_is_as_ever() -> None:
    found = []

    class Looks(ToyModule):
        def on_validation_start(self) -> None:
            found.append(self.trainer.val_dataloaders.dataset.tensors[0].shape)

    FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).fit(
        Looks(), DataLoader(toy_data(16), 8), DataLoader(toy_data(6), 4)
    )
    assert found == [(6, 8)]


# ------------------------------------------------------------------------------------------------- transformed


def noisy(example: Any) -> Any:
    x, y = example
    x += torch.randn(2) + float(np.random.rand()) + random.random()
    return x, y


def transformed(indices: Any = (1, 4, 5), transform: Any = noisy) -> TransformedPart:
    return TransformedPart(Pictures(), indices, transform, lambda index: index)


def test_an_example_is_the_same_whenever_and_with_whomever_it_is_read() -> None:
    part, other = transformed(), transformed([5, 0])
    first = part[2][0].clone()
    batch = part.__getitems__([2, 0, 2])
    assert all(torch.equal(first, again) for again in (batch[0][0], batch[2][0], other[0][0]))
    assert not torch.equal(first - Pictures().data[5], batch[1][0] - Pictures().data[1])
    assert [y for _, y in batch] == [1, 0, 1]


def test_a_transform_may_write_into_the_example_and_the_data_stays() -> None:
    part = transformed()
    part[0], part[1]
    assert torch.equal(part.dataset.data, Pictures().data)


EXAMPLES = {
    "array": (np.zeros(2), lambda one: one),
    "list": ([torch.zeros(2), "a"], lambda one: one[0]),
    "dict": ({"x": torch.zeros(2)}, lambda one: one["x"]),
}


@pytest.mark.parametrize("form", EXAMPLES)
def test_examples_of_any_form_are_copied_first(form: str) -> None:
    example, inner = EXAMPLES[form]

    def fill(one: Any) -> Any:
        inner(one)[:] = 1
        return one

    assert inner(TransformedPart([example], [0], fill, lambda index: index)[0]).tolist() == [1, 1]
    assert inner(example).tolist() == [0, 0]


def test_what_draws_otherwise_draws_as_without_a_transform() -> None:
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    transformed()[0]
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_what_there_is_beside_the_items_is_not_there_for_it_is_not_transformed() -> None:
    part = transformed()
    for name in ("data", "targets", "names"):
        with pytest.raises(AttributeError, match=rf"Pictures.{name} is as it was before Partition\(transform=\.\.\.\)"):
            getattr(part, name)
    assert part.classes == ("cat", "dog")
    assert not hasattr(part, "no_such_thing")


def test_a_transform_that_returns_nothing_is_an_error() -> None:
    with pytest.raises(ClientError, match=r"gave None for example 4: .* has to return the example"):
        transformed(transform=lambda example: None)[1]

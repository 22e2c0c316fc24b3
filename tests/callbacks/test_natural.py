"""Clients that are in the data: one for each value of a column, numbered in the order of the values."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset as Table
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import Partition
from lightning_fed.errors import ConfigurationError
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

SPEAKERS = list("CABAACBAC")
OF_EACH = {"A": [1, 3, 4, 7], "B": [2, 6], "C": [0, 5, 8]}


class Lines(Dataset):
    """Breaks if any example is read."""

    def __init__(self, count: int = 9, **attributes: Any) -> None:
        self.count = count
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        raise AssertionError(f"example {index} was read")


def dealt(dataset: Any, seed: int = 0, **arguments: Any) -> Partition:
    partition = Partition(**arguments)
    partition.prepare(DataLoader(dataset, batch_size=2), seed)
    return partition


def of_each(partition: Partition) -> dict[Any, list[int]]:
    assert partition.client_names is not None
    return {name: partition.indices(i).tolist() for i, name in enumerate(partition.client_names)}


def frame() -> pd.DataFrame:
    return pd.DataFrame({"text": range(9), "speaker": SPEAKERS})


DATASETS = {
    "attribute": lambda: Lines(speaker=SPEAKERS),
    "array": lambda: Lines(speaker=np.array(SPEAKERS)),
    "series": lambda: Lines(speaker=pd.Series(SPEAKERS, index=range(100, 109))),
    "frame": lambda: Lines(table=frame()),
    "frame-and-names": lambda: Lines(columns=["text", "speaker"], table=frame().set_index("text")),
    "hugging-face": lambda: Table.from_dict({"text": range(9), "speaker": SPEAKERS}),
    "hugging-face-inside": lambda: Lines(table=Table.from_dict({"speaker": SPEAKERS})),
    "subset": lambda: Subset(Lines(11, speaker=["X", *SPEAKERS, "X"]), range(1, 10)),
    "concatenated": lambda: ConcatDataset([Lines(4, speaker=SPEAKERS[:4]), Lines(5, speaker=SPEAKERS[4:])]),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_a_column_is_found_by_name_and_no_example_is_read(kind):
    partition = dealt(DATASETS[kind](), by="speaker")
    assert of_each(partition) == OF_EACH
    assert (partition.num_clients, partition.sizes()) == (3, [4, 2, 3])


def test_a_table_with_a_transform_is_dealt_out_without_running_it():
    def transform(rows):
        raise AssertionError("the transform ran")

    assert of_each(dealt(Table.from_dict({"speaker": SPEAKERS}).with_transform(transform), by="speaker")) == OF_EACH


NUMBERS = [{"A": -3, "B": 10, "C": 200}[speaker] for speaker in SPEAKERS]


@pytest.mark.parametrize(
    "by",
    [
        *(NUMBERS, torch.tensor(NUMBERS), np.array(NUMBERS), pd.Series(NUMBERS), [torch.tensor(n) for n in NUMBERS]),
        *([("a", n) for n in NUMBERS], [n / 7 for n in NUMBERS], lambda dataset: NUMBERS),
    ],
    ids=["list", "tensor", "array", "series", "tensors", "tuples", "floats", "function"],
)
def test_values_may_be_given_and_are_numbered_by_size(by):
    assert [*of_each(dealt(Lines(), by=by)).values()] == [*OF_EACH.values()]


def test_numbers_and_texts_of_the_same_look_are_not_merged():
    # As an array they all would be text.
    assert of_each(dealt(Lines(4), by=[2**63, -1, 2**63 + 1, -1])) == {-1: [1, 3], 2**63: [0], 2**63 + 1: [2]}


def test_clients_have_the_same_numbers_with_any_seed_and_order_of_the_examples():
    order = random.Random(1).sample(range(9), 9)
    shuffled = dealt(Lines(speaker=[SPEAKERS[i] for i in order]), seed=5, by="speaker")
    assert shuffled.client_names == ["A", "B", "C"]
    assert {name: sorted(order[i] for i in own) for name, own in of_each(shuffled).items()} == OF_EACH


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("lightning_fed.callbacks.partition.rank_zero_info", lines.append)
    return lines


def test_small_clients_are_left_out_and_it_is_said_how_many(said):
    partition = dealt(Lines(speaker=SPEAKERS), by="speaker", min_examples=3)
    assert of_each(partition) == {"A": OF_EACH["A"], "C": OF_EACH["C"]}
    assert said == [
        "Partition(by='speaker', min_examples=3): 1 of 3 clients have fewer examples and are left out, with 2 of 9"
        " examples."
    ]


def test_nothing_is_said_where_nobody_is_left_out(said):
    dealt(Lines(speaker=SPEAKERS), by="speaker", min_examples=2)
    assert not said


def test_held_out_examples_are_each_client_s_own():
    partition = dealt(Lines(speaker=SPEAKERS), by="speaker", val_fraction=0.3)
    assert [tuple(map(len, partition.split(client))) for client in range(3)] == [(3, 1), (1, 1), (2, 1)]
    assert {name: sorted(np.concatenate(partition.split(i))) for i, name in enumerate("ABC")} == OF_EACH


@pytest.mark.parametrize(
    ("arguments", "dataset", "message"),
    [
        (
            {"by": "speaker"},
            lambda: Lines(speakers=SPEAKERS, _speaker=SPEAKERS, scene=[0] * 9, count_=3),
            r"a Lines, has no column .*'speaker' .*Did you mean 'speakers'\? It has 'scene', 'speakers'\. Or pass",
        ),
        (
            {"by": "writer"},
            lambda: Subset(Table.from_dict({"text": range(9), "speaker": SPEAKERS}), range(3)),
            r"has no column or attribute 'writer' .*It has 'speaker', 'text'\.",
        ),
        ({"by": "speaker"}, lambda: Lines(speaker="a title."), r"has no column .*'speaker'.* It has none\."),
        ({"by": [1, 2]}, Lines, r"Partition\(by=\.\.\.\) has 2 entries for 9 training examples"),
        ({"by": lambda dataset: None}, Lines, r"Partition\(by=\.\.\.\) is a function that gave None"),
        ({"by": torch.zeros(9, 2)}, Lines, r"Partition\(by=\.\.\.\) has list for example 0: one value for each"),
        ({"by": [torch.zeros(2)] * 9}, Lines, r"has Tensor for example 0"),
        ({"by": [*SPEAKERS[:8], None]}, Lines, r"1 of 9 training examples have no value \(the first is example 8\)"),
        (
            {"by": "speaker"},
            lambda: Lines(table=pd.DataFrame({"speaker": [None, pd.NA, float("nan"), pd.NaT, *"abcde"]})),
            r"Partition\(by='speaker'\): 4 of 9 training examples have no value \(the first is example 0\)",
        ),
        ({"by": [1, "a", 2] * 3}, Lines, r"the values have no order, .*Write numbers or texts for all"),
        (
            {"by": "speaker", "min_examples": 5},
            lambda: Lines(speaker=SPEAKERS),
            r"Partition\(by='speaker', min_examples=5\): none of 3 clients has 5 examples; the largest has 4\. Lower",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_refused_with_the_way_out(arguments, dataset, message):
    partition = Partition(**arguments)
    with pytest.raises(ConfigurationError, match=message):
        partition.prepare(DataLoader(dataset()), 0)
    with pytest.raises(ConfigurationError, match="has not been dealt out yet"):
        partition.indices(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partitioner": 3, "by": "speaker"}, r"Partition\(3, by='speaker'\): both say who has which examples"),
        ({}, r"Partition\(\): write a number of clients, .* or by=, the column"),
        ({"by": 3}, r"Partition\(by=3\): write the name of a column"),
        ({"by": {"a": 1}}, r"Partition\(by=dict\(\.\.\.\)\): write the name"),
        ({"by": {1, 2}}, r"Partition\(by=set\(\.\.\.\)\): write the name"),
        ({"by": "speaker", "min_examples": 0}, r"min_examples=0\) must be a whole number, at least 1"),
        ({"by": "speaker", "min_examples": 2.5}, r"min_examples=2\.5\) must be a whole number"),
        ({"partitioner": 3, "min_examples": 2}, r"min_examples=2\) goes with by="),
    ],
)
def test_wrong_argument_is_refused_at_once(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Partition(**arguments)


def test_number_of_clients_is_known_once_the_data_is():
    with pytest.raises(ConfigurationError, match=r"Partition\(by='speaker'\) knows its number of clients only once"):
        _ = Partition(by="speaker").num_clients
    assert Partition(3).client_names is None


def test_a_fit_has_as_many_clients_as_the_data():
    data = toy_data(40)
    partition = Partition(by=torch.arange(40) % 5, val_fraction=0.25)
    trainer = FederatedTrainer(max_rounds=1, callbacks=[partition], **QUIET)
    trainer.fit(ToyModule(), DataLoader(data, batch_size=4))
    assert (partition.num_clients, partition.sizes()) == (5, [6] * 5)
    assert "clients/val_loss" in trainer.callback_metrics


@pytest.mark.parametrize(("dataset", "bars"), [(lambda: toy_data(9), 6), (Lines, 3)], ids=["labels", "no-labels"])
def test_plot_draws_labels_or_where_there_are_none_how_many_examples_each_client_has(dataset, bars, tmp_path):
    figure = dealt(dataset(), by=SPEAKERS).plot(tmp_path / "clients.png")
    assert len(figure.axes[0].patches) == bars
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 9
    assert (tmp_path / "clients.png").stat().st_size > 2000


def test_plot_draws_the_clients_that_are_left():
    figure = dealt(TensorDataset(torch.zeros(9), torch.zeros(9, dtype=torch.int64)), by=SPEAKERS, min_examples=3).plot()
    assert [bar.get_height() for bar in figure.axes[0].patches] == [4, 3]

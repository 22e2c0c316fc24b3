"""A client's slice of a loader is the user's loader over fewer examples; what cannot be sliced is refused."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_fed.errors import ConfigurationError
from lightning_fed.values.data import (
    ClientLoaders,
    Gathered,
    gathering,
    in_memory,
    labels_of,
    require_sliceable,
    slice_loader,
)
from lightning_fed.values.part import Part


class Numbers(Dataset):
    """Example ``i`` is ``i``; any attribute can be put on it."""

    def __init__(self, size: int, **attributes: object) -> None:
        self.size = size
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(3)


class Odd(DataLoader):
    """A subclass whose __init__ takes none of DataLoader's arguments."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(Numbers(len(numbers)), batch_size=2, shuffle=True, collate_fn=list)


def examples(loader: DataLoader) -> list[int]:
    return [int(i) for batch in loader for i in (batch if isinstance(batch, (list, torch.Tensor)) else [batch])]


# ------------------------------------------------------------------------------------------------- what can be sliced


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([1, 2], r"deals out one DataLoader; the training data is a list"),
        (DataLoader(Stream()), r"Stream has no length"),
        (DataLoader(Numbers(4), sampler=WeightedRandomSampler([1.0] * 4, 4)), r"whose WeightedRandomSampler was made"),
        (
            DataLoader(Numbers(4), batch_sampler=[[0, 1], [2, 3]]),
            r"whose list was made for the whole dataset",
        ),
        (
            DataLoader(Numbers(4), batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 4, 4), 2, False)),
            r"whose WeightedRandomSampler was made",
        ),
        (
            DataLoader(Numbers(4), sampler=RandomSampler(Numbers(4), replacement=True, num_samples=100)),
            r"whose RandomSampler was made",
        ),
        (DataLoader(Numbers(4), sampler=RandomSampler(Numbers(4), num_samples=2)), r"whose RandomSampler was made"),
    ],
)
def test_loader_that_cannot_be_dealt_out_is_refused_with_the_way_out(loader, message):
    with pytest.raises(ConfigurationError, match=message + r".*ClientData\(fn\)"):
        require_sliceable(loader)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Numbers(4)),
        DataLoader(Numbers(4), batch_size=None),
        DataLoader(Numbers(4), shuffle=True, batch_size=3, drop_last=True),
        DataLoader(Numbers(4), sampler=RandomSampler(Numbers(4))),
        DataLoader(Numbers(4), batch_sampler=BatchSampler(RandomSampler(Numbers(4)), 2, False)),
        Odd([1, 2, 3]),
    ],
)
def test_usual_loaders_are_accepted_as_they_are(loader):
    assert require_sliceable(loader) is loader


# ------------------------------------------------------------------------------------------------- the slice


@pytest.mark.parametrize("shuffled", [False, True])
def test_slice_has_its_own_examples_once_and_the_loaders_batch_size(shuffled):
    loader = DataLoader(Numbers(20), batch_size=4, shuffle=shuffled)
    sliced = slice_loader(loader, [3, 5, 8, 13, 19], seed=0)
    batches = list(sliced)
    assert [len(batch) for batch in batches] == [4, 1]
    assert len(sliced) == 2
    assert sorted(examples(sliced)) == [3, 5, 8, 13, 19]
    torch.manual_seed(0)
    orders = {tuple(examples(sliced)) for _ in range(10)}
    assert (len(orders) > 1) == shuffled


def test_loader_itself_stays_whole():
    loader = DataLoader(Numbers(6), batch_size=2)
    slice_loader(loader, [1], seed=0)
    assert examples(loader) == [0, 1, 2, 3, 4, 5]


def test_slice_keeps_the_users_settings():
    loader = DataLoader(Numbers(9), batch_size=2, collate_fn=list, drop_last=True, timeout=0)
    sliced = slice_loader(loader, [1, 2, 3], seed=0)
    assert list(sliced) == [[1, 2]]
    assert sliced.collate_fn is list


def test_slice_of_a_subclass_is_of_the_subclass():
    sliced = slice_loader(Odd([1, 2, 3, 4, 5]), [0, 4], seed=0)
    assert type(sliced) is Odd
    assert sorted(examples(sliced)) == [0, 4]


def test_slice_of_a_loader_with_a_batch_sampler_keeps_its_size_shuffling_and_drop_last():
    numbers = Numbers(20)
    loader = DataLoader(numbers, batch_sampler=BatchSampler(RandomSampler(numbers), 4, True))
    sliced = slice_loader(require_sliceable(loader), range(10, 19), seed=0)
    assert [len(batch) for batch in sliced] == [4, 4]
    assert set(examples(sliced)) < set(range(10, 19))
    torch.manual_seed(0)
    assert len({tuple(examples(sliced)) for _ in range(5)}) > 1


def test_slice_of_a_loader_that_does_not_batch_does_not_batch():
    assert list(slice_loader(DataLoader(Numbers(9), batch_size=None), [7, 2], seed=0)) == [7, 2]


def test_loader_without_a_generator_shuffles_with_torchs_seed():
    sliced = slice_loader(DataLoader(Numbers(50), batch_size=50, shuffle=True), range(30), seed=1)
    torch.manual_seed(5)
    first = examples(sliced)
    torch.manual_seed(5)
    assert examples(sliced) == first


def test_loader_with_its_own_generator_shuffles_by_the_slices_seed_and_leaves_the_users_generator_alone():
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Numbers(50), batch_size=50, shuffle=True, generator=generator)
    before = generator.get_state()
    first, again, other = (examples(slice_loader(loader, range(30), seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(generator.get_state(), before)


def test_evaluation_slice_neither_shuffles_nor_drops():
    loader = DataLoader(Numbers(9), batch_size=2, shuffle=True, drop_last=True)
    assert examples(slice_loader(loader, [5, 1, 3], seed=0, shuffle=False)) == [5, 1, 3]


def test_sampling_with_replacement_stays_with_replacement():
    numbers = Numbers(20)
    loader = DataLoader(numbers, sampler=RandomSampler(numbers, replacement=True), batch_size=5)
    sliced = slice_loader(require_sliceable(loader), range(10), seed=0)
    torch.manual_seed(0)
    epochs = [examples(sliced) for _ in range(5)]
    assert all(len(epoch) == 10 and set(epoch) <= set(range(10)) for epoch in epochs)
    assert any(len(set(epoch)) < 10 for epoch in epochs)


@pytest.mark.parametrize("shuffled", [False, True])
def test_slice_may_be_empty(shuffled):
    # A partitioner may leave a client without examples; its fit says so, and says whose.
    sliced = slice_loader(DataLoader(Numbers(9), shuffle=shuffled), [], seed=0)
    assert (len(sliced), list(sliced)) == (0, [])


# ------------------------------------------------------------------------------------------------- labels


X = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (Numbers(4, targets=[3, 1, 2, 1]), [3, 1, 2, 1]),
        (Numbers(4, labels=torch.tensor([3, 1, 2, 1])), [3, 1, 2, 1]),
        (Numbers(4, targets=["d", "b", "c", "b"]), ["d", "b", "c", "b"]),
        (Subset(Numbers(4, targets=[3, 1, 2, 1]), [2, 0]), [2, 3]),
        (Subset(Numbers(4, targets=["d", "b", "c", "b"]), [2, 0]), ["c", "d"]),
        (Subset(Subset(Numbers(4, targets=torch.tensor([3, 1, 2, 1])), [2, 0, 1]), range(1, 3)), [3, 1]),
        (ConcatDataset([Numbers(2, targets=[3, 1]), Subset(Numbers(2, labels=[5, 6]), [1])]), [3, 1, 6]),
        (TensorDataset(X, torch.tensor([3, 1, 2, 1])), [3, 1, 2, 1]),
    ],
)
def test_labels_are_found_without_reading_an_example(dataset, labels):
    assert [getattr(label, "item", lambda label=label: label)() for label in labels_of(dataset)] == labels


@pytest.mark.parametrize(
    "dataset",
    [
        Numbers(4),
        Numbers(4, labels=["cat", "dog"]),  # the classes' names, not the examples' labels
        Numbers(4, labels=lambda: [1, 2, 3, 4]),
        Numbers(3, targets=[{"boxes": []}, {"boxes": [1]}, {"boxes": [1, 2]}]),
        Numbers(2, targets=[torch.zeros(1), torch.zeros(2)]),
        TensorDataset(X, torch.zeros(4, 3).long()),
        TensorDataset(X, torch.zeros(4)),
        Subset(Numbers(4), [0]),
        ConcatDataset([Numbers(2, targets=[1, 2]), Numbers(2)]),
    ],
)
def test_what_is_not_one_label_an_example_is_no_label(dataset):
    assert labels_of(dataset) is None


@pytest.mark.parametrize("part", [None, [5, 3, 8, 0, 11, 2, 7]], ids=["whole", "subset"])
@pytest.mark.parametrize("options", [{"shuffle": True}, {"drop_last": True}, {"shuffle": True, "generator": 3}])
def test_gathered_batches_are_those_of_the_loader_in_kind_value_and_order(part, options):
    whole = TensorDataset(
        torch.randn(12, 3, 2).to(torch.bfloat16), torch.arange(12), torch.randn(12, 2).T.contiguous().T
    )
    dataset = whole if part is None else Subset(Subset(whole, list(range(12))), part)

    def batches(change):
        own = {**options, "generator": torch.Generator().manual_seed(3)} if "generator" in options else options
        loader = change(DataLoader(dataset, batch_size=4, **own))
        torch.manual_seed(0)
        return [batch for _ in range(2) for batch in loader], torch.rand(1)

    expected, after = batches(lambda loader: loader)
    got, also_after = batches(gathering)
    assert torch.equal(after, also_after)
    assert [type(batch) for batch in got] == [type(batch) for batch in expected]
    for one, other in zip(got, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert torch.equal(a, b)


def test_loaders_that_do_more_than_stack_tensors_are_left_alone():
    class Own(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] + 1

    tensors = TensorDataset(torch.zeros(4))
    for loader in (
        DataLoader(Own(torch.zeros(4))),
        DataLoader(tensors, collate_fn=list),
        DataLoader(tensors, batch_size=None),
        None,
    ):
        assert gathering(loader) is loader


# ------------------------------------------------------------------------------------------------- what was read


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [
        (TensorDataset(torch.arange(6.0), torch.arange(6)), TensorDataset),
        ([(torch.tensor(float(i)), i) for i in range(6)], TensorDataset),
        ([(torch.ones(i % 2 + 1), i) for i in range(6)], None),  # of unequal shapes
        ([{"x": torch.tensor(i)} for i in range(6)], None),
        ([(i, "name") for i in range(6)], None),
    ],
)
def test_some_examples_are_read_once_and_kept_as_tensors_where_they_are(dataset, kind):
    kept = in_memory(DataLoader(dataset), Part(dataset, [4, 1, 3]))
    assert isinstance(kept, kind or Dataset)
    assert isinstance(kept, TensorDataset) == (kind is TensorDataset)
    assert len(kept) == 3
    for got, index in zip((kept[i] for i in range(3)), (4, 1, 3), strict=True):
        for one, other in zip(got, dataset[index], strict=True):
            assert one == other if isinstance(one, str) else torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_examples_that_the_user_collates_are_kept_as_they_are():
    data = TensorDataset(torch.arange(4.0))
    kept = in_memory(DataLoader(data, collate_fn=list), Part(data, [2]))
    assert not isinstance(kept, TensorDataset)
    assert kept[0] == (torch.tensor(2.0),)
    assert len(in_memory(DataLoader(Numbers(4)), Part(Numbers(4), []))) == 0


def test_a_part_of_tensors_counts_from_the_end_and_knows_where_it_lies():
    x = torch.arange(5.0)
    part = Gathered([x, 10 * x], [-1, 0, -5, 2])
    assert len(part) == 4
    assert [column.tolist() for column in part.tensors] == [[4, 0, 0, 2], [40, 0, 0, 20]]
    assert [column.tolist() for column in part.__getitems__([3, 0])] == [[2, 4], [20, 40]]
    assert [float(value) for value in part[0]] == [4, 40]
    assert part.where(torch.tensor([1, 3])).tolist() == [0, 2]
    assert part.whole[0] is x
    whole = Gathered([x], None)
    assert (len(whole), whole.where(torch.tensor([1])).tolist(), whole.tensors[0] is x) == (5, [1], True)
    assert len(Gathered([x], [])) == 0


@pytest.mark.parametrize(("indices", "wrong"), [([0, 5], 5), ([-6, 0], -6), ([-6, 5], -6)])
def test_an_index_that_is_not_there_is_named(indices, wrong):
    with pytest.raises(IndexError, match=rf"^index {wrong} of a Subset is out of range: its dataset has 5 examples$"):
        Gathered([torch.arange(5)], indices)


def test_a_client_may_have_something_to_evaluate_on():
    class Whole(LightningDataModule):
        def val_dataloader(self):
            raise AssertionError("only asked whether there is one")

    assert not ClientLoaders(DataLoader(Numbers(2))).has_val()
    assert ClientLoaders(DataLoader(Numbers(2)), DataLoader(Numbers(1))).has_val()
    assert not ClientLoaders(datamodule=LightningDataModule()).has_val()
    assert ClientLoaders(datamodule=Whole()).has_val()

"""The train set dealt out: every example to one client, shuffled first, none read; errors that say the way out."""

import random

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Image, Value
from datasets import Dataset as HFDataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    LinearPartitioner,
    NaturalIdPartitioner,
    PathologicalPartitioner,
    ShardPartitioner,
)
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_fed.callbacks import Partition
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for
from lightning_fed.values.data import gathering

SORTED = [0] * 50 + [1] * 50


class Unreadable(Dataset):
    """Breaks if any example is read."""

    def __init__(self, size: int = 100, **attributes: object) -> None:
        self.size = size
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        raise AssertionError(f"example {index} was read")


def dealt(partition: Partition, dataset, seed: int = 0, **loader) -> Partition:
    partition.prepare(DataLoader(dataset, **loader), seed)
    return partition


def parts(partition: Partition) -> list[list[int]]:
    return [partition.indices(client).tolist() for client in range(partition.num_clients)]


def assert_disjoint_and_complete(partition: Partition, size: int) -> None:
    assert sorted(i for part in parts(partition) for i in part) == list(range(size))


def image_table(size: int = 60) -> HFDataset:
    """Its images are no images: decoding one raises."""
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"]), "writer": Value("string")})
    rows = {
        "image": [{"bytes": b"no image", "path": None}] * size,
        "label": [i // (size // 3) for i in range(size)],
        "writer": [f"w{i % 4}" for i in range(size)],
    }
    return HFDataset.from_dict(rows, features=features)


# ------------------------------------------------------------------------------------------------- how it deals


def test_iid_shuffles_class_sorted_data_first():
    # flwr-datasets' own IidPartitioner gives [[50, 0], [0, 50]].
    partition = dealt(Partition(2), Unreadable(targets=SORTED))
    ones = [sum(SORTED[i] for i in part) for part in parts(partition)]
    assert sum(ones) == 50
    assert all(15 < n < 35 for n in ones)


def test_iid_partition_is_even_whatever_the_labels():
    partition = dealt(Partition(7), Unreadable(100))
    assert sorted(map(len, parts(partition))) == [14] * 5 + [15] * 2
    assert_disjoint_and_complete(partition, 100)


@pytest.mark.parametrize(
    "partitioner",
    [
        lambda: DirichletPartitioner(5, "label", alpha=0.3, min_partition_size=1),
        lambda: ShardPartitioner(num_partitions=5, partition_by="label", num_shards_per_partition=2),
        lambda: PathologicalPartitioner(num_partitions=4, partition_by="label", num_classes_per_partition=2),
        lambda: NaturalIdPartitioner("label"),
        lambda: LinearPartitioner(4),
    ],
    ids=["dirichlet", "shard", "pathological", "natural-id", "linear"],
)
def test_any_partitioner_gives_every_example_to_one_client(partitioner):
    labels = [i // 30 for i in range(120)]
    partition = dealt(Partition(partitioner()), Unreadable(120, targets=labels))
    assert_disjoint_and_complete(partition, 120)


def test_shards_have_few_labels_each():
    labels = np.repeat(np.arange(10), 20)
    partitioner = ShardPartitioner(num_partitions=10, partition_by="label", num_shards_per_partition=2)
    partition = dealt(Partition(partitioner), Unreadable(200, targets=labels))
    assert all(len(set(labels[part])) <= 4 for part in parts(partition))


def test_natural_ids_are_the_clients():
    speakers = list("abcabcaab")
    partition = dealt(Partition(NaturalIdPartitioner("label")), Unreadable(9, targets=speakers))
    assert partition.num_clients == 3
    assert all(len({speakers[i] for i in part}) == 1 for part in parts(partition))
    assert sorted(partition.sizes()) == [2, 3, 4]


def test_small_alpha_skews_the_labels_and_a_large_one_does_not():
    def skew(alpha):
        partitioner = DirichletPartitioner(5, "label", alpha=alpha, min_partition_size=1, self_balancing=False)
        partition = dealt(Partition(partitioner), Unreadable(500, targets=[i % 2 for i in range(500)]))
        shares = [np.mean([i % 2 for i in part]) for part in parts(partition)]
        return np.abs(np.array(shares) - 0.5).mean()

    assert skew(0.05) > 0.3
    assert skew(1000.0) < 0.1


# ------------------------------------------------------------------------------------------------- what fixes it


def test_seed_fixes_the_partition_and_the_global_generators_do_not_matter():
    def made(seed, outer):
        random.seed(outer)
        np.random.seed(outer)
        torch.manual_seed(outer)
        return parts(dealt(Partition(4), Unreadable(), seed=seed))

    assert made(0, 1) == made(0, 2)
    assert made(0, 1) != made(1, 1)


def test_partition_leaves_the_global_generators_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    expected = (np.random.rand(), torch.rand(1))
    np.random.seed(0)
    torch.manual_seed(0)
    dealt(Partition(3, val_fraction=0.2), Unreadable()).split(0)
    assert (np.random.rand(), torch.rand(1)) == expected


def test_one_partition_serves_several_fits():
    partition = Partition(DirichletPartitioner(3, "label", alpha=1.0, min_partition_size=1))
    first = parts(dealt(partition, Unreadable(targets=SORTED)))
    second = parts(dealt(partition, Unreadable(60, targets=SORTED[20:80])))
    assert sum(map(len, second)) == 60
    assert parts(dealt(partition, Unreadable(targets=SORTED))) == first


def test_indices_ascend_so_that_reading_follows_the_disk():
    for part in parts(dealt(Partition(3), Unreadable())):
        assert part == sorted(part)


# ------------------------------------------------------------------------------------------------- where labels are


BY_LABEL = pytest.mark.parametrize("column", ["label", "labels", "target", "targets"])


@BY_LABEL
@pytest.mark.parametrize(
    "dataset",
    [
        Unreadable(targets=SORTED),
        Unreadable(labels=torch.tensor(SORTED)),
        Unreadable(targets=np.array(SORTED)),
        Subset(Unreadable(200, targets=[2] * 100 + SORTED), range(100, 200)),
        TensorDataset(torch.zeros(100, 3), torch.tensor(SORTED)),
    ],
    ids=["list", "tensor", "array", "subset", "tensor-dataset"],
)
def test_labels_are_found_under_any_usual_name_and_no_example_is_read(dataset, column):
    partition = dealt(Partition(NaturalIdPartitioner(column)), dataset)
    assert sorted(parts(partition)) == [list(range(50)), list(range(50, 100))]


@pytest.mark.parametrize(
    "labels",
    [SORTED, torch.tensor(SORTED), np.array(SORTED), lambda dataset: [i // 50 for i in range(len(dataset))]],
    ids=["list", "tensor", "array", "function"],
)
@pytest.mark.parametrize("column", ["label", "anything"])
def test_labels_may_be_given_and_are_what_the_partitioner_asks_for(labels, column):
    partition = dealt(Partition(NaturalIdPartitioner(column), labels=labels), Unreadable(targets=[9] * 100))
    assert sorted(parts(partition)) == [list(range(50)), list(range(50, 100))]


@pytest.mark.parametrize(("column", "clients"), [("label", 3), ("writer", 4)])
def test_hugging_face_table_is_dealt_by_any_column_and_no_image_is_decoded(column, clients):
    table = image_table()
    partition = dealt(Partition(NaturalIdPartitioner(column)), table)
    assert partition.num_clients == clients
    assert_disjoint_and_complete(partition, 60)
    values = table.select_columns([column])[column][:]
    assert all(len({values[i] for i in part}) == 1 for part in parts(partition))


def test_hugging_face_table_with_a_transform_is_dealt_without_running_it():
    def transform(rows):
        raise AssertionError("the transform ran")

    partition = dealt(Partition(NaturalIdPartitioner("label")), image_table().with_transform(transform))
    assert partition.num_clients == 3


@pytest.mark.parametrize(
    "attributes",
    [
        {"labels": ["cat", "dog"]},  # the classes' names
        {"targets": [{"boxes": [0] * i} for i in range(100)]},
        {"targets": [torch.zeros(i) for i in range(100)]},
        {"targets": torch.zeros(100, 4)},
    ],
    ids=["class-names", "dicts", "ragged", "vectors"],
)
def test_data_without_a_label_for_each_example_can_be_dealt_out_iid(attributes):
    assert_disjoint_and_complete(dealt(Partition(3), Unreadable(**attributes)), 100)
    with pytest.raises(ConfigurationError, match="it has no labels that can be found"):
        dealt(Partition(NaturalIdPartitioner("label")), Unreadable(**attributes))


# ------------------------------------------------------------------------------------------------- a client's share


def test_clients_loader_is_like_the_users_over_the_clients_examples():
    class Numbers(Unreadable):
        def __getitem__(self, index):
            return index

    partition = dealt(Partition(4), Numbers(), batch_size=10, shuffle=True, collate_fn=list)
    own = partition.client(2, round=1)
    batches = list(own.train)
    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert sorted(i for batch in batches for i in batch) == parts(partition)[2]
    assert own.val is None


@pytest.mark.parametrize(("fraction", "held_out"), [(0.0, 0), (0.2, 5), (0.5, 13), (0.02, 1), (0.99, 24)])
def test_fraction_held_out_is_rounded_to_the_nearest_and_leaves_one_to_train_on(fraction, held_out):
    partition = dealt(Partition(4, val_fraction=fraction), Unreadable())
    for client in range(4):
        train, val = partition.split(client)
        assert (len(train), len(val)) == (25 - held_out, held_out)
        assert sorted([*train, *val]) == parts(partition)[client]
    assert partition.can_evaluate() == (fraction > 0)
    assert partition.sizes() == [25 - held_out] * 4


def test_held_out_part_is_the_same_in_every_round_and_chosen_by_the_seed():
    first, again, other = (dealt(Partition(2, val_fraction=0.3), Unreadable(), seed=s) for s in (0, 0, 1))
    assert first.split(1)[1].tolist() == again.split(1)[1].tolist()
    assert first.split(1)[1].tolist() != other.split(1)[1].tolist()
    val = [list(first.client(0, round=round).val.dataset.indices) for round in (1, 2)]
    assert val[0] == val[1] == first.split(0)[1].tolist()


def test_held_out_part_is_another_with_another_seed_or_client_even_of_the_same_examples():
    def held_out(seed, client):
        partition = dealt(Partition(NaturalIdPartitioner("label"), 0.5), Unreadable(targets=SORTED), seed=seed)
        own = partition.indices(client)
        return (partition.split(client)[1] - own[0]).tolist()

    assert len({tuple(held_out(seed, client)) for seed in (0, 1) for client in (0, 1)}) == 4


def test_held_out_part_is_read_whole_and_in_order():
    class Numbers(Unreadable):
        def __getitem__(self, index):
            return index

    partition = dealt(Partition(2, val_fraction=0.3), Numbers(), batch_size=4, shuffle=True, drop_last=True)
    read = [int(i) for batch in partition.client(0, round=1).val for i in batch]
    assert read == partition.split(0)[1].tolist()
    assert len(read) == 15


def test_users_own_generator_gives_another_order_each_round():
    class Numbers(Unreadable):
        def __getitem__(self, index):
            return index

    partition = dealt(Partition(2), Numbers(), batch_size=50, shuffle=True, generator=torch.Generator())
    orders = [next(iter(partition.client(0, round=round).train)).tolist() for round in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_client_that_gets_no_example_has_no_batch():
    partitioner = DirichletPartitioner(20, "label", alpha=0.05, min_partition_size=0)
    partition = dealt(Partition(partitioner), Unreadable(30, targets=[0, 1, 2] * 10), shuffle=True)
    empty = partition.sizes().index(0)
    own = partition.client(empty, round=1)
    assert (len(own.train), own.val) == (0, None)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Partition(0), "num_clients=0 must be at least 1"),
        (lambda: Partition(2, val_fraction=1.0), r"Partition\(val_fraction=1\.0\) must be in \[0, 1\)"),
        (lambda: Partition(2, val_fraction=-0.1), r"Partition\(val_fraction=-0\.1\) must be in \[0, 1\)"),
        (lambda: Partition(2, val_fraction=float("nan")), r"val_fraction=nan\) must be in"),
    ],
)
def test_wrong_argument_is_refused_at_once(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def used() -> IidPartitioner:
    partitioner = IidPartitioner(2)
    partitioner.dataset = HFDataset.from_dict({"x": [1, 2]})
    return partitioner


def by_label() -> DirichletPartitioner:
    return DirichletPartitioner(2, "label", 0.5, min_partition_size=1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1, 2])


@pytest.mark.parametrize(
    ("partition", "dataset", "message"),
    [
        (
            lambda: Partition(4, labels=[1, 2]),
            Unreadable(),
            r"Partition\(labels=\.\.\.\) has 2 entries for 100 training examples",
        ),
        (lambda: Partition(used()), Unreadable(), "partitioner that has a dataset already"),
        (
            lambda: Partition(DirichletPartitioner(4, "label", 0.5)),
            Unreadable(),
            r"DirichletPartitioner\(partition_by='label'\): .* it has no labels that can be found\. .*labels=",
        ),
        (
            lambda: Partition(NaturalIdPartitioner("author")),
            image_table(),
            r"has no column 'author'; it has \['label', 'writer'\]",
        ),
        (
            lambda: Partition(DirichletPartitioner(20, "label", 0.05, min_partition_size=5)),
            Unreadable(targets=SORTED),
            r"cannot deal out 100 examples: .*Two ways out: a larger alpha, or a smaller min_partition_size",
        ),
        (
            lambda: Partition(101),
            Unreadable(),
            r"IidPartitioner cannot deal out 100 examples: 101 clients are too many",
        ),
        (lambda: Partition(2), Stream(), r"Stream has no length.*ClientData\(fn\)"),
        (
            lambda: Partition(by_label(), labels=[None if i in (7, 9) else i % 3 for i in range(100)]),
            Unreadable(),
            r"2 of 100 training examples have no label \(the first is example 7\).*labels=",
        ),
        (
            lambda: Partition(by_label(), labels=lambda dataset: [float("nan"), *SORTED[1:]]),
            Unreadable(),
            r"1 of 100 training examples have no label \(the first is example 0\)",
        ),
        (
            lambda: Partition(NaturalIdPartitioner("writer")),
            HFDataset.from_dict({"writer": ["a", "b", None, "a"]}),
            r"1 of 4 training examples have no 'writer' \(the first is example 2\)",
        ),
        (
            lambda: Partition(by_label(), labels=lambda dataset: None),
            Unreadable(targets=SORTED),
            r"Partition\(labels=\.\.\.\) is a function that gave None",
        ),
        (
            lambda: Partition(by_label(), labels=iter(SORTED)),
            Unreadable(),
            r"Partition\(labels=\.\.\.\) is a list_iterator, which has no length",
        ),
        (
            lambda: Partition(by_label(), labels=torch.zeros(100, 3)),
            Unreadable(),
            r"Partition\(labels=\.\.\.\) has the shape \(100, 3\): one label for each example",
        ),
        (
            lambda: Partition(4, val_fraction=0.01),
            Unreadable(),
            r"val_fraction=0\.01\) holds nothing out: .* has 25 examples\. Write val_fraction=0\.02 or more",
        ),
        (
            lambda: Partition(100, val_fraction=0.9),
            Unreadable(),
            r"val_fraction=0\.9\) holds nothing out: the largest client has 1 example, which it trains on",
        ),
    ],
    ids=[
        *("labels", "used", "no-labels", "no-column", "dirichlet", "too-many", "stream", "none", "nan"),
        *("column", "gave-none", "iterator", "one-hot", "nothing-held-out", "one-example-each"),
    ],
)
@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
def test_what_does_not_fit_the_data_is_refused_with_the_way_out(partition, dataset, message):
    with pytest.raises(ConfigurationError, match=message):
        dealt(partition(), dataset)


def test_labels_that_nobody_asks_for_may_be_missing():
    assert_disjoint_and_complete(dealt(Partition(3, labels=[None] * 100), Unreadable()), 100)


def test_one_client_with_held_out_examples_is_enough():
    partition = dealt(
        Partition(NaturalIdPartitioner("label"), val_fraction=0.1), Unreadable(12, targets=[0] * 2 + [1] * 10)
    )
    assert [len(partition.split(client)[1]) for client in range(2)] == [0, 1]


def test_failed_deal_leaves_nothing_dealt():
    partition = Partition(NaturalIdPartitioner("label"))
    with pytest.raises(ConfigurationError, match="no labels"):
        dealt(partition, Unreadable())
    with pytest.raises(ConfigurationError, match="has not been dealt out yet"):
        partition.indices(0)


@pytest.mark.parametrize("ask", [lambda p: p.indices(0), lambda p: p.client(0, round=1), lambda p: p.plot()])
def test_asking_before_the_data_is_dealt_out_says_what_to_call(ask):
    with pytest.raises(
        ConfigurationError, match=r"has not been dealt out yet: call trainer\.fit, or partition\.prepare"
    ):
        ask(Partition(2))


def test_number_of_clients_is_known_before_the_data_where_the_partitioner_knows_it():
    assert Partition(DirichletPartitioner(6, "label", 0.5)).num_clients == 6
    with pytest.raises(ConfigurationError, match="NaturalIdPartitioner knows its number of clients only once"):
        _ = Partition(NaturalIdPartitioner("label")).num_clients


def test_workers_for_a_small_share_are_warned_of_once_a_deal():
    with pytest.warns(
        UserWarning, match=r"DataLoader\(num_workers=2\) starts that many processes .* about 25 examples"
    ):
        dealt(Partition(4), Unreadable(), num_workers=2)


# ------------------------------------------------------------------------------------------------- kept in memory


class Counted(Dataset):
    """Counts how often each example is read; gives it in one of the ways that datasets do."""

    def __init__(self, way) -> None:
        self.way, self.read = way, [0] * 20

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        self.read[index] += 1
        return self.way(index)


WAYS = {
    "tuple": lambda i: (torch.full((3,), float(i)), i % 2),
    "list": lambda i: [torch.full((3,), i, dtype=torch.bfloat16), float(i)],
    "dict": lambda i: {"x": torch.full((3,), float(i)), "id": f"example {i}"},
    "tensor": lambda i: torch.full((3,), float(i)),
    "words": lambda i: (f"example {i}", i),
}


def batches(partition: Partition) -> list:
    got = []
    for round in (1, 2, 3):
        for client in (0, 1):
            own = partition.client(client, round=round)
            torch.manual_seed(round)
            got += [repr(list(gathering(loader))) for loader in (own.train, own.val)]
    return got


@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_in_memory_is_read_once_and_gives_the_same_batches(way):
    once, again = Counted(WAYS[way]), Counted(WAYS[way])
    kept = batches(dealt(Partition(2, val_fraction=0.2, cache=True), once, batch_size=3, shuffle=True))
    assert kept == batches(dealt(Partition(2, val_fraction=0.2), again, batch_size=3, shuffle=True))
    assert once.read == [1] * 20
    assert again.read == [3] * 20


def test_a_new_deal_forgets_what_was_kept():
    partition = Partition(2, cache=True)
    for times in (1, 2):
        data = Counted(WAYS["tuple"])
        for round in range(times):
            list(dealt(partition, data).client(0, round=round + 1).train)
        assert max(data.read) == times


# ------------------------------------------------------------------------------------------------- the picture


def test_plot_draws_a_bar_for_each_client_and_writes_a_png(tmp_path):
    partition = dealt(Partition(3), Unreadable(targets=SORTED))
    path = tmp_path / "partition.png"
    figure = partition.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert len(axes.containers) == 2  # labels
    assert sum(bar.get_height() for container in axes.containers for bar in container) == 100
    assert axes.get_xlabel() == "client"


@pytest.fixture
def panels():
    figure, panels = plt.subplots(1, 2, sharey=True)
    yield panels
    plt.close(figure)


def test_partitions_are_drawn_side_by_side_with_a_colour_for_each_label(panels):
    """The second has no example of label 0 with its first client, and none of label 1 with its second."""
    labels = Unreadable(targets=SORTED)
    for axes, partition in zip(panels, (Partition(2), Partition(by=SORTED)), strict=True):
        assert dealt(partition, labels).draw(axes, title="who", legend=axes is panels[1], percent=True) is None
    colors, heights = (
        [[get(container[0]) for container in axes.containers] for axes in panels]
        for get in (lambda bar: bar.get_facecolor(), lambda bar: bar.get_height())
    )
    assert colors[0] == colors[1]
    assert colors[0][0] != colors[0][1]
    assert sum(heights[0]) == sum(heights[1]) == 100
    assert heights[1] == [100, 0]
    assert [axes.get_title() for axes in panels] == ["who", "who"]
    assert panels[0].get_legend() is None
    assert [text.get_text() for text in panels[1].get_legend().get_texts()] == ["1", "0"]  # from the top down


@pytest.mark.parametrize(("labels", "named"), [(10, True), (20, True), (40, True), (41, False)])
def test_each_label_has_a_colour_of_its_own_and_few_have_a_name(labels, named):
    axes = dealt(Partition(2), Unreadable(2 * labels, targets=torch.arange(2 * labels) % labels)).plot().axes[0]
    assert len({container[0].get_facecolor() for container in axes.containers}) == labels
    assert (axes.get_legend() is not None) == named


def test_an_axis_does_not_end_at_the_highest_bar_where_its_last_label_is_missing():
    targets = torch.tensor([0] * 8 + [1] * 2)
    axes = dealt(Partition(by=targets), Unreadable(10, targets=targets)).plot().axes[0]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 8


def test_a_picture_is_not_kept_by_pyplot():
    before = plt.get_fignums()
    dealt(Partition(2), Unreadable(targets=SORTED)).plot()
    assert plt.get_fignums() == before


def test_plot_without_labels_says_how_to_give_them():
    with pytest.raises(ConfigurationError, match=r"found no labels: pass them, Partition\(\.\.\., labels="):
        dealt(Partition(3), Unreadable()).plot()


@pytest.mark.parametrize("other", ["a", 1])
def test_examples_without_a_label_are_drawn_as_such(other):
    labels = [None, other] * 5
    axes = dealt(Partition(2, labels=labels), Unreadable(10)).plot().axes[0]
    heights = {c.get_label(): sum(bar.get_height() for bar in c) for c in axes.containers}
    assert heights == {"None": 5, str(other): 5}


@pytest.mark.parametrize(("examples", "clients"), [(103, 10), (7, 7), (1000, 3)])
def test_an_iid_partition_is_that_of_flwr_datasets(examples, clients):
    """Which is cut by index, and not asked for a table each."""
    partition = Partition(clients, val_fraction=0.2 if clients < examples else 0)
    partition.prepare(DataLoader(TensorDataset(torch.arange(examples)), batch_size=2), seed=5)
    order = np.random.default_rng(seed_for(5, "partition")).permutation(examples)
    theirs = IidPartitioner(clients)
    theirs.dataset = HFDataset.from_dict({"index": order})
    for client in range(clients):
        assert partition.size_of(client) == len(partition.split(client)[0])
        assert partition.indices(client).tolist() == sorted(theirs.load_partition(client)["index"])
    assert partition.sizes() == [len(partition.split(client)[0]) for client in range(clients)]

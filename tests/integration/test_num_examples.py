"""What a client counts: the examples that its loaders yield in an epoch, which is what its results weigh."""

from __future__ import annotations

import itertools
import warnings
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, FederatedCallback, History, Partition
from lightning_fed.errors import ClientError
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import sweep
from tests.references import weighted_mean

DATA = toy_data(100)
X, Y = DATA.tensors


class Any(ToyModule):
    """Finds inputs and labels in a batch of any form."""

    def training_step(self, batch, batch_idx):
        x, y = tensors(batch)
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, batch_size=len(y))
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = tensors(batch)
        self.log("val_loss", nn.functional.cross_entropy(self(x), y), batch_size=len(y))


class Blind(ToyModule):
    """Looks at no batch."""

    def training_step(self, batch, batch_idx):
        return self(X[:2]).mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", 1.0, batch_size=1)


def tensors(batch):
    """The last two tensors of a batch."""
    found = []

    def look(part):
        if isinstance(part, (torch.Tensor, np.ndarray)):
            found.append(torch.as_tensor(part))
        elif isinstance(part, (dict, UserDict)):
            for value in part.values():
                look(value)
        elif isinstance(part, (list, tuple)):
            for value in part:
                look(value)
        elif hasattr(part, "x"):
            look([part.x, part.y])

    look(batch)
    return (found[-2], found[-1]) if found else (X[:1], Y[:1])


def counted(*loaders, module=Any, stage="train", rounds=1, **options) -> list[float]:
    """Each client's ``num_examples`` of the last round."""
    history = History(per_client=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [ClientData(list(loaders)), history, *options.pop("callbacks", [])]
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=callbacks, accelerator="cpu", **{**quiet, **options})
    trainer.fit(module())
    return [row["num_examples"] for row in history.clients if (row["stage"], row["round"]) == (stage, rounds)]


# ------------------------------------------------------------------------------------------------- by lengths


class Halves(Sampler):
    """A batch sampler of batches that are not alike."""

    def __iter__(self):
        yield from [list(range(9)), list(range(9, 12)), [12]]

    def __len__(self):
        return 3


class Unknown(Sampler):
    """A sampler that does not say how many it takes."""

    def __iter__(self):
        return iter(range(13))


class Twice(DataLoader):
    """A loader that gives each batch twice."""

    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            yield batch

    def __len__(self):
        return 2 * super().__len__()


class Batches:
    """Batches, ready made."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __iter__(self):
        return iter([[X[:size], Y[:size]] for size in self.sizes])

    def __len__(self):
        return len(self.sizes)


def only(count):
    return RandomSampler(DATA, replacement=True, num_samples=count)


LOADERS = {
    "whole": (lambda: DataLoader(DATA, 8), 100),
    "subset": (lambda: DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(10))), 10),
    "weighted, fewer": (lambda: DataLoader(DATA, 8, sampler=WeightedRandomSampler([1.0] * 100, 30)), 30),
    "weighted, more": (lambda: DataLoader(DATA, 32, sampler=WeightedRandomSampler([1.0] * 100, 250)), 250),
    "random, fewer": (lambda: DataLoader(DATA, 8, sampler=only(11)), 11),
    "distributed": (lambda: DataLoader(DATA, 8, sampler=DistributedSampler(DATA, 4, 0)), 25),
    "drop_last": (lambda: DataLoader(DATA, 32, drop_last=True), 96),
    "sampler and drop_last": (lambda: DataLoader(DATA, 8, sampler=only(11), drop_last=True), 8),
    "batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(range(17)), 5, drop_last=True)),
        15,
    ),
    "batches as items": (
        lambda: DataLoader(DATA, sampler=BatchSampler(SequentialSampler(range(17)), 5, False), batch_size=None),
        17,
    ),
    "batch sampler of its own": (lambda: DataLoader(DATA, batch_sampler=Halves()), 13),
    "sampler without a length": (lambda: DataLoader(DATA, 8, sampler=Unknown()), 13),
    "loader of its own": (lambda: Twice(DATA, 40), 200),
    "batches": (lambda: Batches(7, 3), 10),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_client_counts_what_its_loader_yields_in_an_epoch(name):
    build, count = LOADERS[name]
    assert counted(build(), DataLoader(DATA, 50), local_epochs=2, rounds=2) == [count, 100]


@pytest.mark.parametrize("name", ["subset", "drop_last", "weighted, more", "batch sampler of its own"])
def test_weights_are_averaged_by_what_is_counted(name, quiet):
    build, count = LOADERS[name]

    def train(*loaders):
        torch.manual_seed(0)
        module = Any(lr=0.5)
        FederatedTrainer(max_rounds=1, seed=0, callbacks=[ClientData(list(loaders))], **quiet).fit(module)
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    # The client that shuffles stands first, for what is drawn depends on the client's number.
    both, first = train(build(), DataLoader(DATA, 50)), train(build())
    torch.manual_seed(0)
    second = Any(lr=0.5)
    optimizer = second.configure_optimizers()
    for x, y in DataLoader(DATA, 50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(second(x), y).backward()
        optimizer.step()
    expected = weighted_mean([first, dict(second.state_dict())], [count, 100])
    torch.testing.assert_close(both, expected)


@pytest.mark.parametrize(
    ("limit", "count"),
    [({"limit_train_batches": 2}, 16), ({"limit_train_batches": 0.5}, 48), ({"overfit_batches": 3}, 24)],
)
def test_batches_that_a_limit_leaves_out_are_not_counted(limit, count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of overfit_batches
        assert counted(DataLoader(DATA, 8, drop_last=True), Batches(*[8] * 12), **limit) == [count, count]


def test_local_steps_count_the_whole_epoch_where_its_length_is_known_and_what_came_where_not():
    assert counted(DataLoader(DATA, 8), DataLoader(DATA, batch_sampler=Halves()), local_steps=2) == [100, 12]
    assert counted(DataLoader(DATA, 40), DataLoader(DATA, batch_sampler=Halves()), local_steps=7) == [100, 13]


def test_a_datamodule_of_the_client_counts_by_the_same_rule():
    class Site(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(10)), drop_last=True)

        def val_dataloader(self):
            return DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(10)), drop_last=True)

    assert counted(Site(), Site()) == [8, 8]
    assert counted(Site(), Site(), stage="evaluate") == [8, 8]


@pytest.mark.parametrize(
    ("drop_last", "options"),
    sweep(itertools.product([False, True], [{}, {"limit_train_batches": 2}]), [(False, {"limit_train_batches": 2})]),
)
def test_clients_trained_as_one_count_as_clients_alone(options, drop_last):
    sizes = (17, 18, 23, 20)  # as many batches of 8 each
    pairs = [(DataLoader(toy_data(n), 8, drop_last=drop_last), DataLoader(toy_data(n + 8), 8)) for n in sizes]
    for stage in ("train", "evaluate"):
        alone = counted(*pairs, module=ToyModule, stage=stage, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "vectorize_clients")  # nobody falls back
            assert counted(*pairs, module=ToyModule, stage=stage, vectorize_clients=4, **options) == alone
        assert alone == (
            [n + 8 for n in sizes] if stage == "evaluate" else [16] * 4 if drop_last or options else [*sizes]
        )


@pytest.mark.parametrize("how", [{}, {"vectorize_clients": 3}])
def test_a_part_that_is_dealt_out_counts_by_the_same_rule(how, quiet):
    history = History(per_client=True)
    parts = Partition(3, val_fraction=0.2)
    trainer = FederatedTrainer(max_rounds=1, callbacks=[parts, history], **quiet, **how)
    trainer.fit(ToyModule(), DataLoader(toy_data(90), batch_size=10, drop_last=True))
    found = [(row["stage"], row["num_examples"]) for row in history.clients]
    assert found == [("train", 20)] * 3 + [("evaluate", 6)] * 3


# ------------------------------------------------------------------------------------------------- by what comes


class Stream(IterableDataset):
    """Examples without a length, one after the other."""

    def __init__(self, count, example):
        self.count, self.example = count, example

    def __iter__(self):
        return (self.example(i) for i in range(self.count))


def stream(count, example, batch_size=8, **options):
    return DataLoader(Stream(count, example), batch_size=batch_size, **options)


def as_user_dict(examples):
    return UserDict(input_ids=torch.stack([x for x, _ in examples]), labels=torch.stack([y for _, y in examples]))


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


def as_dataclass(examples):
    return Batch(torch.stack([x for x, _ in examples]), torch.stack([y for _, y in examples]))


STREAMS = {
    "pairs": stream(21, lambda i: DATA[i]),
    "user dict": stream(21, lambda i: DATA[i], collate_fn=as_user_dict),
    "dataclass": stream(21, lambda i: DATA[i], collate_fn=as_dataclass),
    "text first": stream(21, lambda i: (f"text {i}", *DATA[i])),
    "text by name": stream(21, lambda i: {"text": f"text {i}", "x": X[i], "y": Y[i]}),
    "text alone": stream(21, lambda i: f"text {i}"),
    "texts by name": stream(21, lambda i: {"question": f"q{i}", "answer": f"a{i}"}),
    "text and numbers": stream(21, lambda i: (f"text {i}", 1.0 * i), collate_fn=lambda b: tuple(zip(*b, strict=True))),
    "examples": stream(21, lambda i: {"text": f"text {i}", "id": i}, collate_fn=list),
    "arrays": stream(
        21, lambda i: (X[i].numpy(), Y[i].numpy()), collate_fn=lambda b: tuple(map(np.stack, zip(*b, strict=True)))
    ),
    "batches": stream(3, lambda i: [X[7 * i : 7 * i + 7], Y[7 * i : 7 * i + 7]], batch_size=None),
}


@pytest.mark.parametrize("name", STREAMS)
def test_what_a_stream_gave_is_counted_in_examples_and_never_in_batches(name):
    assert counted(STREAMS[name], local_epochs=2, rounds=2) == [21]


@pytest.mark.parametrize("name", STREAMS)
def test_what_a_client_evaluated_on_is_counted_where_it_has_no_length(name):
    assert counted((DataLoader(DATA, 8), STREAMS[name]), stage="evaluate") == [21]


def transposed(examples):
    return tuple(zip(*examples, strict=True))


# Images of 3 channels, each of its own size; lists of so many examples as the loader's batch size, but in the last.
IMAGES = {
    "lists of pictures and boxes": lambda n, size: stream(
        n, lambda i: (torch.zeros(3, 4 + i % 2, 4), {"boxes": torch.zeros(2, 4)}), size, collate_fn=transposed
    ),
    "a list of examples": lambda n, size: stream(
        n, lambda i: (torch.zeros(3, 4 + i % 2, 4), torch.zeros(2, 4)), size, collate_fn=list
    ),
    "something shared in front": lambda n, size: stream(
        n, lambda i: X[i], size, collate_fn=lambda b: (torch.zeros(1, 8), torch.stack(b), torch.zeros(len(b)))
    ),
    "several crops of each": lambda n, size: stream(
        n, lambda i: X[i], size, collate_fn=lambda b: (torch.cat(b * 3), torch.zeros(len(b)))
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_loaders_batch_size_tells_what_counts_where_the_first_tensor_is_something_else(name):
    make = IMAGES[name]
    assert counted(make(44, 8), make(20, 4), make(6, 3), module=Blind, rounds=2) == [44, 20, 6]
    clients = [(DataLoader(DATA, 8), make(n, size)) for n, size in ((44, 8), (20, 4), (6, 3))]
    assert counted(*clients, module=Blind, stage="evaluate") == [44, 20, 6]


def test_what_is_never_a_whole_batch_counts_as_before():
    wide = stream(20, lambda i: X[i], 4, collate_fn=lambda b: (torch.zeros(7, 8), torch.zeros(9)))
    batches = stream(3, lambda i: [X[:7], Y[:7]], 1, collate_fn=lambda b: [*b[0], ["one"]])
    assert counted(wide, batches, module=Blind) == [35, 21]


class Opaque:
    """A batch that nothing can be read of."""

    def __init__(self, examples):
        self.x, self.y = (torch.stack(part) for part in zip(*examples, strict=True))


def test_batch_that_tells_nothing_counts_the_loaders_batch_size_and_says_so():
    loader = stream(21, lambda i: DATA[i], collate_fn=Opaque)
    with pytest.warns(UserWarning, match=r"Opaque.*batch_size=8 for each.*the last.*fewer"):
        assert counted(loader) == [24]


def test_batch_that_nothing_tells_of_is_refused_with_the_way_out():
    loader = stream(2, lambda i: Opaque([DATA[2 * i], DATA[2 * i + 1]]), batch_size=None)
    with pytest.raises(ClientError, match=r"client 0 .*nothing tells how many examples.*Opaque.*tensor"):
        counted(loader)


PAIRS = {"a": DataLoader(toy_data(20), 8), "b": DataLoader(toy_data(12), 6)}


@pytest.mark.parametrize(
    ("loaders", "count"),
    [
        (PAIRS, 20),  # the first of each batch's parts, as Lightning weighs what is logged
        (CombinedLoader(PAIRS, "min_size"), 16),
        (CombinedLoader({"b": PAIRS["b"], "a": PAIRS["a"]}, "max_size"), 12 + 4),
        (CombinedLoader({"b": PAIRS["b"], "a": PAIRS["a"]}, "max_size_cycle"), 18),
    ],
)
def test_several_loaders_count_the_examples_of_their_batches(loaders, count):
    assert counted(loaders) == [count]


# ------------------------------------------------------------------------------------------------- evaluation


VALIDATION = {
    "tuple": ((DataLoader(toy_data(20), 8), DataLoader(toy_data(12), 6)), 32),
    "list": ([DataLoader(toy_data(20), 8), DataLoader(toy_data(12), 6)], 32),
    "dict": ({"a": DataLoader(toy_data(20), 8), "b": DataLoader(toy_data(12), 6)}, 32),
    "list with a stream": ([DataLoader(toy_data(20), 8), stream(7, lambda i: DATA[i])], 27),
    "combined, sequential": (
        CombinedLoader([DataLoader(toy_data(20), 8), DataLoader(toy_data(12), 6)], "sequential"),
        32,
    ),
    "combined, side by side": (CombinedLoader(PAIRS, "max_size"), 20),
    "sampler": (DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(10))), 10),
}


@pytest.mark.parametrize("name", VALIDATION)
def test_a_clients_evaluation_over_any_loaders_has_its_metrics(name):
    loaders, count = VALIDATION[name]

    class Site(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(DATA, 50)

        def val_dataloader(self):
            return loaders

    class Seen(FederatedCallback):
        def on_round_end(self, trainer, round, metrics):
            self.names = set(metrics)

    seen = Seen()
    assert counted(Site(), stage="evaluate", callbacks=[seen]) == [count]
    assert any(key.startswith("clients/val_loss") for key in seen.names)


def test_a_datamodule_without_a_validation_loader_leaves_its_client_out_of_the_evaluation():
    class Site(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(DATA, 50)

    assert counted(Site(), (DataLoader(DATA, 50), DataLoader(toy_data(12), 6)), stage="evaluate") == [12]


def test_a_limit_of_validation_batches_counts_in_the_evaluation():
    val = [DataLoader(toy_data(20), 8), stream(30, lambda i: DATA[i])]
    assert counted((DataLoader(DATA, 8), val[0]), (DataLoader(DATA, 8), val[1]), fast_dev_run=2) == [16, 16]
    found = counted((DataLoader(DATA, 8), val[0]), (DataLoader(DATA, 8), val[1]), fast_dev_run=2, stage="evaluate")
    assert found == [16, 16]


def test_local_validation_is_not_counted_as_training():
    loaders = (stream(21, lambda i: DATA[i]), DataLoader(toy_data(12), 6))
    assert counted(loaders, local_validation=True) == [21]


# ------------------------------------------------------------------------------------------------- nothing to train on


class Empty(IterableDataset):
    def __iter__(self):
        return iter(())


class Dropping(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(toy_data(5), batch_size=8, drop_last=True)


DROPS = (
    r"client 0 has 5 training examples, fewer than batch_size=8, and drop_last=True leaves them out.*drop_last=False"
)


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (DataLoader(toy_data(5), batch_size=8, drop_last=True), {}, DROPS),
        (Dropping(), {}, DROPS),
        (DataLoader(toy_data(5), batch_size=8, drop_last=True), {"vectorize_clients": 2}, DROPS),
        (DataLoader(Empty()), {}, "client 0 has no training examples"),
        ([], {}, "client 0 has no training examples"),
        (DataLoader(DATA, 8), {"limit_train_batches": 0}, "client 0 has nothing to train on: limit_train_batches=0"),
    ],
)
def test_a_client_without_a_batch_is_an_error_with_the_way_out(loader, options, message):
    with pytest.raises(ClientError, match=message):
        counted(loader, DataLoader(DATA, 8), **options)


@pytest.mark.parametrize("options", [{}, {"vectorize_clients": 3}])
def test_a_client_without_a_batch_may_be_allowed_to_fail(options):
    class Failed(FederatedCallback):
        def on_client_error(self, trainer, round, stage, error):
            self.what = (stage, error.client)

    failed = Failed()
    loaders = [DataLoader(toy_data(n), batch_size=8, drop_last=True) for n in (24, 5, 24)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert counted(*loaders, callbacks=[failed, FaultTolerance(min_results=2)], module=ToyModule, **options) == [
            24,
            24,
        ]
    assert failed.what == ("train", 1)

"""What a client leaves behind when it fails, what is too large to be restored, and what its data code draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, random_split
from torchmetrics import MeanMetric

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, History, Partition
from lightning_fed.engines import Engine, InProcess, Processes
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.weights import read
from tests.helpers import QUIET, sweep


def loader(examples: int = 48) -> DataLoader:
    return DataLoader(toy_data(examples), 8, shuffle=True)


def built(kind: type[ToyModule]) -> Any:
    torch.manual_seed(0)
    return kind()


# -------------------------------------------------------------------------------------------------- clients that fail


class Dies(ToyModule):
    """Client 0 dies in its second step, with batches in its metric, attributes changed and a gradient at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.metric, self.scale = MeanMetric(), 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.scale *= 1.1
        loss = super().training_step((batch[0] * self.scale, batch[1]), batch_idx)
        self.metric(loss.detach())
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        if self.trainer.client_id == 0 and batch_idx == 1:
            loss.backward()
            raise OSError("no more disk")
        return loss


@pytest.mark.parametrize("tolerated", [True, False])
def test_a_client_that_dies_in_mid_step_leaves_nothing_to_the_next(tolerated: bool) -> None:
    ends = []
    for engine in (InProcess(), Processes(3, start_method="fork")):
        module, history = built(Dies), History()
        callbacks = [Partition(3), history, *([FaultTolerance(min_results=1, on_error="ignore")] if tolerated else [])]
        trainer = FederatedTrainer(max_rounds=2, seed=1, engine=engine, callbacks=callbacks, **QUIET)
        if tolerated:
            trainer.fit(module, loader())
        else:
            with pytest.raises(ClientError, match="Round 1, train: client 0 raised OSError: no more disk"):
                trainer.fit(module, loader())
        assert (module.scale, module.metric.update_count) == (1.0, 0)
        assert all(parameter.grad is None for parameter in module.parameters())
        ends.append((read(module), history.rows))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=0)
    assert ends[0][1] == ends[1][1]


class Grows(ToyModule):
    """A buffer of its state dict has more rows after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(1, 8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.queue = torch.cat([self.queue, batch[0].detach()])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("engine", [InProcess, lambda: Processes(2, start_method="fork")])
def test_a_buffer_that_grows_is_named_and_the_module_is_as_it_was(engine: Any) -> None:
    module = built(Grows)
    before = read(module)
    with pytest.raises(ClientError, match=r"client 0 sent 'queue' of shape \(17, 8\), the global model has \(1, 8\)"):
        FederatedTrainer(max_rounds=1, num_clients=3, engine=engine(), **QUIET).fit(module, loader())
    torch.testing.assert_close(read(module), before, rtol=0, atol=0)


class WritesIntoTheHuge(ToyModule):
    """Writes into a memory bank of 80 MB that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = torch.zeros(20 << 20)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.client_id == 1:
            self.bank[:8] += batch[0].mean(0)
        return super().training_step((batch[0] + self.bank[:8], batch[1]), batch_idx)


def test_what_is_too_large_to_be_copied_may_be_read_and_writing_is_refused_by_name() -> None:
    with pytest.raises(ClientError, match=r"client 1 wrote into module.bank \(80.0 MiB\).*clone"):
        FederatedTrainer(max_rounds=1, num_clients=3, **QUIET).fit(built(WritesIntoTheHuge), loader())
    FederatedTrainer(max_rounds=1, num_clients=1, **QUIET).fit(built(WritesIntoTheHuge), loader())


def test_after_such_a_write_no_client_trains_on_what_it_left() -> None:
    history, tolerant = History(per_client=True), FaultTolerance(min_results=1, on_error="ignore")
    trainer = FederatedTrainer(max_rounds=1, callbacks=[Partition(3), history, tolerant], **QUIET)
    trainer.fit(built(WritesIntoTheHuge), loader())
    assert [row["client"] for row in history.clients] == [0]


class WritesIntoItsExamples(Dataset):
    def __init__(self) -> None:
        self.x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index].mul_(1.01), 0  # a view: the classic mistake of an augmentation


def test_a_data_set_that_writes_into_its_examples_is_named() -> None:
    with pytest.raises(ClientError, match=r"client 0 wrote into loader.dataset.dataset.x \(0.1 MiB\)"):
        FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).fit(
            built(ToyModule), DataLoader(WritesIntoItsExamples(), 64)
        )


class Stream(IterableDataset):
    """Reads on where it was."""

    def __init__(self) -> None:
        self.examples = iter([toy_data(64)[i] for i in range(64)])

    def __iter__(self) -> Iterator[Any]:
        return (next(self.examples) for _ in range(8))


def test_an_iterator_that_clients_take_from_is_named_once() -> None:
    shared = Stream()
    data = ClientData(lambda client: DataLoader(shared, 4), num_clients=2)
    with pytest.warns(UserWarning, match=r"loader.dataset.examples: what a client takes from an iterator") as said:
        FederatedTrainer(max_rounds=2, callbacks=[data], **QUIET).fit(built(ToyModule))
    assert len([one for one in said if "takes from an iterator" in str(one.message)]) == 1


class ManyObjects(ToyModule):
    """Changes an object among more than are looked at, and holds long lists in which nothing can change."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.labels = [str(i) for i in range(20_000)], {f"w{i}" for i in range(9)}
        self.memory = [[0] for _ in range(20_000)]
        self.chosen = {torch.nn.Identity()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.memory[7].append(1)
        return super().training_step(batch, batch_idx)


def test_what_is_not_looked_at_is_named_once() -> None:
    with pytest.warns(UserWarning, match="is not looked at") as said:
        FederatedTrainer(max_rounds=2, num_clients=3, **QUIET).fit(built(ManyObjects), loader())
    (one,) = [str(one.message) for one in said if "is not looked at" in str(one.message)]
    assert one.startswith("module.memory, module.chosen: ")


def test_scripted_layers_train() -> None:
    ends = []
    for engine in (InProcess(), Processes(2, start_method="fork")):
        module = built(ToyModule)
        module.net = torch.jit.script(module.net)
        before = read(module)
        FederatedTrainer(max_rounds=2, num_clients=3, engine=engine, **QUIET).fit(module, loader())
        ends.append(read(module))
        assert not torch.equal(before["net.0.weight"], ends[-1]["net.0.weight"])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_scripted_layers_cannot_be_sent_and_are_named() -> None:
    module = built(ToyModule)
    module.net = torch.jit.script(module.net)
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, engine=Processes(start_method="forkserver"), **QUIET)
    with pytest.raises(ConfigurationError, match=r"module.\w+ cannot be pickled: .*start_method='fork'"):
        trainer.fit(module, loader())


# ------------------------------------------------------------------------------------------------ what data code draws

SEEN: dict[str, dict[int, set[float]]] = {"train": {}, "val": {}}


class Notes(ToyModule):
    """Notes which examples it trains and validates on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        SEEN["train"].setdefault(self.trainer.client_id, set()).update(batch[0][:, 0].tolist())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        SEEN["val"].setdefault(self.trainer.client_id, set()).update(batch[0][:, 0].tolist())
        super().validation_step(batch, batch_idx)


class Splits(LightningDataModule):
    """Splits at random in ``setup``, or in each of its loaders."""

    def __init__(self, seed: int, late: bool) -> None:
        super().__init__()
        self.data, self.late = toy_data(30, seed=seed), late

    def setup(self, stage: str) -> None:
        self.parts = random_split(self.data, [0.7, 0.3])

    def _parts(self) -> Any:
        return random_split(self.data, [0.7, 0.3]) if self.late else self.parts

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self._parts()[0], 8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self._parts()[1], 8)


def _pair(client: int) -> Any:
    train, val = random_split(toy_data(30, seed=client), [0.7, 0.3])
    return DataLoader(train, 8, shuffle=True), DataLoader(val, 8)


SPLITS: dict[str, Any] = {
    "a function": lambda: ClientData(_pair, num_clients=2),
    "a datamodule's setup": lambda: ClientData([Splits(0, False), Splits(1, False)]),
    "a function that makes datamodules": lambda: ClientData(lambda client: Splits(client, False), num_clients=2),
    "a datamodule's loaders": lambda: ClientData([Splits(0, True), Splits(1, True)]),
}


@pytest.mark.parametrize("reload", [0, 1])
@pytest.mark.parametrize("how", sweep(SPLITS, ["a function", "a datamodule's setup"]))
def test_what_is_held_out_at_random_is_never_trained_on(how: str, reload: int) -> None:
    for part in SEEN.values():
        part.clear()
    FederatedTrainer(
        max_rounds=3,
        local_epochs=2,
        callbacks=[SPLITS[how]()],
        reload_dataloaders_every_n_epochs=reload,
        **QUIET,
    ).fit(built(Notes))
    for client in (0, 1):
        assert len(SEEN["train"][client]) == 21
        assert len(SEEN["val"][client]) == 9
        assert not SEEN["train"][client] & SEEN["val"][client]


class SharedSplit(LightningDataModule):
    """The train set of all clients, chosen at random whenever the loader is asked for."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(random_split(toy_data(60), [0.5, 0.5])[0], 8, shuffle=True)


@pytest.mark.parametrize("workers", sweep([1, 2, 3], [2]))
def test_a_loader_that_is_opened_anew_is_the_same_in_all_processes(workers: int) -> None:
    def run(engine: Engine) -> Any:
        module = built(ToyModule)
        trainer = FederatedTrainer(
            max_rounds=4, num_clients=3, engine=engine, reload_dataloaders_every_n_epochs=2, **QUIET
        )
        trainer.fit(module, datamodule=SharedSplit())
        return read(module)

    torch.testing.assert_close(run(InProcess()), run(Processes(workers, start_method="fork")), rtol=0, atol=0)

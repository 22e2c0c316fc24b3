"""What goes wrong ends in an error that says where, what the rule is and the way out; nothing is half-saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_fed import (
    ClientError,
    ConfigurationError,
    FederatedTrainer,
    InvalidUpdateError,
    RoundError,
)
from lightning_fed.callbacks import (
    ClientData,
    FaultTolerance,
    FedAdam,
    FedAvg,
    FederatedCallback,
    History,
    PartialParticipation,
    Partition,
)
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET, sweep


def loader(examples: int = 48) -> DataLoader[Any]:
    return DataLoader(toy_data(examples), batch_size=8, shuffle=True)


def state(module: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def assert_same(module: nn.Module, before: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before, strict=True))


class At(L.Callback):
    """Does something on one client in one round."""

    def __init__(self, client: int, round: int, act: Callable[[L.LightningModule], None]) -> None:
        self.client, self.round, self.act = client, round, act

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if (trainer.client_id, trainer.current_round) == (self.client, self.round):
            self.act(pl_module)


def explode(module: L.LightningModule) -> None:
    raise ValueError("boom")


def poison(module: L.LightningModule) -> None:
    with torch.no_grad():
        module.net[0].weight[0, 0] = float("nan")


class RunsOut(ToyModule):
    """Reads a second iterator, which in the second round has nothing left."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook

    def take(self, hook: str) -> None:
        if hook == self.hook and (self.trainer.client_id, self.trainer.current_round) == (1, 2):
            next(iter([]))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.take("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.take("validation_step")
        super().validation_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.take("on_train_batch_start")

    def on_train_epoch_start(self) -> None:
        self.take("on_train_epoch_start")

    def on_train_epoch_end(self) -> None:
        self.take("on_train_epoch_end")

    def on_validation_epoch_end(self) -> None:
        self.take("on_validation_epoch_end")


class RunsOutByHand(RunsOut):
    def __init__(self, hook: str) -> None:
        super().__init__(hook)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


class Bare(BaseException):
    pass


@pytest.mark.parametrize("kind", sweep([KeyboardInterrupt, SystemExit, Bare], [KeyboardInterrupt]))
def test_what_is_no_exception_is_its_clients_error_in_a_worker_too(kind: type[BaseException]) -> None:
    class Stops(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if (self.trainer.client_id, self.trainer.current_round) == (1, 2):
                raise kind("enough")
            return super().training_step(batch, batch_idx)

    options: dict[str, Any] = {"max_rounds": 3, "engine": Processes(2, start_method="fork"), **QUIET}
    with pytest.raises(ClientError, match=rf"Round 2, train: client 1 raised .*{kind.__name__}") as told:
        FederatedTrainer(callbacks=[unequal()], **options).fit(Stops())
    assert 'raise kind("enough")' in str(told.value)
    trainer = FederatedTrainer(callbacks=[unequal(), FaultTolerance(min_results=2)], **options)
    trainer.fit(Stops())
    assert trainer.current_epoch == 3


def unequal() -> ClientData:
    return ClientData([(DataLoader(toy_data(n), 8), DataLoader(toy_data(9, seed=1), 8)) for n in (11, 30, 20)])


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"engine": Processes(2, start_method="fork")}],
    ids=["alone", "accumulated", "processes"],
)
@pytest.mark.parametrize(
    ("build", "hook"),
    [
        (RunsOut, "training_step"),
        (RunsOut, "on_train_batch_start"),
        (RunsOut, "validation_step"),
        (RunsOutByHand, "training_step"),
    ],
)
def test_a_stop_iteration_of_the_users_is_an_error_and_not_the_end_of_the_data(
    build: Any, hook: str, options: Any
) -> None:
    if build is RunsOutByHand and "accumulate_grad_batches" in options:
        return
    with pytest.raises(
        ClientError, match=r"Round 2, .*client 1 raised RuntimeError: StopIteration: an iterator"
    ) as told:
        FederatedTrainer(max_rounds=3, callbacks=[unequal()], **QUIET, **options).fit(build(hook))
    assert "next(iter([]))" in str(told.value)
    failed: list[int] = []

    class Notes(FederatedCallback):
        def on_client_error(self, trainer: Any, round: int, stage: Any, error: ClientError) -> None:
            failed.append(error.client)

    callbacks = [unequal(), FaultTolerance(min_results=1), Notes()]
    FederatedTrainer(max_rounds=3, callbacks=callbacks, **QUIET, **options).fit(build(hook))
    assert failed == [1]


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end", "on_validation_epoch_end"])
@pytest.mark.parametrize("options", [{}, {"local_validation": True}])
def test_a_stop_iteration_between_epochs_is_an_error_too(hook: str, options: Any) -> None:
    with pytest.raises(ClientError, match=r"client 1 raised .*StopIteration"):
        FederatedTrainer(max_rounds=3, callbacks=[unequal()], **QUIET, **options).fit(RunsOut(hook))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_hook_that_ends_the_epoch_and_a_step_that_takes_its_batches_still_end_it(accumulate: int) -> None:
    steps: list[int] = []

    class Ends(ToyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 1 else None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    class Takes(ToyModule):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, batch_idx, _ = next(dataloader_iter)
            steps.append(batch_idx)
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    options = {"accumulate_grad_batches": accumulate, **QUIET}
    FederatedTrainer(max_rounds=1, callbacks=[unequal()], **options).fit(Ends())
    assert steps == [0, 0, 0]
    steps.clear()
    FederatedTrainer(max_rounds=1, callbacks=[unequal()], **options).fit(Takes())
    assert steps == [0, 1, *range(4), *range(3)]


def test_a_client_that_raises_stops_the_run_with_client_round_and_traceback(tmp_path: Path) -> None:
    module = ToyModule()
    weights = {}

    class Keep(FederatedCallback):
        def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Any) -> None:
            weights[round] = state(module)

    checkpoint = ModelCheckpoint(tmp_path, save_last=True, filename="{epoch}", save_top_k=-1)
    arguments: dict[str, Any] = {**QUIET, "enable_checkpointing": True}
    trainer = FederatedTrainer(
        max_rounds=4, num_clients=3, client_callbacks=[At(1, 3, explode)], callbacks=[Keep(), checkpoint], **arguments
    )
    with pytest.raises(ClientError, match=r"Round 3, train: client 1 raised ValueError: boom") as caught:
        trainer.fit(module, loader())
    error = caught.value
    assert (error.round, error.client, error.stage) == (3, 1, "train")
    assert 'raise ValueError("boom")' in str(error)
    assert isinstance(error.__cause__, ValueError)
    assert type(module) is ToyModule
    assert_same(module, weights[3])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 1


def test_a_client_that_sends_nan_is_named_with_its_tensor() -> None:
    module = ToyModule()
    trainer = FederatedTrainer(max_rounds=2, num_clients=3, client_callbacks=[At(2, 1, poison)], **QUIET)
    before = state(module)
    with pytest.raises(InvalidUpdateError, match=r"Round 1, train: client 2 sent 'net.0.weight' with NaN") as caught:
        trainer.fit(module, loader())
    assert caught.value.tensor == "net.0.weight"
    assert_same(module, before)


class Wire(FederatedCallback):
    """Changes what client 1 sends."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def client_mods(self, stage: str) -> Any:
        def mod(message: Any, context: Any, call_next: Any) -> Any:
            reply = call_next(message, context)
            if context.node_config["partition-id"] == 1 and stage == "train":
                self.change(reply)
            return reply

        return [mod]


def wrong_shape(reply: Any) -> None:
    import numpy as np
    from flwr.app import Array

    reply.content["arrays"]["net.0.weight"] = Array(np.zeros((8, 9), dtype=np.float32))


def drop(reply: Any) -> None:
    del reply.content["arrays"]["net.2.bias"]


def add(reply: Any) -> None:
    reply.content["arrays"]["extra"] = reply.content["arrays"]["net.2.bias"]


def no_examples(reply: Any) -> None:
    reply.content["metrics"]["num-examples"] = 0


@pytest.mark.parametrize(
    ("change", "text", "tensor"),
    [
        (
            wrong_shape,
            r"client 1 sent 'net.0.weight' of shape \(8, 9\), the global model has \(8, 8\). Every client",
            "net.0.weight",
        ),
        (drop, r"client 1 sent no 'net.2.bias'. Every client must build the same module", "net.2.bias"),
        (add, r"client 1 sent 'extra', which the global model does not have", "extra"),
        (no_examples, r"client 1 reports 0 examples; it cannot be averaged", None),
    ],
    ids=["shape", "missing", "unknown", "no examples"],
)
def test_a_bad_update_is_named(change: Callable[[Any], None], text: str, tensor: str | None) -> None:
    trainer = FederatedTrainer(max_rounds=1, num_clients=3, callbacks=[Wire(change)], **QUIET)
    with pytest.raises(ClientError, match=text) as caught:
        trainer.fit(ToyModule(), loader())
    assert caught.value.tensor == tensor


def test_fault_tolerance_goes_on_without_the_failed_clients() -> None:
    history, errors = History(per_client=True), []
    trainer = FederatedTrainer(
        max_rounds=2,
        num_clients=3,
        client_callbacks=[At(2, 1, poison), At(0, 2, explode)],
        callbacks=[FaultTolerance(min_results=2, on_error=errors.append), history],
        **QUIET,
    )
    module = ToyModule()
    trainer.fit(module, loader())
    assert [(error.round, error.client) for error in errors] == [(1, 2), (2, 0)]
    assert [(row["round"], row["client"]) for row in history.clients] == [(1, 0), (1, 1), (2, 1), (2, 2)]
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_a_round_with_too_few_good_replies_is_an_error() -> None:
    module = ToyModule()
    before = state(module)
    trainer = FederatedTrainer(
        max_rounds=2,
        num_clients=3,
        client_callbacks=[At(0, 1, explode), At(2, 1, explode)],
        callbacks=[FaultTolerance(min_results=2, on_error="ignore")],
        **QUIET,
    )
    with pytest.raises(RoundError, match=r"Round 1: 1 of 3 clients gave a good train reply, and 2 are needed"):
        trainer.fit(module, loader())
    assert_same(module, before)


def test_all_clients_failing_is_an_error_whatever_is_tolerated() -> None:
    trainer = FederatedTrainer(
        max_rounds=1,
        num_clients=2,
        client_callbacks=[At(0, 1, explode), At(1, 1, explode)],
        callbacks=[FaultTolerance(min_results=1, on_error="ignore")],
        **QUIET,
    )
    with pytest.raises(RoundError, match=r"0 of 2 clients gave a good train reply"):
        trainer.fit(ToyModule(), loader())


def test_a_client_without_examples() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)), batch_size=4)
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData([loader(), empty])], **QUIET)
    with pytest.raises(ClientError, match=r"client 1 has no training examples.*FaultTolerance"):
        trainer.fit(ToyModule())


def test_ctrl_c_in_a_client_is_ctrl_c(tmp_path: Path) -> None:
    import signal

    def interrupt(module: L.LightningModule) -> None:
        raise KeyboardInterrupt

    seen: list[BaseException] = []

    class Watch(L.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.append(exception)

    before, module = signal.getsignal(signal.SIGINT), ToyModule()
    weights = state(module)
    trainer = FederatedTrainer(
        max_rounds=2, num_clients=2, client_callbacks=[At(1, 1, interrupt)], callbacks=[Watch()], **QUIET
    )
    try:
        with pytest.raises(SystemExit):
            trainer.fit(module, loader())
    finally:
        handler = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
    # Lightning itself leaves Ctrl-C ignored on its way out; a plain Trainer does the same.
    assert handler in (before, signal.SIG_IGN)
    assert [type(exception) for exception in seen] == [KeyboardInterrupt]
    assert trainer.interrupted
    assert_same(module, weights)


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({"max_epochs": 10}, ["max_epochs=10 is not for a FederatedTrainer", "write max_rounds=10"]),
        ({"max_steps": 7}, ["max_steps=7", "local_steps=7"]),
        ({"strategy": "ddp"}, ["strategy='ddp'", "choose an engine="]),
        ({"num_nodes": 2}, ["num_nodes=2"]),
        ({"val_check_interval": 0.25}, ["val_check_interval=0.25", "check_val_every_n_epoch"]),
        ({"max_rounds": None}, ["max_rounds=10"]),
        ({"num_clients": None}, [r"num_clients=10", "Partition", "ClientData"]),
        ({"num_clients": 0}, ["num_clients=0 must be at least 1"]),
        ({"local_epochs": 0}, ["local_epochs=0 must be at least 1"]),
        ({"local_epochs": 1, "local_steps": 5}, ["contradict"]),
        ({"engine": "warp"}, ["engine='warp' is unknown", "in_process"]),
        ({"client_state": "keep"}, ["client_state='keep'", "carry"]),
        ({"callbacks": [FedAvg(), FedAdam()]}, ["FedAvg and FedAdam both decide the aggregation"]),
        (
            {"num_clients": None, "callbacks": [Partition(2), ClientData([[1], [2]])]},
            ["Partition and ClientData both decide the partition"],
        ),
        ({"callbacks": [PartialParticipation(), PartialParticipation()]}, ["both decide the cohort"]),
        ({"callbacks": [Partition(2)]}, ["num_clients=3 is short for an IID Partition", "leave num_clients out"]),
        ({"callbacks": [StochasticWeightAveraging(swa_lrs=0.1)]}, ["StochasticWeightAveraging replaces"]),
        ({"client_callbacks": [StochasticWeightAveraging(swa_lrs=0.1)]}, ["StochasticWeightAveraging replaces"]),
        (
            {"callbacks": [GradientAccumulationScheduler({0: 2})]},
            ["GradientAccumulationScheduler acts on training", "client_callbacks="],
        ),
        ({"callbacks": [BackboneFinetuning()]}, ["client_callbacks=[BackboneFinetuning"]),
        ({"client_callbacks": [FedAvg()]}, ["FedAvg is a federated callback: write callbacks="]),
    ],
    ids=lambda value: re.sub(r" object at 0x\w+", "", str(value)),
)
def test_arguments_that_cannot_be_are_refused_with_what_to_write(arguments: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        FederatedTrainer(**{"max_rounds": 2, "num_clients": 3, **QUIET, **arguments})
    for text in texts:
        assert text in str(caught.value)


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(ConfigurationError) as caught:
        FederatedTrainer(max_epochs=3, strategy="ddp", engine="warp", local_epochs=0, **QUIET)
    assert str(caught.value).count("\n  - ") == 6


@pytest.mark.parametrize("name", ["min_train_clients", "min_available_clients"])
def test_more_minimum_clients_than_there_are(name: str) -> None:
    trainer = FederatedTrainer(max_rounds=1, num_clients=3, callbacks=[PartialParticipation(**{name: 4})], **QUIET)
    with pytest.raises(ConfigurationError, match=rf"PartialParticipation\({name}=4\) asks for more clients than there"):
        trainer.fit(ToyModule(), loader())


def test_more_results_than_clients_train() -> None:
    trainer = FederatedTrainer(max_rounds=1, num_clients=3, callbacks=[FaultTolerance(min_results=4)], **QUIET)
    with pytest.raises(ConfigurationError, match=r"min_results=4\) can never be met: 3 clients train"):
        trainer.fit(ToyModule(), loader())


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from toy_data(8)


class Sized(torch.utils.data.Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return toy_data(8)[index]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (DataLoader(Endless(), batch_size=4), r"Endless has no length.*ClientData"),
        (DataLoader(Sized(), batch_size=4, sampler=range(8)), r"Sized has no length.*ClientData"),
        (
            DataLoader(toy_data(8), sampler=WeightedRandomSampler([1.0] * 8, 8)),
            r"WeightedRandomSampler was made for the whole dataset",
        ),
        ([loader(), loader()], r"Partition deals out one DataLoader; the training data is a list"),
        (None, r"fit\(\) got no training data to deal out"),
    ],
    ids=["iterable", "no length", "sampler", "two loaders", "none"],
)
def test_data_that_cannot_be_dealt_out(data: Any, text: str) -> None:
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **QUIET)
    with pytest.raises(ConfigurationError, match=text):
        trainer.fit(ToyModule(), data)


def test_a_partitioner_whose_column_does_not_exist() -> None:
    trainer = FederatedTrainer(max_rounds=1, callbacks=[Partition(DirichletPartitioner(2, "kind", 1.0))], **QUIET)
    with pytest.raises(
        ConfigurationError, match=r"DirichletPartitioner\(partition_by='kind'\).*no column 'kind'; it has.*'label'"
    ):
        trainer.fit(ToyModule(), loader())


def test_a_dirichlet_that_finds_no_partition_says_the_two_ways_out() -> None:
    partition = Partition(DirichletPartitioner(20, "label", alpha=0.01, min_partition_size=2))
    trainer = FederatedTrainer(max_rounds=1, callbacks=[partition], **QUIET)
    with pytest.raises(ConfigurationError, match=r"larger alpha, or a smaller min_partition_size"), pytest.warns():
        trainer.fit(ToyModule(), loader())


def test_more_clients_than_examples() -> None:
    trainer = FederatedTrainer(max_rounds=1, callbacks=[Partition(IidPartitioner(100))], **QUIET)
    with pytest.raises(ConfigurationError, match=r"IidPartitioner cannot deal out 10 examples: 100 clients are too"):
        trainer.fit(ToyModule(), loader(10))


class Lazy(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))


def test_a_lazy_layer_that_no_batch_has_materialised() -> None:
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **QUIET)
    with pytest.raises(ConfigurationError, match=r"Lazy.net.0.weight is lazy.*Run one batch"):
        trainer.fit(Lazy(), loader())
    module = Lazy()
    module(torch.zeros(1, 8))
    FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).fit(module, loader())


class Plateau(ToyModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_a_scheduler_that_monitors_what_clients_do_not_log() -> None:
    trainer = FederatedTrainer(max_rounds=1, callbacks=[Partition(2, val_fraction=0.2)], **QUIET)
    with pytest.raises(
        ConfigurationError,
        match=r"A client has a ReduceLROnPlateau that monitors 'val_loss'.*local_validation=True.*\['train_loss'\]",
    ):
        trainer.fit(Plateau(), loader(), loader())
    trainer = FederatedTrainer(max_rounds=1, local_validation=True, callbacks=[Partition(2, val_fraction=0.2)], **QUIET)
    trainer.fit(Plateau(), loader(), loader())


def test_a_client_that_fails_in_evaluation_says_so() -> None:
    class Bad(ToyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if hasattr(self.trainer, "client_id"):
                raise LookupError("no such thing")

    trainer = FederatedTrainer(max_rounds=1, callbacks=[Partition(2, val_fraction=0.2)], **QUIET)
    module = Bad()
    before = state(module)
    with pytest.raises(ClientError, match=r"Round 1, evaluate: client 0 raised LookupError: 'no such thing'|no such"):
        trainer.fit(module, loader(), loader())
    assert_same(module, before)

"""Modules of every kind train federated, unchanged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FedAdam, History, Partition
from lightning_fed.seeding import seed_all, seed_for
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET, real_data
from tests.integration.modules import (
    GAN,
    Closure,
    CompiledInside,
    Dropping,
    Late,
    Measured,
    ResNet,
    Scheduled,
    Tied,
    Transfers,
    federated,
    moved,
    weights,
)


def test_a_gan_with_manual_optimization_and_two_optimizers() -> None:
    torch.manual_seed(0)
    module = GAN()
    before = weights(module)
    trainer = federated(module)
    assert moved(module, before) == set(before)
    assert {"loss_d", "loss_g"} <= set(trainer.callback_metrics)
    assert not module.automatic_optimization
    assert trainer.global_step == 2


class Rates(L.Callback):
    """Collects the learning rate that each local epoch starts with."""

    seen: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("kind", "second"), [("epoch", [0.05] * 3), ("step", [0.1 * 0.5**n for n in (2, 4, 6)]), ("plateau", [0.01] * 3)]
)
def test_schedulers_step_in_local_training(kind: str, second: list[float]) -> None:
    Rates.seen = []
    federated(Scheduled(kind), rounds=1, local_epochs=3, client_callbacks=[Rates()])
    assert Rates.seen[0::3] == [0.1] * 3
    assert Rates.seen[1::3] == pytest.approx(second)
    if kind == "plateau":  # no epoch is good enough for its threshold
        assert Rates.seen[2::3] == pytest.approx([0.001] * 3)


def test_resnet18_keeps_its_integer_buffers() -> None:
    torch.manual_seed(0)
    module = ResNet()
    data = TensorDataset(torch.randn(50, 3, 32, 32), torch.randint(0, 2, (50,)))
    federated(module, data=data, rounds=1, limit_val_batches=0)
    counter = module.net.bn1.num_batches_tracked
    # 6, 14 and 22 examples in batches of 4: 2, 4 and 6 steps, weighted by examples.
    assert counter.dtype == torch.int64
    assert counter.item() == round((6 * 2 + 14 * 4 + 22 * 6) / 42)
    assert module.net.bn1.running_mean.abs().sum() > 0


def test_dropout_draws_from_each_clients_own_seed() -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        module = Dropping()
        federated(module, seed=seed)
        results.append(weights(module))
    assert not moved_between(results[0], results[1])
    assert moved_between(results[0], results[2])


def moved_between(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", [(), (FedAdam(learning_rate=0.01),)], ids=["FedAvg", "FedAdam"])
def test_tied_weights_stay_tied(method: Any) -> None:
    module = Tied()
    before = weights(module)
    federated(module, callbacks=method)
    assert module.net[2].weight is module.net[0].weight
    state = module.state_dict()
    assert torch.equal(state["net.2.weight"], state["net.0.weight"])
    assert "net.0.weight" in moved(module, before)


def test_frozen_layers_do_not_move() -> None:
    module = ToyModule()
    module.net[0].requires_grad_(False)
    before = weights(module)
    federated(module, callbacks=[FedAdam()])
    assert moved(module, before) == {"net.2.weight", "net.2.bias"}
    assert not module.net[0].weight.requires_grad


def test_bf16_weights_stay_bf16_and_their_mean_is_exact() -> None:
    module = ToyModule().to(torch.bfloat16)
    before = weights(module)
    data = TensorDataset(toy_data(50).tensors[0].bfloat16(), toy_data(50).tensors[1])
    federated(module, data=data)
    assert {value.dtype for value in module.state_dict().values()} == {torch.bfloat16}
    assert moved(module, before)


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_built_late_train(hook: str) -> None:
    module = Late(hook)
    trainer = federated(module, rounds=3)
    eager = ToyModule()
    seed_all(seed_for(0, "setup"))  # what a run draws in its set-up comes from its seed, too
    eager.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    federated(eager, rounds=3)
    assert trainer.global_step == 3
    torch.testing.assert_close(dict(module.state_dict()), dict(eager.state_dict()), rtol=0, atol=0)


def compiled_around(module: ToyModule, backend: Any) -> Any:
    return torch.compile(module, backend=backend)


def compiled_in_place(module: ToyModule, backend: Any) -> Any:
    module.compile(backend=backend)
    return module


@pytest.mark.landing  # the first thing that is compiled takes seconds; a module that is compiled inside is below
@pytest.mark.parametrize("wrap", [compiled_around, compiled_in_place], ids=["around", "module.compile()"])
def test_compiled_modules_train_as_the_plain_one(wrap: Callable[[ToyModule, Any], Any]) -> None:
    torch.manual_seed(0)
    plain = ToyModule()
    module = copy.deepcopy(plain)
    federated(plain)
    compiled_for_training = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled_for_training.append(torch.is_grad_enabled())
        return graph.forward

    trainer = federated(wrap(module, backend))
    torch.testing.assert_close(dict(module.state_dict()), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)
    assert trainer.callback_metrics["val_loss"] > 0
    assert True in compiled_for_training


def test_a_module_compiled_inside_trains_as_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = ToyModule()
    torch.manual_seed(0)
    module = CompiledInside()
    federated(plain)
    federated(module)
    for (_, a), (_, b) in zip(plain.named_parameters(), module.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_module_that_holds_a_closure_over_a_layer_trains_as_the_plain_one() -> None:
    torch.manual_seed(0)
    module = Closure()
    plain = ToyModule()
    plain.load_state_dict(module.state_dict())
    federated(module)
    federated(plain)
    torch.testing.assert_close(dict(module.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


class Doubled(ToyModule):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x * 2)


def test_batch_transfer_hooks_act_on_the_clients_and_in_validation() -> None:
    torch.manual_seed(0)
    module, plain = Transfers(), Doubled()
    plain.load_state_dict(module.state_dict())
    trainer = federated(module)
    other = federated(plain)
    torch.testing.assert_close(dict(module.state_dict()), dict(plain.state_dict()), rtol=1e-6, atol=1e-6)
    assert trainer.callback_metrics["val_loss"] == pytest.approx(other.callback_metrics["val_loss"].item(), rel=1e-5)


class Checkpointing(ToyModule):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def configure_callbacks(self) -> Any:
        return [L.pytorch.callbacks.ModelCheckpoint(self.folder, filename="{epoch}", save_top_k=-1)]


class PlainData(L.LightningDataModule):
    """Overrides no batch hook: the module's are in force."""

    def train_dataloader(self) -> Any:
        return DataLoader(toy_data(48), batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(toy_data(48), batch_size=16)


def test_a_modules_batch_transfer_hooks_act_beside_a_datamodule() -> None:
    torch.manual_seed(0)
    module, plain = Transfers(), Doubled()
    plain.load_state_dict(module.state_dict())
    losses = []
    for one in (module, plain):
        trainer = FederatedTrainer(max_rounds=2, num_clients=3, **QUIET)
        trainer.fit(one, datamodule=PlainData())
        losses.append(trainer.callback_metrics["val_loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_configure_callbacks_act_at_the_server_alone(tmp_path: Path) -> None:
    federated(Checkpointing(tmp_path), enable_checkpointing=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]


def test_metrics_logged_as_objects_in_both_steps() -> None:
    history = History()
    trainer = federated(Measured(), callbacks=[history])
    assert {"train_acc", "train_acc_epoch", "clients/val_acc", "val_acc"} <= set(history.names)
    assert 0 < trainer.callback_metrics["train_acc"] <= 1
    # Six held-out examples: a mean of accuracies could be anything, a count over six cannot.
    assert history["clients/val_acc"][-1] * 6 == pytest.approx(round(history["clients/val_acc"][-1] * 6))


class Pictures(L.LightningModule):
    """Takes batches that are dicts, as Hugging Face datasets give them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch["pixels"]), batch["label"])
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch["pixels"]), batch["label"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_hugging_face_dataset_of_dicts_with_a_transform() -> None:
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner
    from torchvision.transforms.functional import to_tensor

    decoded = []
    # datasets would look for a builder on a hub otherwise.
    table = datasets.Dataset.from_parquet(str(real_data("cifar10") / "test.parquet")).select(range(300))

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        decoded.extend(batch["label"])
        return {"pixels": [to_tensor(image) for image in batch["image"]], "label": batch["label"]}

    partition = Partition(DirichletPartitioner(3, "label", alpha=0.5, min_partition_size=5), val_fraction=0.2)
    module, history = Pictures(), History()
    trainer = FederatedTrainer(max_rounds=1, callbacks=[partition, history], **QUIET)
    loader = DataLoader(table.with_transform(transform), batch_size=16, shuffle=True)
    trainer.fit(module, loader)
    assert len(decoded) == 300  # each example once in training or held out, and none for dealing out
    assert sorted(i for client in range(3) for i in partition.indices(client)) == list(range(300))
    assert {"train_loss", "clients/val_loss"} <= set(history.names)


class LeavesOut(ToyModule):
    """Its state dict leaves the first layer out; the rest it gives as it is, or as copies under other names."""

    def __init__(self, copies: bool = False) -> None:
        super().__init__()
        self.copies, self.strict_loading = copies, False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        kept = {name: value for name, value in state.items() if not name.startswith("net.0")}
        return {f"my.{name}": value.clone() for name, value in kept.items()} if self.copies else kept

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        state_dict = {name.removeprefix("my."): value for name, value in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)


@pytest.mark.parametrize("copies", [False, True])
def test_what_trains_and_is_in_no_state_dict_is_said_once_by_name(copies: bool) -> None:
    def said(module: Any, **kwargs: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            federated(module, rounds=3, **kwargs)
        return [str(warning.message) for warning in caught if "leaves out what trains" in str(warning.message)]

    module = LeavesOut(copies)
    before = {name: value.clone() for name, value in module.named_parameters()}
    (words,) = said(module)
    assert words.startswith("net.0.weight, net.0.bias: LeavesOut.state_dict()")
    after = dict(module.named_parameters())
    assert {name for name in before if torch.equal(before[name], after[name])} == {"net.0.weight", "net.0.bias"}
    frozen = LeavesOut(copies)
    frozen.net[0].requires_grad_(False)
    assert said(frozen) == []
    assert said(ToyModule()) == []

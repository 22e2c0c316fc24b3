"""MONAI: transforms with random states of their own, cached data sets, dict batches of MetaTensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason='pip install "lightning_fed[compat]"')

from monai.data import CacheDataset, DataLoader, MetaTensor, create_test_image_2d, decollate_batch, list_data_collate
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.transforms import (
    AsDiscrete,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    ScaleIntensityd,
)

from lightning_fed.callbacks import ClientData, Partition
from tests.compat.runs import CLIENTS, ENGINES, Outcome, assert_same, moved, run, stopped_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Segmenter(L.LightningModule):
    """A U-Net as MONAI's tutorials with Lightning have it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet(2, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), norm="batch", dropout=0.1)
        self.loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
        self.post_pred = AsDiscrete(argmax=True, to_onehot=2)
        self.post_label = AsDiscrete(to_onehot=2)
        self.dice_metric = DiceMetric(include_background=False)
        self.validation_step_outputs: list[dict[str, Any]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), 1e-2)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        images, labels = batch["image"], batch["label"]
        assert isinstance(images, MetaTensor)
        loss = self.loss_function(self(images), labels)
        self.log("train_loss", loss.item())
        return {"loss": loss}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images, labels = batch["image"], batch["label"]
        outputs = sliding_window_inference(images, (16, 16), 4, self.forward)
        loss = self.loss_function(outputs, labels)
        predictions = [self.post_pred(i) for i in decollate_batch(outputs)]
        self.dice_metric(y_pred=predictions, y=[self.post_label(i) for i in decollate_batch(labels)])
        self.validation_step_outputs.append({"val_loss": loss, "val_number": len(predictions)})

    def on_validation_epoch_end(self) -> None:
        loss = sum(output["val_loss"].sum().item() for output in self.validation_step_outputs)
        self.log("val_loss", loss / sum(output["val_number"] for output in self.validation_step_outputs))
        self.log("val_dice", self.dice_metric.aggregate().item())
        self.dice_metric.reset()
        self.validation_step_outputs.clear()


class Scans(L.LightningDataModule):
    """Pictures in files, read by MONAI's transforms, cached up to the first random one.

    Args:
        folder: Where the files are.
        names: Those to train on.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        super().__init__()
        self.folder, self.names = folder, names

    def setup(self, stage: str) -> None:
        keys = ["image", "label"]
        read = [LoadImaged(keys), EnsureChannelFirstd(keys, channel_dim="no_channel"), ScaleIntensityd("image")]
        augment = [
            RandCropByPosNegLabeld(keys, label_key="label", spatial_size=(16, 16), num_samples=2),
            RandFlipd(keys, prob=0.5, spatial_axis=0),
            RandGaussianNoised("image", prob=0.8, std=0.3),
        ]
        self.train_ds = CacheDataset(self._files(self.names), Compose([*read, *augment]), progress=False)
        self.val_ds = CacheDataset(self._files(["val_0", "val_1"]), Compose(read), progress=False)

    def _files(self, names: list[str]) -> list[dict[str, Path]]:
        return [{key: self.folder / f"{name}_{key}.npy" for key in ("image", "label")} for name in names]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_ds, batch_size=2, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_ds, batch_size=1)


class TorchLoaders(Scans):
    """The same with PyTorch's own loader, which knows nothing of MONAI's random states."""

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.train_ds, batch_size=2, shuffle=True, collate_fn=list_data_collate)


NAMES = [f"train_{i}" for i in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with circles in them, and where these are."""
    directory = tmp_path_factory.mktemp("scans")
    for i, name in enumerate([*NAMES, "val_0", "val_1"]):
        state = np.random.RandomState(i)
        image, label = create_test_image_2d(32, 32, num_objs=3, rad_max=8, num_seg_classes=1, random_state=state)
        np.save(directory / f"{name}_image.npy", image)
        np.save(directory / f"{name}_label.npy", label)
    return directory


class Case:
    """Module, data and callbacks; who has the data is decided by a ``Partition``, or each client brings its own."""

    def __init__(self, folder: Path, data: type[Scans], own: bool) -> None:
        self.folder, self.data, self.own = folder, data, own

    def build(self) -> tuple[L.LightningModule, dict[str, Any]]:
        datamodule = {} if self.own else {"datamodule": self.data(self.folder, NAMES)}
        return Segmenter(), datamodule

    def callbacks(self) -> list[Any]:
        if self.own:
            return [ClientData([self.data(self.folder, NAMES[i::CLIENTS]) for i in range(CLIENTS)])]
        return [Partition(CLIENTS, val_fraction=0.34)]


CASES = {"MONAI's loaders": (Scans, False), "PyTorch's loaders": (TorchLoaders, False), "clients' own": (Scans, True)}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, folder: Path) -> Case:
    return Case(folder, *CASES[request.param])


@pytest.fixture(scope="module")
def expected(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that all others have to be like."""
    return run(case.build, tmp_path_factory.mktemp("expected"), *case.callbacks())


def test_it_trains(case: Case, expected: Outcome) -> None:
    parameters = {name for name, _ in Segmenter().named_parameters()}
    assert parameters <= moved(expected, case.build)
    assert expected.rows[-1]["train_loss"] < expected.rows[0]["train_loss"]
    assert "clients/val_dice" in expected.rows[0]
    assert case.own or 0 <= expected.rows[0]["val_dice"] <= 1


def test_another_seed_is_another_run(case: Case, expected: Outcome, tmp_path: Path) -> None:
    """What the tests below compare does depend on what is drawn."""
    with pytest.raises(AssertionError):
        assert_same(run(case.build, tmp_path, *case.callbacks(), seed=1), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_it_to_the_same_bits(case: Case, engine: str, expected: Outcome, tmp_path: Path) -> None:
    assert_same(run(case.build, tmp_path, *case.callbacks(), engine=ENGINES[engine]()), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_goes_on_to_the_same_bits(case: Case, engine: str, expected: Outcome, tmp_path: Path) -> None:
    checkpoint = stopped_run(case.build, tmp_path, *case.callbacks(), engine=ENGINES[engine]())
    resumed = run(case.build, tmp_path, *case.callbacks(), engine=ENGINES[engine](), ckpt_path=checkpoint)
    assert_same(resumed, expected)

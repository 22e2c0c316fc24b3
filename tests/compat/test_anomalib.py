"""anomalib: its own modules, whose callbacks come from configure_callbacks, and its own datamodule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("anomalib", reason='pip install "lightning_fed[compat]"')

from anomalib.data import Folder
from anomalib.metrics import AUROC, Evaluator
from anomalib.models import Fastflow, Ganomaly
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, RandomHorizontalFlip, Resize

from lightning_fed.callbacks import Partition
from tests.compat.runs import (
    CLIENTS,
    ENGINES,
    ROUNDS,
    Outcome,
    assert_same,
    moved,
    one_round_of_one_client,
    run,
    stopped_run,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Pictures are larger than what the modules are made for: their PreProcessor resizes them, on clients and server.
LARGE, SIZE = 40, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Striped pictures, and some with a spot where the stripes should be."""
    directory = tmp_path_factory.mktemp("surfaces")
    for name, count in (("good", 24), ("bad", 8)):
        (directory / name).mkdir()
        for i in range(count):
            state = np.random.RandomState(i)
            picture = np.tile(128 + 80 * np.sin(np.arange(LARGE) + state.rand()), (LARGE, 1))
            if name == "bad":
                row, column = state.randint(4, LARGE - 12, 2)
                picture[row : row + 8, column : column + 8] = 255
            noisy = np.clip(picture + state.randn(LARGE, LARGE) * 4, 0, 255).astype(np.uint8)
            Image.fromarray(np.stack([noisy] * 3, axis=-1)).save(directory / name / f"{i:02}.png")
    return directory


def pre_processor() -> PreProcessor:
    return PreProcessor(Compose([Resize((SIZE, SIZE)), Normalize([0.5] * 3, [0.3] * 3)]))


def evaluator() -> Evaluator:
    return Evaluator(val_metrics=[AUROC(fields=["pred_score", "gt_label"], prefix="image_")])


def ganomaly() -> L.LightningModule:
    """Two optimizers, stepped by hand."""
    return Ganomaly(
        batch_size=4, n_features=8, latent_vec_size=16, pre_processor=pre_processor(), evaluator=evaluator()
    )


def fastflow() -> L.LightningModule:
    """Flows over a frozen backbone whose BatchNorms are in evaluation mode."""
    return Fastflow(pre_trained=False, flow_steps=2, pre_processor=pre_processor(), evaluator=evaluator())


class Case:
    """A module of anomalib's, and pictures in a folder."""

    def __init__(self, folder: Path, module: Callable[[], L.LightningModule]) -> None:
        self.folder, self.module = folder, module

    def build(self) -> tuple[L.LightningModule, dict[str, Any]]:
        data = Folder(
            name="surfaces",
            root=self.folder,
            normal_dir="good",
            abnormal_dir="bad",
            train_batch_size=4,
            eval_batch_size=4,
            num_workers=0,
            train_augmentations=Compose([RandomHorizontalFlip()]),
        )
        return self.module(), {"datamodule": data}

    def callbacks(self) -> list[Any]:
        return [Partition(CLIENTS)]


@pytest.fixture(scope="module", params=[ganomaly, fastflow], ids=["GANomaly", "FastFlow"])
def case(request: pytest.FixtureRequest, folder: Path) -> Case:
    return Case(folder, request.param)


@pytest.fixture(scope="module")
def expected(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that all others have to be like."""
    return run(case.build, tmp_path_factory.mktemp("expected"), *case.callbacks())


def test_it_trains_and_its_callbacks_work(case: Case, expected: Outcome) -> None:
    changed = moved(expected, case.build)
    assert {name for name, parameter in case.module().named_parameters() if parameter.requires_grad} <= changed
    assert len(expected.rows) == ROUNDS
    # Evaluator and PostProcessor are callbacks that act at the server's validation.
    assert 0 <= expected.rows[-1]["image_AUROC"] <= 1
    assert not torch.isnan(expected.state["post_processor.image_min"])


def test_another_seed_is_another_run(case: Case, expected: Outcome, tmp_path: Path) -> None:
    """What the tests below compare does depend on what is drawn."""
    with pytest.raises(AssertionError):
        assert_same(run(case.build, tmp_path, *case.callbacks(), seed=1), expected)


def test_one_client_in_one_round_is_a_plain_trainer(case: Case, tmp_path: Path) -> None:
    ours, plain = one_round_of_one_client(case.build, tmp_path)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_it_to_the_same_bits(case: Case, engine: str, expected: Outcome, tmp_path: Path) -> None:
    assert_same(run(case.build, tmp_path, *case.callbacks(), engine=ENGINES[engine]()), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_goes_on_to_the_same_bits(case: Case, engine: str, expected: Outcome, tmp_path: Path) -> None:
    checkpoint = stopped_run(case.build, tmp_path, *case.callbacks(), engine=ENGINES[engine]())
    resumed = run(case.build, tmp_path, *case.callbacks(), engine=ENGINES[engine](), ckpt_path=checkpoint)
    assert_same(resumed, expected)

"""Metrics over clients: merged by state they equal the value over the pooled data; what cannot be merged is named."""

from dataclasses import dataclass

import pytest
import torch
import torchmetrics as tm
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.wrappers import BootStrapper, MinMaxMetric

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData
from lightning_fed.values import metrics
from lightning_fed.values.metric_states import is_mergeable
from lightning_fed.values.metrics import METRIC, MetricState, catch
from tests.helpers import QUIET, class_sorted, loaders, pooled

SIZES = (7, 53, 196)


class Logging(LightningModule):
    """Logs most kinds of metrics and scalars in its validation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 3)
        self.acc, self.f1 = MulticlassAccuracy(3, average="micro"), MulticlassF1Score(3, average="macro")
        self.inner = nn.ModuleDict({"precision": MulticlassPrecision(3, average="macro")})
        self.auroc_binned, self.auroc_exact = MulticlassAUROC(3, thresholds=50), MulticlassAUROC(3, thresholds=None)
        self.pearson, self.mean = tm.PearsonCorrCoef(), tm.MeanMetric()
        self.cat = tm.CatMetric()
        self.grouped = tm.MetricCollection({"g_p": MulticlassPrecision(3), "g_r": MulticlassRecall(3)})

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        scores = logits.softmax(1)
        for metric in (self.acc, self.f1, self.inner["precision"], self.auroc_binned, self.auroc_exact):
            metric.update(scores, y)
        self.pearson.update(logits[:, 0], y.float())
        self.mean.update(logits[:, 0])
        self.grouped.update(scores, y)
        for name in ("acc", "f1", "auroc_binned", "auroc_exact", "pearson", "mean"):
            self.log(name, getattr(self, name))
        self.log("precision", self.inner["precision"])
        self.log_dict(self.grouped)
        self.log("loss", nn.functional.cross_entropy(logits, y))
        self.log("both", nn.functional.cross_entropy(logits, y), on_step=True, on_epoch=True)
        self.log("max", logits.max(), reduce_fx="max")
        self.log("min", logits.min(), reduce_fx="min")
        self.log("sum", logits.sum(), reduce_fx="sum")
        self.log("count", float(len(y)), reduce_fx="sum")


class Catch(Callback):
    def on_validation_end(self, trainer, pl_module):
        self.states = catch(trainer, pl_module)


def validate(module: LightningModule, loader) -> tuple[list[MetricState], dict[str, float]]:
    callback = Catch()
    trainer = Trainer(**QUIET, callbacks=[callback])
    trainer.validate(module, loader, verbose=False)
    return callback.states, {k: float(v) for k, v in trainer.callback_metrics.items()}


@dataclass
class Result:
    """Clients' values merged, those that were averaged only, the value over the pooled data, each client's own."""

    merged: dict[str, float]
    averaged: list[str]
    pooled: dict[str, float]
    own: list[dict[str, float]]
    states: list[list[MetricState]]

    def mean(self, name: str, sizes: tuple[int, ...] = SIZES) -> float:
        return sum(n * own[name] for n, own in zip(sizes, self.own, strict=True)) / sum(sizes)


def over(module: LightningModule, parts: list[TensorDataset]) -> Result:
    states, own = zip(*(validate(module, loader) for loader in loaders(parts)), strict=True)
    merged, averaged, _ = metrics.merge([(len(p), s) for p, s in zip(parts, states, strict=True)], module)
    truth = validate(module, DataLoader(pooled(parts), batch_size=32))[1]
    return Result(merged, averaged, truth, list(own), list(states))


@pytest.fixture(scope="module")
def result():
    return over(Logging(), class_sorted(SIZES))


NAMES = ["acc", "f1", "precision", "auroc_binned", "auroc_exact", "pearson", "mean", "g_p", "g_r"]
SCALARS = ["loss", "both", "both_epoch", "max", "min", "sum", "count"]


@pytest.mark.parametrize("name", NAMES + SCALARS)
def test_merged_value_over_unequal_clients_is_the_value_over_the_pooled_data(result, name):
    assert result.merged[name] == pytest.approx(result.pooled[name], abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("name", ["f1", "auroc_exact", "pearson", "g_p", "sum"])
def test_averaging_the_clients_values_would_have_been_wrong(result, name):
    # Else the test above could not tell a merge from a mean. (Pearson of a client with one class is NaN.)
    assert not abs(result.mean(name) - result.pooled[name]) < 1e-2


def test_nothing_of_this_is_said_to_be_averaged_only(result):
    assert result.averaged == []


def test_clients_and_server_log_the_same_names(result):
    # Lightning itself keeps no `both_step` after a validation.
    assert set(result.merged) - {"both_step"} == set(result.pooled) - {"both_step"}


def test_merge_leaves_the_servers_metrics_alone(result):
    server = Logging()
    server.mean.update(torch.tensor(5.0))
    before = {k: v.clone() for k, v in server.mean.metric_state.items()}
    merged = metrics.merge([(1, states) for states in result.states], server).values
    assert merged["mean"] == pytest.approx(result.pooled["mean"], abs=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in server.mean.metric_state.items())
    assert server.f1.update_count == 0


@pytest.mark.parametrize("client", [1, 2])
def test_merge_of_one_client_is_that_client(result, client):
    merged = metrics.merge([(7, result.states[client])], Logging()).values
    for name in NAMES + SCALARS:
        assert merged[name] == pytest.approx(result.own[client][name], abs=1e-6, nan_ok=True), name


def test_caught_states_do_not_change_when_lightning_resets_the_metrics():
    module, parts = Logging(), class_sorted((20, 30))
    states, _ = validate(module, loaders(parts)[0])
    kept = [{k: v.clone() for k, v in s.tensors.items()} for s in states]
    validate(module, loaders(parts)[1])
    assert all(torch.equal(v, k[name]) for s, k in zip(states, kept, strict=True) for name, v in s.tensors.items())


def test_name_that_only_some_clients_log_is_merged_over_those():
    class Sometimes(Logging):
        def validation_step(self, batch, batch_idx):
            if len(batch[0]) > 7:
                self.log("large", batch[0].mean())
            self.log("every", batch[0].mean())

    parts = class_sorted((7, 20, 30))
    values = over(Sometimes(), parts).merged
    assert values["large"] == pytest.approx(float(pooled(parts[1:]).tensors[0].mean()), abs=1e-6)
    assert values["every"] == pytest.approx(float(pooled(parts).tensors[0].mean()), abs=1e-6)


class Rare(LightningModule):
    """Logs metrics that it does not update on small batches."""

    def __init__(self) -> None:
        super().__init__()
        self.pearson, self.mse, self.max = tm.PearsonCorrCoef(), tm.MeanSquaredError(), tm.MaxMetric()

    def validation_step(self, batch, batch_idx):
        x, _ = batch
        if len(x) > 3:
            self.pearson.update(x[:, 0], x[:, 1])
            self.mse.update(x[:, 0], x[:, 1])
            self.max.update(x[:, 0])
        self.log_dict({"pearson": self.pearson, "mse": self.mse, "max": self.max})


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("sizes", [(20, 2, 30), (2, 3, 20, 30), (2, 20, 3), (1, 1, 1, 20)])
def test_client_that_never_updated_a_metric_adds_nothing_to_it(sizes):
    result = over(Rare(), class_sorted(sizes))
    updating = [part for part in class_sorted(sizes) if len(part) > 3]
    truth = validate(Rare(), DataLoader(pooled(updating), 64))[1]
    assert result.merged == pytest.approx(truth, abs=1e-6)


# ------------------------------------------------------------------------------------------------- in training


class Training(LightningModule):
    """Logs in training, and does not learn, so that the pooled value is known."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.f1 = nn.Linear(8, 3), MulticlassF1Score(3, average="macro")

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.f1.update(logits, y)
        self.log("f1", self.f1, on_step=False, on_epoch=True)
        self.log("f1_forked", self.f1, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("size", float(len(y)))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_metrics_logged_in_training_are_merged_too():
    torch.manual_seed(0)
    module, parts = Training(), class_sorted(SIZES)
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(loaders(parts))], **QUIET)
    trainer.fit(module)
    x, y = pooled(parts).tensors
    logits = module.net(x)
    truth = float(MulticlassF1Score(3, average="macro")(logits, y))
    assert float(trainer.callback_metrics["f1"]) == pytest.approx(truth, abs=1e-6)
    assert float(trainer.callback_metrics["f1_forked_epoch"]) == pytest.approx(truth, abs=1e-6)
    expected = nn.functional.cross_entropy(logits, y).item()
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(expected, abs=1e-6)
    # Logged on_step only: each client's last batch (7, 53 % 32, 196 % 32), weighted by its examples.
    last = sum(n * size for n, size in zip(SIZES, (7, 21, 4), strict=True)) / sum(SIZES)
    assert float(trainer.callback_metrics["size"]) == pytest.approx(last, abs=1e-5)


def test_name_that_was_logged_in_an_earlier_local_epoch_only_is_not_of_the_last():
    class Early(Training):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 0:
                self.log("early", batch[0].mean(), on_step=False, on_epoch=True)
                self.f1.update(self.net(batch[0]), batch[1])
                self.log("early_f1", self.f1, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    clients = ClientData(loaders(class_sorted((20, 30))))
    trainer = FederatedTrainer(max_rounds=1, local_epochs=2, callbacks=[clients], **QUIET)
    trainer.fit(Early())
    assert {"f1", "loss"} <= set(trainer.round_metrics)
    assert not {"early", "early_f1"} & set(trainer.round_metrics)


def test_values_of_several_validation_loaders_stay_apart():
    class Two(LightningModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("x", batch[0].mean())
            self.log(f"own_{dataloader_idx}", batch[0].mean(), add_dataloader_idx=False)

    parts = class_sorted((8, 24))
    clients = [(len(part), validate(Two(), [DataLoader(part, 8), DataLoader(part, 8)])[0]) for part in parts]
    values = metrics.merge(clients, Two()).values
    assert set(values) == {"x/dataloader_idx_0", "x/dataloader_idx_1", "own_0", "own_1"}
    assert values["own_1"] == pytest.approx(float(pooled(parts).tensors[0].mean()), abs=1e-6)


# ------------------------------------------------------------------------------------------------ what cannot be merged


class Unmergeable(LightningModule):
    """Logs in each of the ways that leave no state to merge."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 3)
        self.f1, self.shared = MulticlassF1Score(3, average="macro"), MulticlassF1Score(3, average="macro")
        self.minmax, self.boot = MinMaxMetric(MulticlassAccuracy(3)), BootStrapper(MulticlassAccuracy(3), 3)
        self.two = tm.MeanMetric() + tm.MeanMetric()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        for metric in (self.f1, self.shared, self.minmax, self.boot):
            metric.update(logits, y)
        self.two.update(logits)
        self.log("two", self.two)
        self.log("good", self.shared)

    def on_validation_epoch_end(self):
        self.log("computed", self.f1.compute())
        self.log_dict({f"minmax_{k}": v for k, v in self.minmax.compute().items()})
        self.log_dict({f"boot_{k}": v for k, v in self.boot.compute().items()})
        self.log("by_hand", torch.tensor(float(self.f1._update_count)))
        self.log("sum", 1.0, reduce_fx="sum")
        self.f1.reset()
        self.minmax.reset()
        self.boot.reset()


@pytest.fixture(scope="module")
def unmerged():
    return over(Unmergeable(), class_sorted(SIZES))


UNMERGED = ["computed", "minmax_raw", "minmax_max", "minmax_min", "boot_mean", "boot_std", "two", "by_hand"]


@pytest.mark.parametrize("name", UNMERGED)
def test_what_cannot_be_merged_is_named_and_weighted_by_examples(unmerged, name):
    assert name in unmerged.averaged
    assert unmerged.merged[name] == pytest.approx(unmerged.mean(name), abs=1e-6)


def test_what_can_be_merged_is_not_named_beside_it(unmerged):
    assert sorted(unmerged.averaged) == sorted(UNMERGED)
    assert unmerged.merged["sum"] == 3.0


@pytest.mark.parametrize(
    ("metric", "mergeable"),
    [
        (tm.MeanMetric(), True),
        (tm.PearsonCorrCoef(), True),
        (MulticlassAUROC(3, thresholds=None), True),
        (MinMaxMetric(tm.MeanMetric()), False),
        (BootStrapper(tm.MeanMetric()), False),
        (tm.MeanMetric() + 1, False),
        (tm.wrappers.Running(tm.MeanMetric(), 2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_wrappers_are_told_from_metrics_with_states_of_their_own(metric, mergeable):
    assert is_mergeable(metric) is mergeable


def test_list_that_is_not_concatenated_is_not_merged():
    class Boxes(tm.Metric):
        """As detection metrics: each update is one item, and its borders matter."""

        def __init__(self):
            super().__init__()
            self.add_state("boxes", default=[], dist_reduce_fx=None)

        def update(self, x):
            self.boxes.append(x)

        def compute(self):
            return torch.tensor(float(len(self.boxes)))

    assert not is_mergeable(Boxes())


def test_client_and_server_may_have_the_metric_on_different_devices_and_in_different_dtypes():
    module = nn.Module()
    module.mean = tm.MeanMetric().set_dtype(torch.float64)
    states = []
    for values in ([1.0, 2.0], [6.0]):
        own = tm.MeanMetric()
        own.update(torch.tensor(values))
        states.append((1.0, [MetricState("m", METRIC, dict(own.metric_state), "mean", 1)]))
    assert metrics.merge(states, module).values["m"] == pytest.approx(3.0)

"""What a client logs is what a plain Trainer has in ``callback_metrics``: the same names, the same values.

With one client nothing is averaged, so Lightning's own trainer is the reference for every habit of logging; with
several, every name's value is made of the clients' own.
"""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassF1Score, MulticlassPrecision, MulticlassRecall

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, ClientMetrics, History
from tests.helpers import QUIET, class_sorted, loaders, pooled, sweep

SIZES = (7, 53, 40)
BATCH = 16


class Base(L.LightningModule):
    """Does not learn, so that what it logs can be told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 3)
        self.f1, self.mean = MulticlassF1Score(3, average="macro"), MeanMetric()

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.f1.update(logits, batch[1])
        self.logs(batch, logits)
        return nn.functional.cross_entropy(logits, batch[1])

    def logs(self, batch, logits):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class StepThenEpochEnd(Base):
    def logs(self, batch, logits):
        self.log("x", float(len(batch[0])))

    def on_train_epoch_end(self):
        self.log("x", 100.0)


class EpochThenEpochEnd(Base):
    def logs(self, batch, logits):
        self.log("x", logits.mean(), on_step=False, on_epoch=True)

    def on_train_epoch_end(self):
        self.log("x", 100.0)


class StartThenStep(Base):
    def on_train_start(self):
        self.log("x", 3.0)

    def logs(self, batch, logits):
        self.log("x", logits.mean(), on_step=True, on_epoch=True)


class EpochStartThenStep(Base):
    def on_train_epoch_start(self):
        self.log("x", 3.0)

    def logs(self, batch, logits):
        self.log("x", logits.mean())


class BatchStartThenStep(Base):
    def on_train_batch_start(self, batch, batch_idx):
        self.log("x", 5.0 + batch_idx)

    def logs(self, batch, logits):
        self.log("x", logits.mean(), on_step=True, on_epoch=True)


class MetricThenNumber(Base):
    def logs(self, batch, logits):
        self.log("x", self.f1, on_step=False, on_epoch=True)

    def on_train_epoch_end(self):
        self.log("x", 0.25)


class NumberThenMetric(Base):
    def on_train_start(self):
        self.log("x", 7.0)

    def logs(self, batch, logits):
        self.mean.update(logits)
        self.log("x", self.mean, on_step=False, on_epoch=True)


class MetricOnStep(Base):
    """Only the last batch's value is asked for."""

    def logs(self, batch, logits):
        self.mean(logits.mean())
        self.log("x", self.mean, on_step=True, on_epoch=False)


class MetricForked(Base):
    def logs(self, batch, logits):
        self.mean(logits)
        self.log("x", self.mean, on_step=True, on_epoch=True)


class MetricUpdatedOnly(Base):
    """Without forward there is no value of a step."""

    def logs(self, batch, logits):
        self.mean.update(logits)
        self.log("x", self.mean, on_step=True, on_epoch=True)


class TwoNames(Base):
    """One metric under two names, and one of a collection under another."""

    def __init__(self):
        super().__init__()
        self.both = MetricCollection({"p": MulticlassPrecision(3), "r": MulticlassRecall(3)}, prefix="both_")

    def logs(self, batch, logits):
        self.both.update(logits, batch[1])
        self.log_dict(self.both, on_step=False, on_epoch=True)
        self.log("precision", self.both["p"], on_step=False, on_epoch=True)
        for name in ("a", "b"):
            self.log(name, self.f1, on_step=False, on_epoch=True)


class OtherReductions(Base):
    def logs(self, batch, logits):
        for reduce_fx in ("sum", "max", "min"):
            self.log(reduce_fx, logits.sum(), on_step=True, on_epoch=True, reduce_fx=reduce_fx)
            self.log(f"{reduce_fx}_step", logits.sum() + 1, reduce_fx=reduce_fx)


class GivenBatchSize(Base):
    def logs(self, batch, logits):
        self.log("x", logits.mean(), on_step=False, on_epoch=True, batch_size=3)


class ForkedName(Base):
    """A name that looks like another one's."""

    def logs(self, batch, logits):
        self.log("x", logits.mean(), on_step=True, on_epoch=True)
        self.log("x_epoch", logits.max(), on_step=False, on_epoch=True)


class Quietly(Base):
    def logs(self, batch, logits):
        self.log("x", logits.mean(), logger=False, prog_bar=True, on_step=True, on_epoch=True)


TRAINING = [
    *(StepThenEpochEnd, EpochThenEpochEnd, StartThenStep, EpochStartThenStep, BatchStartThenStep, MetricThenNumber),
    *(NumberThenMetric, MetricOnStep, MetricForked, MetricUpdatedOnly, TwoNames, OtherReductions, GivenBatchSize),
    *(ForkedName, Quietly),
]


class Validates(Base):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self.net(batch[0])
        self.f1.update(logits, batch[1])
        self.logs(batch, logits)


class ForkedTwice(Validates):
    """Step and epoch, which with two loaders both carry the loader's number."""

    def logs(self, batch, logits):
        self.log("vl", logits.mean(), on_step=True, on_epoch=True)
        self.log("f1", self.f1, on_step=True, on_epoch=True)
        self.log("max", logits.max(), reduce_fx="max")


class StepThenValidationEnd(Validates):
    def logs(self, batch, logits):
        self.log("x", logits.mean(), on_step=True, on_epoch=True)

    def on_validation_epoch_end(self):
        self.log("x", 100.0)


class BeforeValidation(Validates):
    def on_validation_epoch_start(self):
        self.log("x", 3.0)

    def logs(self, batch, logits):
        self.log("x", logits.mean())


VALIDATION = [ForkedTwice, StepThenValidationEnd, BeforeValidation]


def federated(cls, data, *callbacks, rounds=1, **options):
    """The row of the last round."""
    history = History()
    arguments = {**QUIET, "max_rounds": rounds, "callbacks": [ClientData(data), history, *callbacks], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FederatedTrainer(**arguments).fit(cls())
    return {name: value for name, value in history.rows[-1].items() if name != "round"}


def fitted(cls, data, epochs=1):
    trainer = L.Trainer(max_epochs=epochs, **QUIET)
    trainer.fit(cls(), data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def validated(cls, data):
    trainer = L.Trainer(**QUIET)
    trainer.validate(cls(), data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def close(expected):
    return pytest.approx(expected, rel=1e-6, abs=1e-6)


def weighted(each, sizes=SIZES):
    """The example-weighted means of the clients' own values."""
    return {name: sum(n * own[name] for n, own in zip(sizes, each, strict=True)) / sum(sizes) for name in each[0]}


@pytest.mark.parametrize("epochs", sweep([1, 2], [2]))
@pytest.mark.parametrize("cls", TRAINING)
def test_one_client_logs_in_training_what_a_plain_trainer_has(cls, epochs):
    (part,) = class_sorted((53,))
    row = federated(cls, [DataLoader(part, BATCH)], local_epochs=epochs)
    assert row == close(fitted(cls, DataLoader(part, BATCH), epochs))


@pytest.mark.parametrize(
    "cls",
    sweep(TRAINING, [StepThenEpochEnd, BatchStartThenStep, MetricOnStep, MetricForked, TwoNames, OtherReductions]),
)
def test_client_metrics_are_each_clients_own_values(cls):
    parts = class_sorted(SIZES)
    row = federated(cls, loaders(parts, BATCH), ClientMetrics(spread=False, per_client=True))
    for client, part in enumerate(parts):
        for name, value in fitted(cls, DataLoader(part, BATCH)).items():
            assert row[f"{name}/client_{client}"] == close(value)


@pytest.mark.parametrize(
    "cls", [StepThenEpochEnd, EpochThenEpochEnd, EpochStartThenStep, MetricThenNumber, MetricOnStep]
)
def test_one_name_of_two_hooks_is_over_clients_the_mean_of_what_each_has(cls):
    parts = class_sorted(SIZES)
    row = federated(cls, loaders(parts, BATCH))
    assert row == close(weighted([fitted(cls, loader) for loader in loaders(parts, BATCH)]))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("cls", VALIDATION)
def test_one_client_logs_in_validation_what_a_plain_trainer_has(cls, count):
    parts = class_sorted((53, 40))
    data = [DataLoader(part, BATCH) for part in parts[:count]]
    data = data[0] if count == 1 else data
    row = federated(cls, [(DataLoader(parts[0], BATCH), data)])
    found = {name.removeprefix("clients/"): value for name, value in row.items() if name.startswith("clients/")}
    expected = validated(cls, data)
    assert {name: found[name] for name in expected} == close(expected)
    # Lightning logs a step's value, and does not keep it for callbacks.
    assert {name for name in found if "_step" not in name} == set(expected)


def test_the_epochs_value_of_two_validation_loaders_can_be_monitored_under_lightnings_name(tmp_path):
    parts = class_sorted((20, 30))
    data = [(loader, [loader, loader]) for loader in loaders(parts, BATCH)]
    name = "clients/vl_epoch/dataloader_idx_0"
    stopping = EarlyStopping(name, patience=1, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path, monitor=name, save_on_train_epoch_end=True)
    row = federated(ForkedTwice, data, stopping, best, rounds=3, enable_checkpointing=True)
    expected = validated(ForkedTwice, [DataLoader(pooled(parts), 50)] * 2)
    assert row[name] == close(expected["vl_epoch/dataloader_idx_0"])
    assert float(stopping.best_score) == float(best.best_model_score) == close(row[name])


# ---------------------------------------------------------------------------------------------- between the batches


class BeforeTraining(Base):
    """A number of each client, logged before there is a batch."""

    def on_train_start(self):
        self.log("size", float(len(self.trainer.train_dataloader.dataset)))


class OfTheEpoch(Base):
    """A value of the epoch, of so many examples as the user says."""

    def on_train_epoch_end(self):
        size = float(len(self.trainer.train_dataloader.dataset))
        self.log("size", size)
        self.log("given", size, batch_size=1 if size == SIZES[0] else 9)


def test_what_is_logged_on_train_start_is_weighted_by_examples():
    sizes = [float(n) for n in SIZES]
    row = federated(BeforeTraining, loaders(class_sorted(SIZES), BATCH))
    assert row["size"] == close(weighted([{"size": n} for n in sizes])["size"])


def test_batch_size_that_the_user_gives_for_an_epochs_value_is_its_weight():
    row = federated(OfTheEpoch, loaders(class_sorted(SIZES[1:]), BATCH))
    assert row["size"] == close((53 * 53 + 40 * 40) / 93)
    assert row["given"] == close((53 + 40) / 2)


class Total(Base):
    """Sums of clients with a metric that is logged nowhere else."""

    def __init__(self):
        super().__init__()
        self.seen = SumMetric()

    def logs(self, batch, logits):
        self.seen.update(float(len(batch[0])))

    def on_train_epoch_end(self):
        self.log("seen", self.seen)


def test_metric_object_that_is_logged_at_the_end_of_an_epoch_is_merged_by_its_state():
    assert federated(Total, loaders(class_sorted(SIZES), BATCH))["seen"] == sum(SIZES)

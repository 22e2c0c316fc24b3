"""A strategy's own function for the clients' metrics decides the names that it gives; Flower's default decides none."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from flwr.app import MetricRecord
from flwr.serverapp import strategy as flower
from torch import nn
from torchmetrics.classification import MulticlassF1Score

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FederatedCallback, FlowerStrategy, History
from lightning_fed.strategies import WeightedMean
from tests.helpers import QUIET, class_sorted, loaders, pooled

SIZES = (7, 53, 40)


class Module(L.LightningModule):
    """Hardly learns, and logs a metric that merges and one that does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.f1 = nn.Linear(8, 3), MulticlassF1Score(3, average="macro")

    def training_step(self, batch, batch_idx):
        return self.both(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.both(batch, "val")

    def on_validation_epoch_end(self):
        self.log("val_by_hand", torch.rand(()))

    def both(self, batch, stage):
        logits = self.net(batch[0])
        self.f1.update(logits, batch[1])
        self.log(f"{stage}_f1", self.f1, on_step=False, on_epoch=True)
        self.log(f"{stage}_mean", logits.mean(), on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-7)


def exact():
    x, y = pooled(class_sorted(SIZES)).tensors
    logits = Module().net(x)
    return float(MulticlassF1Score(3, average="macro")(logits, y)), float(logits.mean())


def run(*callbacks):
    """The round's row, and what was said of names that do not merge."""
    history = History()
    data = ClientData([(loader, loader) for loader in loaders(class_sorted(SIZES))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FederatedTrainer(max_rounds=1, callbacks=[data, history, *callbacks], **QUIET).fit(Module())
    return history.rows[0], [str(w.message) for w in caught if "cannot be merged" in str(w.message)]


def of_clients(names):
    """A function of all replies that gives the greatest of some names."""

    def greatest(contents, key):
        found = [record for content in contents for record in content.metric_records.values()]
        return MetricRecord({name: 10 + max(float(record[name]) for record in found) for name in names})

    return greatest


class Ours(FederatedCallback):
    """Our own strategy with a function of the user's."""

    decides = frozenset({"aggregation"})

    def server_strategy(self, strategy):
        functions = {"train": of_clients(["train_f1"]), "evaluate": of_clients(["val_f1", "val_by_hand"])}
        return WeightedMean(**{f"{stage}_metrics_aggr_fn": function for stage, function in functions.items()})


def flowers():
    train, evaluate = of_clients(["train_f1"]), of_clients(["val_f1", "val_by_hand"])
    return flower.FedAvg(train_metrics_aggr_fn=train, evaluate_metrics_aggr_fn=evaluate)


class Overridden(flower.FedAvg):
    """A strategy of the user's, which changes one metric of what Flower's makes."""

    def aggregate_train(self, server_round, replies):
        arrays, record = super().aggregate_train(server_round, replies)
        record["train_f1"] = 10 + record["train_f1"]
        return arrays, record

    def aggregate_evaluate(self, server_round, replies):
        return MetricRecord({"val_f1": 11.0, "val_by_hand": 12.0})


class Watching(flower.FedAvg):
    """A strategy of the user's that leaves the metrics to Flower."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, list(replies))

    def aggregate_evaluate(self, server_round, replies):
        return super().aggregate_evaluate(server_round, list(replies))


def wrapped():
    return flower.DifferentialPrivacyServerSideFixedClipping(flowers(), 1e-12, 1e6, 3)


@pytest.mark.parametrize(
    "callback",
    [Ours(), FlowerStrategy(flowers()), FlowerStrategy(wrapped()), FlowerStrategy(Overridden())],
    ids=["ours", "flowers", "wrapped", "overridden"],
)
def test_the_users_function_wins_for_the_names_that_it_gives_and_for_no_others(callback):
    row, said = run(callback)
    _, mean = exact()
    assert min(row["train_f1"], row["clients/val_f1"], row["clients/val_by_hand"]) >= 10
    assert [row["train_mean"], row["clients/val_mean"]] == pytest.approx([mean, mean], abs=1e-5)
    assert said == []  # the one that does not merge is the function's


@pytest.mark.parametrize(
    "callback",
    [FlowerStrategy(flower.FedAvg()), FlowerStrategy(flower.FedMedian()), FlowerStrategy(Watching())],
    ids=["fedavg", "fedmedian", "watching"],
)
def test_flowers_default_does_not_replace_what_is_merged_exactly(callback):
    row, said = run(callback)
    f1, mean = exact()
    assert row["train_f1"] == row["clients/val_f1"] == pytest.approx(f1, abs=1e-5)
    assert row["train_mean"] == pytest.approx(mean, abs=1e-5)
    assert len(said) == 1
    assert "'val_by_hand'" in said[0]


def test_a_function_for_one_stage_leaves_the_other_alone():
    row, _ = run(FlowerStrategy(flower.FedAvg(evaluate_metrics_aggr_fn=of_clients(["val_f1"]))))
    assert row["clients/val_f1"] >= 10
    assert row["train_f1"] == pytest.approx(exact()[0], abs=1e-5)

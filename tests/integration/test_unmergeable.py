"""Metrics whose states do not add up over clients: the example-weighted mean of the clients' own values, said by name.

A run never ends for a metric's sake, and a value is never a wrong one in silence.
"""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
import torchmetrics as tm
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.regression import NormalizedRootMeanSquaredError

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, History
from tests.helpers import QUIET, class_sorted, loaders, pooled

SIZES = (7, 53, 40)


class Evaluates(L.LightningModule):
    """Logs one metric, or what ``value`` gives, in its validation."""

    def __init__(self, metric=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.metric = nn.Linear(8, 3), metric

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.update(*batch)
        self.log("m", self.metric)

    def update(self, x, y):
        self.metric.update(x[:, 0], x[:, 1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def evaluated(module, sizes=SIZES, **options):
    """The clients' value and what was said of it; each client's own value; the value over the pooled data."""
    parts = class_sorted(sizes)
    history = History(per_client=True)
    data = ClientData([(loader, loader) for loader in loaders(parts, 16)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = FederatedTrainer(max_rounds=1, callbacks=[data, history], **QUIET, **options)
        trainer.fit(module)
        plain = [L.Trainer(**QUIET) for _ in range(len(sizes) + 1)]
        each = [*loaders(parts, 16), DataLoader(pooled(parts), 200)]
        values = [t.validate(module, d, verbose=False) and t.callback_metrics["m"] for t, d in zip(plain, each)]
    said = [str(w.message) for w in caught if "cannot be merged over clients exactly" in str(w.message)]
    return history.rows[0].get("clients/m"), said, [v.tolist() for v in values[:-1]], values[-1].tolist()


def weighted(own, sizes=SIZES):
    return sum(n * value for n, value in zip(sizes, own, strict=True)) / sum(sizes)


class Positive(Evaluates):
    def update(self, x, y):
        self.metric.update(x[:, 0].abs().clamp(max=1), x[:, 1].abs().clamp(max=1))


class Forgotten(tm.Metric):
    """As many write it: without ``dist_reduce_fx``, and so that the states of clients in a stack give a number."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0))
        self.add_state("count", torch.tensor(0.0))

    def update(self, x, y):
        self.total, self.count = self.total + x.sum(), self.count + y.abs().sum()

    def compute(self):
        return (self.total / self.count).mean()


class ForgottenVector(Forgotten):
    def compute(self):
        return self.total / self.count


class Knows(Forgotten):
    """Knows what to do with the states of several clients."""

    def compute(self):
        return self.total.sum() / self.count.sum()


class First(Forgotten):
    """A reduction that keeps the first client's states."""

    def __init__(self):
        tm.Metric.__init__(self)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx=lambda stacked: stacked[0])
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx=lambda stacked: stacked[0])


class Added(Forgotten):
    """A reduction of the user's own that is right."""

    def __init__(self):
        tm.Metric.__init__(self)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx=lambda stacked: stacked.sum(0))
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx=torch.sum)


class Mean(tm.Metric):
    """A mean over updates, kept as such."""

    def __init__(self):
        super().__init__()
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, x, y):
        self.mean = self.mean + (x.mean() - self.mean) / self._update_count

    def compute(self):
        return self.mean


class MeanOfExamples(Mean):
    """A mean over examples, kept as such."""

    def __init__(self):
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, x, y):
        self.count += len(x)
        self.mean = self.mean + (x - self.mean).sum() / self.count


class Uneven(tm.Metric):
    """Rows as long as the client's first batch."""

    def __init__(self):
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, x, y):
        if not self.rows:
            self.rows.append(x[None])

    def compute(self):
        return torch.cat(self.rows).mean()


class Learns(tm.Metric):
    """Keeps beside its states what only a client that updates it knows."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, x, y):
        self.scale = 2.0
        self.total = self.total + x.sum()

    def compute(self):
        return self.total * self.scale


class Best(tm.MeanMetric):
    """Keeps in an attribute what it gives."""

    def __init__(self):
        super().__init__()
        self.best = float("inf")

    def update(self, x, y):
        super().update(x)
        self.best = min(self.best, float(x.min()))

    def reset(self):
        super().reset()
        self.best = float("inf")

    def compute(self):
        return torch.tensor(self.best)


class Counted(tm.Metric):
    """Keeps its count in a list."""

    def __init__(self):
        super().__init__()
        self.add_state("wrong", torch.tensor(0.0), dist_reduce_fx="sum")
        self.seen = []

    def update(self, x, y):
        self.wrong += (x > y).sum()
        self.seen.append(len(y))

    def reset(self):
        super().reset()
        self.seen = []

    def compute(self):
        return (self.wrong / max(sum(self.seen), 1)) ** 2


class Scaled(tm.MeanSquaredError):
    """Keeps a scale that only the second client moves: the first one's states alone give the first one's value."""

    scale = 1.0

    def update(self, x, y):
        super().update(x, y)
        if self._update_count > 3:
            self.scale = 3.0

    def reset(self):
        super().reset()
        self.scale = 1.0

    def compute(self):
        return super().compute() / self.scale


class Remembers(tm.PearsonCorrCoef):
    """Keeps something that its value does not depend on."""

    last = None

    def update(self, x, y):
        super().update(x, y)
        self.last = x


class Undefined(tm.MeanSquaredError):
    """Is NaN on a client with one batch."""

    def compute(self):
        return super().compute() if self._update_count > 1 else torch.tensor(torch.nan)


class Unbatched(Mean):
    """A tensor that is concatenated, not a list."""

    def __init__(self):
        tm.Metric.__init__(self)
        self.add_state("values", torch.zeros(0), dist_reduce_fx="cat")

    def update(self, x, y):
        self.values = torch.cat([self.values, x])

    def compute(self):
        return self.values.median()


@pytest.mark.parametrize(
    "module",
    [
        Evaluates(NormalizedRootMeanSquaredError("range")),
        Evaluates(Forgotten()),
        Evaluates(ForgottenVector()),
        Evaluates(First()),
        Evaluates(Uneven()),
        Evaluates(Learns()),
        Evaluates(Best()),
        Evaluates(Counted()),
        Evaluates(Scaled()),
        Evaluates(tm.MeanSquaredError() ** 0.5),
    ],
    ids=lambda module: type(module.metric).__name__,
)
def test_metric_whose_states_do_not_add_up_is_the_mean_of_the_clients_own_and_said_by_name(module):
    value, said, own, whole = evaluated(module)
    assert value == pytest.approx(weighted(own), rel=1e-6)
    assert value != pytest.approx(whole, rel=1e-4)
    assert [text.count("'m'") for text in said] == [1]


@pytest.mark.parametrize(
    "module",
    [
        Positive(PeakSignalNoiseRatio(data_range=(0, 1))),
        Positive(PeakSignalNoiseRatio(data_range=1.0)),
        Evaluates(Knows()),
        Evaluates(Added()),
        Evaluates(Unbatched()),
        Evaluates(Remembers()),
        Evaluates(tm.PearsonCorrCoef()),
        Evaluates(tm.ConcordanceCorrCoef()),
    ],
    ids=lambda module: type(module.metric).__name__,
)
def test_metric_whose_states_add_up_has_the_value_over_the_pooled_data(module):
    value, said, own, whole = evaluated(module)
    assert value == pytest.approx(whole, rel=1e-5)
    assert value != pytest.approx(weighted(own), rel=1e-4)
    assert said == []


def test_metric_that_is_nan_on_one_client_has_the_value_over_the_pooled_data():
    value, said, own, _ = evaluated(Evaluates(Undefined()))
    assert own[0] != own[0]
    expected = evaluated(Evaluates(tm.MeanSquaredError()))[-1]
    assert value == pytest.approx(expected, rel=1e-5)
    assert said == []


@pytest.mark.parametrize("metric", [Mean(), MeanOfExamples()])
def test_states_that_are_means_of_who_knows_what_are_averaged_by_examples_and_said(metric):
    value, said, own, _ = evaluated(Evaluates(metric))
    assert value == pytest.approx(weighted(own), rel=1e-6)
    assert [text.count("'m'") for text in said] == [1]


@pytest.mark.parametrize("metric", [Mean(), MeanOfExamples()])
def test_states_that_are_means_are_merged_where_updates_and_examples_weigh_alike(metric):
    value, said, _, whole = evaluated(Evaluates(metric), (16, 48, 32))  # batches of 16
    assert value == pytest.approx(whole, rel=1e-5)
    assert said == []


@pytest.mark.parametrize("metric", [NormalizedRootMeanSquaredError("range"), Forgotten(), First(), Uneven(), Learns()])
def test_one_clients_metric_is_its_own_value_and_nothing_is_said(metric):
    value, said, own, _ = evaluated(Evaluates(metric), (53,))
    assert value == pytest.approx(own[0])
    assert said == []


class Differing(Evaluates):
    """One name that is a metric on one client and a number on another."""

    def validation_step(self, batch, batch_idx):
        x, _ = batch
        if self.trainer.num_val_batches[0] == 1:
            self.log("m", x[:, 0].mean())
        else:
            self.metric.update(x[:, 0], x[:, 1])
            self.log("m", self.metric)


def test_name_that_is_a_metric_on_one_client_and_a_number_on_another_is_averaged_and_said():
    value, said, own, _ = evaluated(Differing(tm.MeanSquaredError()))
    assert value == pytest.approx(weighted(own), rel=1e-6)
    assert [text.count("'m'") for text in said] == [1]


class SomeOnStep(Evaluates):
    """One name that is an epoch's mean on one client and the epoch's end's on another."""

    def validation_step(self, batch, batch_idx):
        if self.trainer.num_val_batches[0] > 1:
            self.log("m", batch[0].mean())

    def on_validation_epoch_end(self):
        if self.trainer.num_val_batches[0] == 1:
            self.log("m", 4.0)


def test_name_that_clients_log_in_different_hooks_is_averaged_and_said():
    value, said, own, _ = evaluated(SomeOnStep())
    assert own[0] == 4.0
    assert value == pytest.approx(weighted(own), rel=1e-6)
    assert [text.count("'m'") for text in said] == [1]


class Several(Evaluates):
    """Gives a number for each class, which Lightning takes for callbacks and no logger."""

    def validation_step(self, batch, batch_idx):
        self.metric.update(self.net(batch[0]), batch[1])
        self.log("m", self.metric, logger=False)
        self.log("n", batch[0].mean())


@pytest.mark.parametrize("sizes", [SIZES, (53,)])
def test_metric_of_several_numbers_is_left_out_and_said_and_ends_no_run(sizes):
    with pytest.warns(UserWarning, match=r"The logged 'm' is not a single number on any client"):
        assert evaluated_quietly(Several(tm.classification.MulticlassAccuracy(3, average=None)), sizes) == {"clients/n"}


def evaluated_quietly(module, sizes):
    history = History()
    data = ClientData([(loader, loader) for loader in loaders(class_sorted(sizes), 16)])
    FederatedTrainer(max_rounds=1, callbacks=[data, history], **QUIET).fit(module)
    return {name for name in history.rows[0] if name.startswith("clients/")}


class Named(tm.Metric):
    """Gives a dict, which Lightning refuses."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, x, y):
        self.total = self.total + x.sum()

    def compute(self):
        return {"a": self.total}


@pytest.mark.parametrize("where", ["metric", "list"])
def test_metric_that_gives_a_dict_is_refused_in_lightnings_words(where):
    metric = Named()
    if where == "list":
        metric.add_state("more", [], dist_reduce_fx=None)
    with pytest.raises(RuntimeError, match=r"client 0 .*return of the metric logged as 'm' must be a tensor"):
        evaluated_quietly(Evaluates(metric), SIZES)


class Raising(Forgotten):
    """Cannot be computed of few examples."""

    def compute(self):
        if self._update_count < 2:
            raise ValueError("needs at least 2 batches")
        return self.total


def test_metric_that_raises_on_a_client_is_that_clients_error():
    with pytest.raises(RuntimeError, match=r"client 0 .*needs at least 2 batches"):
        evaluated_quietly(Evaluates(Raising()), SIZES)


class Late(Evaluates):
    """Makes its metric on the client, where the server never sees it."""

    def on_validation_start(self):
        self.metric = tm.MeanSquaredError()
        self._metric_attributes = None


def test_metric_that_the_server_does_not_have_is_averaged_and_said():
    value, said, own, _ = evaluated(Late())
    assert value == pytest.approx(weighted(own), rel=1e-6)
    assert [text.count("'m'") for text in said] == [1]

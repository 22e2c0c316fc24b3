"""What clients log, merged, equals what a plain Trainer logs over the pooled data; what cannot be merged is said."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
import torchmetrics as tm
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassAveragePrecision,
    MulticlassCohenKappa,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, ClientMetrics, History
from tests.helpers import QUIET

SIZES = (7, 53, 130)
BATCH = 16


def class_sorted(sizes=SIZES, seed=0):
    """Unequal clients' data, sorted by class: far from IID."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (sum(sizes),), generator=generator).sort().values
    x = torch.randn(sum(sizes), 8, generator=generator) + 0.5 * y[:, None]
    return [TensorDataset(a, b) for a, b in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)]


def pooled_loader(parts):
    """All clients' examples in one loader, in the clients' own batches."""
    batches, start = [], 0
    for part in parts:
        batches += [list(range(start + i, start + min(i + BATCH, len(part)))) for i in range(0, len(part), BATCH)]
        start += len(part)
    columns = (torch.cat(column) for column in zip(*(part.tensors for part in parts), strict=True))
    return DataLoader(TensorDataset(*columns), batch_sampler=batches)


def loader(part):
    return DataLoader(part, batch_size=BATCH)


class Scores(nn.Module):
    """A user's metrics: sums, lists, higher moments, and a collection with compute groups, below the module itself."""

    def __init__(self, few=False):
        super().__init__()
        if few:  # for what is not about each of them
            self.single = nn.ModuleDict({"f1": MulticlassF1Score(3, average="macro"), "auroc": MulticlassAUROC(3)})
            self.regression, self.values = nn.ModuleDict(), nn.ModuleDict({"sum": tm.SumMetric()})
            self.collection = tm.MetricCollection({"recall": MulticlassRecall(3, average="macro")}, prefix="both/")
            return
        self.single = nn.ModuleDict(
            {
                "f1": MulticlassF1Score(3, average="macro"),
                "acc": MulticlassAccuracy(3, average="micro"),
                "auroc_binned": MulticlassAUROC(3, thresholds=40),
                "auroc": MulticlassAUROC(3, thresholds=None),
                "ap": MulticlassAveragePrecision(3, thresholds=None),
                "kappa": MulticlassCohenKappa(3),
            }
        )
        self.regression = nn.ModuleDict(
            {
                "pearson": tm.PearsonCorrCoef(),
                "spearman": tm.SpearmanCorrCoef(),
                "mse": tm.MeanSquaredError(),
                "r2": tm.R2Score(),
            }
        )
        self.values = nn.ModuleDict({"mean": tm.MeanMetric(), "max": tm.MaxMetric(), "sum": tm.SumMetric()})
        self.collection = tm.MetricCollection(
            {"precision": MulticlassPrecision(3, average="macro"), "recall": MulticlassRecall(3, average="macro")},
            prefix="both/",
        )

    def forward(self, logits, y):
        """Updates all metrics and gives them by name."""
        p = logits.softmax(1)
        for metric in self.single.values():
            metric.update(p, y)
        for metric in self.regression.values():
            metric.update(logits[:, 0], y.float())
        for metric in self.values.values():
            metric.update(logits[:, 1])
        self.collection.update(p, y)
        return {**self.single, **self.regression, **self.values}


SCALARS = ("loss", "mean_reduced", "summed", "greatest", "least")


class Base(L.LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.net, self.lr = nn.Linear(8, 3), lr

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def log_scalars(module, logits, y, **when):
    module.log("loss", nn.functional.cross_entropy(logits, y), **when)
    module.log("mean_reduced", logits[:, 2].mean(), reduce_fx="mean", **when)
    module.log("summed", logits.sum(), reduce_fx="sum", **when)
    module.log("greatest", logits.max(), reduce_fx="max", **when)
    module.log("least", logits.min(), reduce_fx="min", **when)


class Validating(Base):
    """Logs everything in ``validation_step``."""

    def __init__(self, few=False, **arguments):
        super().__init__(**arguments)
        self.scores = Scores(few)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        for name, metric in self.scores(logits, y).items():
            self.log(name, metric)
        self.log_dict(self.scores.collection)
        log_scalars(self, logits, y)


class Training(Base):
    """Logs everything in ``training_step``, some of it both on step and on epoch."""

    def __init__(self, few=False, **arguments):
        super().__init__(**arguments)
        self.scores, self.forked = Scores(few), MulticlassF1Score(3, average="macro")

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        for name, metric in self.scores(logits, y).items():
            self.log(name, metric, on_step=False, on_epoch=True)
        self.log_dict(self.scores.collection, on_step=False, on_epoch=True)
        self.forked(logits, y)
        self.log("forked", self.forked, on_step=True, on_epoch=True)
        log_scalars(self, logits, y, on_step=False, on_epoch=True)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("last", loss, on_step=True, on_epoch=False)
        return loss


def module_of(cls, **arguments):
    torch.manual_seed(0)
    return cls(**arguments)


def fit(module, data, *callbacks, rounds=2, **arguments):
    history = History()
    trainer = FederatedTrainer(
        max_rounds=rounds, seed=0, callbacks=[ClientData(data), history, *callbacks], **{**QUIET, **arguments}
    )
    trainer.fit(module)
    return history


def validated(module, data):
    """What a plain Trainer logs."""
    trainer = L.Trainer(**QUIET)
    trainer.validate(copy.deepcopy(module), data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def close(expected):
    return pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def evaluated():
    """The last round's row of a run whose clients evaluate on data sorted by class, and the pooled values."""
    parts = class_sorted()
    module = module_of(Validating)
    history = fit(module, [(loader(part), loader(part)) for part in parts])
    return history.rows[-1], validated(module, pooled_loader(parts)), [validated(module, loader(p)) for p in parts]


@pytest.fixture(scope="module")
def trained():
    """The row of a round with frozen weights, and what a plain fit logs on the pooled data and on each client's."""
    parts = class_sorted()
    history = fit(module_of(Training, lr=0.0), [loader(part) for part in parts], rounds=1)

    def fitted(data):
        plain = L.Trainer(max_epochs=1, log_every_n_steps=1, **QUIET)
        plain.fit(module_of(Training, lr=0.0), data)
        return {name: float(value) for name, value in plain.callback_metrics.items()}

    return history.rows[-1], fitted(pooled_loader(parts)), [fitted(loader(part)) for part in parts]


NAMES = [*Scores().single, *Scores().regression, *Scores().values, "both/precision", "both/recall", *SCALARS]
LINEAR = {"acc", "mse", "mean", "max", "sum", "loss", "mean_reduced", "summed", "greatest", "least"}


@pytest.mark.parametrize("name", NAMES)
def test_what_clients_log_in_validation_equals_the_value_over_the_pooled_data(name, evaluated):
    row, pooled, _ = evaluated
    assert row[f"clients/{name}"] == close(pooled[name])


@pytest.mark.parametrize("name", NAMES)
def test_what_clients_log_in_training_equals_the_value_over_the_pooled_data(name, trained):
    row, pooled, _ = trained
    assert row[name] == close(pooled[name])


@pytest.mark.parametrize("name", sorted(set(NAMES) - LINEAR))
def test_the_mean_of_the_clients_values_would_not_do(name, evaluated):
    _, pooled, clients = evaluated
    mean = sum(n * client[name] for n, client in zip(SIZES, clients, strict=True)) / sum(SIZES)
    assert abs(mean - pooled[name]) > 1e-4 or mean != mean


def test_clients_log_under_the_user_s_names_and_no_others(evaluated, trained):
    row, pooled, _ = evaluated
    assert set(row) == {"round"} | {f"clients/{name}" for name in pooled}
    row, pooled, _ = trained
    assert set(row) == {"round"} | set(pooled)


@pytest.mark.parametrize("name", ["forked", "forked_epoch", "train/loss", "train/loss_epoch"])
def test_a_value_logged_on_step_and_on_epoch_has_both_names_and_its_epoch_value_is_pooled(name, trained):
    row, pooled, _ = trained
    assert row[name] == close(pooled[name])


@pytest.mark.parametrize("name", ["forked_step", "train/loss_step", "last"])
def test_a_last_step_s_value_is_averaged_over_clients_by_examples(name, trained):
    row, _, clients = trained
    expected = sum(n * client[name] for n, client in zip(SIZES, clients, strict=True)) / sum(SIZES)
    assert row[name] == close(expected)


def test_only_the_last_local_epoch_counts():
    module = module_of(Training, few=True)
    part = class_sorted((40,))[0]
    history = fit(module, [loader(part)], rounds=1, local_epochs=3)
    plain = L.Trainer(max_epochs=3, **QUIET)
    plain.fit(module_of(Training, few=True), loader(part))
    for name in ("f1", "auroc", "loss", "summed"):
        assert history.rows[0][name] == close(float(plain.callback_metrics[name]))


def test_the_metrics_of_one_round_are_not_those_of_the_rounds_before():
    parts = class_sorted()
    history = fit(module_of(Training, lr=0.0, few=True), [loader(part) for part in parts], rounds=3)
    assert history["summed"] == [history["summed"][0]] * 3
    assert history["f1"] == [history["f1"][0]] * 3


@pytest.mark.parametrize("cls", [Training, Validating])
def test_a_run_leaves_the_module_s_own_metrics_as_they_were(cls):
    module = module_of(cls)
    metrics = [child for child in module.modules() if isinstance(child, tm.Metric)]
    module.scores.values["sum"].update(5.0)
    fit(module, [(loader(part), loader(part)) for part in class_sorted()])
    assert {metric._update_count for metric in metrics} == {0, 1}
    assert float(module.scores.values["sum"].compute()) == 5.0
    for metric in metrics:
        if metric._update_count == 0:
            for name, default in metric._defaults.items():
                state = getattr(metric, name)
                assert state == [] if isinstance(default, list) else torch.equal(state, default), name


def test_metrics_of_clients_can_be_monitored_in_their_own_round():
    parts = class_sorted()
    stopping = EarlyStopping("clients/f1", mode="max", patience=1, check_on_train_epoch_end=True)
    module = module_of(Validating, lr=0.0, few=True)
    history = fit(module, [(loader(part), loader(part)) for part in parts], stopping, rounds=5)
    assert len(history.rows) == 2  # frozen weights get no better: round 2 is the one that patience allows
    assert float(stopping.best_score) == close(history["clients/f1"][0])


# -------------------------------------------------------------------------------------------------- several, or nothing


def test_several_validation_loaders_of_a_client_keep_lightning_s_names():
    parts, others = class_sorted(), class_sorted(seed=1)
    data = [(loader(a), [loader(a), loader(b)]) for a, b in zip(parts, others, strict=True)]

    class TwoLoaders(Validating):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            logits = self.net(batch[0])
            self.log("loss", nn.functional.cross_entropy(logits, batch[1]))
            self.scores.collection.update(logits, batch[1])
            self.log(f"greatest/{dataloader_idx}", logits.max(), reduce_fx="max", add_dataloader_idx=False)

    module = module_of(TwoLoaders, few=True)
    row = fit(module, data).rows[-1]
    pooled = validated(module, [pooled_loader(parts), pooled_loader(others)])
    assert set(row) == {"round"} | {f"clients/{name}" for name in pooled}
    for name, value in pooled.items():
        assert row[f"clients/{name}"] == close(value)
    assert {"loss/dataloader_idx_0", "loss/dataloader_idx_1"} <= set(pooled)


def test_a_client_without_held_out_data_has_no_part_in_the_evaluation():
    parts = class_sorted()
    module = module_of(Validating, few=True)
    row = fit(module, [loader(parts[0]), (loader(parts[1]), loader(parts[1])), (loader(parts[2]), loader(parts[2]))])
    for name, value in validated(module, pooled_loader(parts[1:])).items():
        assert row.rows[-1][f"clients/{name}"] == close(value)


def test_a_client_that_never_updates_a_metric_adds_nothing_to_it():
    class Sometimes(Base):
        def __init__(self):
            super().__init__()
            self.auroc = MulticlassAUROC(3, thresholds=40)
            self.f1 = MulticlassF1Score(3, average="macro")

        def validation_step(self, batch, batch_idx):
            logits, y = self.net(batch[0]), batch[1]
            if len(y) > 10:  # the first client has 7 examples, which is less than a batch
                self.auroc.update(logits.softmax(1), y)
                self.f1.update(logits, y)
            self.log("auroc", self.auroc)
            self.log("f1", self.f1)

    parts = class_sorted((7, 48, 96))
    module = module_of(Sometimes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = fit(module, [(loader(part), loader(part)) for part in parts], rounds=1).rows[0]
        pooled = validated(module, pooled_loader(parts[1:]))
    assert row["clients/auroc"] == close(pooled["auroc"])
    assert row["clients/f1"] == close(pooled["f1"])


# ------------------------------------------------------------------------------------------------------ client metrics


def test_client_metrics_logs_the_spread_and_each_client_s_value():
    parts = class_sorted()
    module = module_of(Validating, few=True)
    data = [(loader(part), loader(part)) for part in parts]
    row = fit(module, data, ClientMetrics(per_client=True)).rows[-1]
    clients = [validated(module, loader(part)) for part in parts]
    for name in ("f1", "loss", "auroc"):
        values = [client[name] for client in clients]
        assert row[f"clients/{name}/min"] == close(min(values))
        assert row[f"clients/{name}/max"] == close(max(values))
        assert [row[f"clients/{name}/client_{client}"] for client in range(3)] == [close(value) for value in values]


def test_client_metrics_of_training_keep_the_user_s_names(trained):
    _, _, clients = trained
    data = [loader(part) for part in class_sorted()]
    row = fit(module_of(Training, lr=0.0, few=True), data, ClientMetrics(spread=True), rounds=1).rows[0]
    for name in ("f1", "loss", "auroc"):
        values = [client[name] for client in clients]
        assert (row[f"{name}/min"], row[f"{name}/max"]) == (close(min(values)), close(max(values)))
    assert not [name for name in row if "client_" in name]


def test_client_metrics_without_spread_logs_the_clients_alone():
    data = [loader(part) for part in class_sorted()]
    row = fit(module_of(Training, few=True), data, ClientMetrics(spread=False, per_client=True), rounds=1).rows[0]
    assert "f1/client_2" in row
    assert not [name for name in row if name.endswith(("/min", "/max"))]


# ----------------------------------------------------------------------------------------------- what cannot be merged


class Computed(Base):
    """Logs values that the module has computed itself, and a wrapper that keeps its states elsewhere."""

    def __init__(self):
        super().__init__()
        self.f1 = MulticlassF1Score(3, average="macro")
        self.pair = tm.MetricCollection(
            {"p": MulticlassPrecision(3, average="macro"), "r": MulticlassRecall(3, average="macro")}
        )
        self.min_max = tm.MinMaxMetric(MulticlassAccuracy(3, average="micro"))
        self.good = MulticlassF1Score(3, average="macro")

    def validation_step(self, batch, batch_idx):
        logits, y = self.net(batch[0]), batch[1]
        for metric in (self.f1, self.pair, self.min_max, self.good):
            metric.update(logits, y)
        self.log("good", self.good)
        self.log("loss", nn.functional.cross_entropy(logits, y))

    def on_validation_epoch_end(self):
        self.log("computed_f1", self.f1.compute())
        self.log_dict({f"pair_{name}": value for name, value in self.pair.compute().items()})
        self.log_dict({f"min_max_{name}": value for name, value in self.min_max.compute().items()})
        for metric in (self.f1, self.pair, self.min_max):
            metric.reset()


SAID = ("computed_f1", "pair_p", "pair_r", "min_max_raw", "min_max_min", "min_max_max")


def said_in(caught):
    return [str(w.message) for w in caught if "cannot be merged over clients exactly" in str(w.message)]


@pytest.fixture(scope="module")
def computed():
    parts = class_sorted()
    module = module_of(Computed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(module, [(loader(part), loader(part)) for part in parts], rounds=3)
    return history.rows[-1], said_in(caught), module, parts


@pytest.mark.parametrize("name", SAID)
def test_a_value_that_the_module_computed_itself_is_said_once_by_name(name, computed):
    _, said, _, _ = computed
    assert len([text for text in said if repr(name) in text]) == 1


def test_what_can_be_merged_is_not_complained_of(computed):
    row, said, module, parts = computed
    assert not [text for text in said if "'good'" in text or "'loss'" in text]
    assert row["clients/good"] == close(validated(module, pooled_loader(parts))["good"])


@pytest.mark.parametrize("name", SAID[:4])
def test_a_computed_value_is_the_example_weighted_mean_of_the_clients_values(name, computed):
    row, _, module, parts = computed
    values = [validated(module, loader(part))[name] for part in parts]
    assert row[f"clients/{name}"] == close(sum(n * v for n, v in zip(SIZES, values, strict=True)) / sum(SIZES))


def test_a_computed_value_logged_in_training_is_said_once_by_name():
    class InTraining(Base):
        def __init__(self):
            super().__init__()
            self.f1 = MulticlassF1Score(3, average="macro")

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            self.f1.update(logits, batch[1])
            return nn.functional.cross_entropy(logits, batch[1])

        def on_train_epoch_end(self):
            self.log("train_f1", self.f1.compute())
            self.f1.reset()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module_of(InTraining), [loader(part) for part in class_sorted()], rounds=3)
    assert len(said_in(caught)) == 1
    assert "'train_f1'" in said_in(caught)[0]


def test_a_composition_of_metrics_is_said_once_by_name():
    class Composed(Base):
        def __init__(self):
            super().__init__()
            self.p, self.r = MulticlassPrecision(3, average="macro"), MulticlassRecall(3, average="macro")
            self.both = self.p + self.r

        def validation_step(self, batch, batch_idx):
            self.both.update(self.net(batch[0]), batch[1])
            self.log("both", self.both)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module_of(Composed), [(loader(part), loader(part)) for part in class_sorted()])
    assert [text.count("'both'") for text in said_in(caught)] == [1]


def test_a_batch_value_logged_from_forward_is_the_mean_over_batches_and_no_complaint():
    """As centrally: ``self.log("f1", self.f1(logits, y))`` is a mean over batches, which pools exactly."""

    class Forward(Base):
        def __init__(self):
            super().__init__()
            self.f1 = MulticlassF1Score(3, average="macro")

        def validation_step(self, batch, batch_idx):
            self.log("f1", self.f1(self.net(batch[0]), batch[1]))

    parts = class_sorted()
    module = module_of(Forward)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row = fit(module, [(loader(part), loader(part)) for part in parts]).rows[-1]
    assert said_in(caught) == []
    assert row["clients/f1"] == close(validated(module, pooled_loader(parts))["f1"])


# ------------------------------------------------------------------------------------------------------ server's own


class Data(L.LightningDataModule):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def train_dataloader(self):
        return loader(self.parts[1])

    def val_dataloader(self):
        return loader(self.parts[2])


class Scaling(Validating):
    """The module's own batch hook, beside a datamodule that has none."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return 3.0 * x, y


@pytest.mark.parametrize("cls", [Validating, Scaling])
def test_the_server_s_validation_is_a_plain_trainer_s_under_the_same_names(cls):
    data = Data(class_sorted())
    module = module_of(cls, few=True)
    history = History()
    trainer = FederatedTrainer(max_rounds=2, num_clients=2, seed=0, callbacks=[history], **QUIET)
    trainer.fit(module, datamodule=data)
    expected = validated(module, data)
    assert history.rows[-1] == {"round": 2, **{name: close(value) for name, value in expected.items()}}
    assert {name: float(trainer.callback_metrics[name]) for name in expected} == close(expected)


@pytest.mark.parametrize("cls", [Validating, Scaling])
def test_validate_and_test_after_a_fit_are_those_of_a_plain_trainer(cls):
    data = Data(class_sorted())
    module = module_of(cls, few=True)
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, seed=0, **QUIET)
    trainer.fit(module, datamodule=data)
    (given,) = trainer.validate(module, datamodule=data, verbose=False)
    assert given == close(validated(module, data))


def test_clients_and_server_evaluate_side_by_side():
    parts = class_sorted()
    module = module_of(Validating, few=True)
    history = History()
    data = ClientData([(loader(part), loader(part)) for part in parts[:2]])
    trainer = FederatedTrainer(max_rounds=2, seed=0, callbacks=[data, history], **QUIET)
    trainer.fit(module, val_dataloaders=loader(parts[2]))
    clients, server = validated(module, pooled_loader(parts[:2])), validated(module, loader(parts[2]))
    for name in server:
        assert history.rows[-1][f"clients/{name}"] == close(clients[name])
        assert history.rows[-1][name] == close(server[name])


def test_clients_evaluate_in_the_rounds_that_the_server_would():
    parts = class_sorted()
    history = fit(
        module_of(Validating, few=True),
        [(loader(part), loader(part)) for part in parts],
        rounds=4,
        check_val_every_n_epoch=2,
    )
    assert ["clients/f1" in row for row in history.rows] == [False, True, False, True]

"""Which callback works where: once a round at the server, with batches and gradients on the clients."""

from __future__ import annotations

import copy
import warnings
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    ClientMetrics,
    FedAdam,
    FedAvg,
    FederatedCallback,
    FedProx,
    History,
    PartialParticipation,
    Partition,
)
from lightning_fed.engines import InProcess, Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


ENGINES = [pytest.param(InProcess(), id="in process"), pytest.param(Processes(2, start_method="fork"), id="processes")]


def loader(examples: int = 48) -> DataLoader[Any]:
    return DataLoader(toy_data(examples), batch_size=8)


def federated(*callbacks: Callback, rounds: int = 2, **options: Any) -> FederatedTrainer:
    return FederatedTrainer(
        max_rounds=rounds, callbacks=[Partition(2, val_fraction=0.25), *callbacks], **{**QUIET, **options}
    )


def toy(*given: Callback, cls: type[ToyModule] = ToyModule) -> Any:
    """A module whose configure_callbacks gives these."""
    torch.manual_seed(0)
    module = cls()
    module.configure_callbacks = lambda: list(given)
    return module


class Noting(Callback):
    """Notes each hook, and on which side it was called; copies note in the same list."""

    notes: list[tuple[str, str]]

    def __init__(self) -> None:
        self.notes = []

    def __deepcopy__(self, memo: Any) -> Noting:
        copied = type(self)()
        copied.notes = self.notes
        return copied

    def note(self, trainer: Any, what: str) -> None:
        self.notes.append(("client" if hasattr(trainer, "client_id") else "server", what))


# ------------------------------------------------------------------------------------------------- the user's own


GRADIENT_HOOKS = ["on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"]


@pytest.mark.parametrize("hook", GRADIENT_HOOKS)
def test_a_callback_on_gradients_at_the_server_is_refused_with_the_way_out(hook):
    kind = type("Clips", (Callback,), {hook: lambda self, *args: None})
    with pytest.raises(
        ConfigurationError, match=rf"Clips writes {hook}, and gradients are the clients'.*client_callbacks=\[Clips"
    ):
        federated(kind())


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_callback_on_batches_at_the_server_is_named_before_the_first_round(hook):
    def stop(self: Any, *args: Any) -> None:
        raise LookupError("the first round")

    kind = type("Pictures", (Callback,), {hook: stop})
    said = pytest.warns(UserWarning, match=rf"Pictures writes {hook}: at the server .*client_callbacks=\[Pictures\(")
    with said, pytest.raises(LookupError):
        federated(kind()).fit(toy(), loader())


def test_nothing_is_said_of_callbacks_that_act_once_a_round(tmp_path):
    class Own(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None: ...
        def on_validation_batch_end(self, *args: Any) -> None: ...

    class Bar(L.pytorch.callbacks.TQDMProgressBar):
        def on_train_batch_end(self, *args: Any) -> None: ...

    class Checkpoint(ModelCheckpoint):
        def on_train_batch_end(self, *args: Any) -> None: ...

    callbacks = [Own(), Bar(), Checkpoint(tmp_path), LearningRateMonitor(), EarlyStopping("train_loss"), History()]
    options = {"enable_checkpointing": True, "enable_progress_bar": True, "logger": CSVLogger(tmp_path)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federated(*callbacks, rounds=1, **options).fit(toy(), loader(), loader())
    assert not [str(one.message) for one in caught if "client_callbacks" in str(one.message)]


@pytest.mark.parametrize("given_by", ["callbacks", "configure_callbacks"])
def test_a_callback_that_answers_to_every_hook_has_written_none_and_is_called_at_the_server(given_by):
    double = Mock(spec=Callback)
    module = toy(*([double] if given_by == "configure_callbacks" else []))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federated(*([double] if given_by == "callbacks" else []), rounds=3).fit(module, loader(), loader())
    assert [double.on_train_epoch_end.call_count, double.on_validation_epoch_end.call_count] == [3, 3]
    assert not [str(one.message) for one in caught if "Mock" in str(one.message)]


def test_a_client_callback_that_answers_to_every_hook_hears_of_each_step():
    heard: list[str] = []

    class Double(Mock):
        def __deepcopy__(self, memo: Any) -> Double:  # a client's copy tells, too
            return self

    double = Double(spec=Callback, state_dict=Callback().state_dict)
    double.on_before_backward.side_effect = lambda *args: heard.append("backward")
    double.on_train_batch_end.side_effect = lambda *args: heard.append("batch")
    federated(rounds=1, client_callbacks=[double], limit_train_batches=2).fit(toy(), loader())
    assert heard == ["backward", "batch"] * 4


@pytest.mark.parametrize(
    ("touch", "asked"),
    [
        (lambda batch: batch.image, "'image'"),
        (lambda batch: batch[0], r"\[0\]"),
        (lambda batch: batch["x"], r"\['x'\]"),
        (lambda batch: len(batch), "its length"),
        (lambda batch: next(iter(batch)), r"\[0\]"),
        (lambda batch: torch.cat(*batch), "its length"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*at the server that comes once a round")
def test_a_callback_that_takes_the_round_for_a_batch_is_told_so(touch, asked):
    class Touching(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            touch(batch)

    with pytest.raises(
        ConfigurationError, match=rf"a training batch is a federated round, .* asked it for {asked}.*client_callbacks="
    ):
        federated(Touching()).fit(toy(), loader())


@pytest.mark.filterwarnings("ignore:.*at the server that comes once a round")
def test_outputs_of_a_round_are_its_metrics():
    found = []

    class Reading(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            found.append((outputs["train_loss"], outputs.get("loss")))
            outputs["loss"]

    with pytest.raises(ConfigurationError, match=r"asked it for outputs\['loss'\]"):
        federated(Reading()).fit(toy(), loader())
    [(loss, missing)] = found
    assert loss > 0
    assert missing is None


@pytest.mark.filterwarnings("ignore:.*at the server that comes once a round")
def test_a_module_that_logs_loss_is_no_stumbling_block():
    class Loss(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    history = History()
    federated(history).fit(toy(cls=Loss), loader())
    assert len(history["loss"]) == 2


@pytest.mark.filterwarnings("ignore:.*at the server that comes once a round")
@pytest.mark.parametrize(
    "hook",
    ["on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"],
)
def test_a_callback_at_the_server_may_log_in_every_hook_of_training(hook, tmp_path):
    def log(self: Any, trainer: Any, *args: Any) -> None:
        self.log("mine", float(trainer.current_round), on_epoch=True)

    logger, history = CSVLogger(tmp_path), History()
    callback = type("Logs", (Callback,), {hook: log})()
    trainer = federated(callback, history, logger=logger)
    trainer.fit(toy(), loader(), loader())
    assert trainer.callback_metrics["mine"] == (1.0 if hook == "on_train_start" else 2.0)
    assert {"mine", "mine_epoch"} & set(logger.experiment.metrics_keys)


# ------------------------------------------------------------------------------------------------- the module's own


class OnBatches(Noting):
    """As anomalib's: changes each batch, in training, validation and testing."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.note(trainer, "train")
        batch[0].mul_(0.0)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
        self.note(trainer, "validate")
        batch[0].mul_(0.0)

    def on_test_batch_start(self, trainer: Any, *args: Any) -> None:
        self.note(trainer, "test")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "epoch")


class Zeroed(ToyModule):
    """Sees only zeros, or fails."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert not batch[0].any()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not batch[0].any()
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_modules_callback_on_batches_acts_on_the_clients_and_on_the_servers_validation(engine):
    callback = OnBatches()
    trainer = federated(rounds=1, engine=engine)
    module = toy(callback, cls=Zeroed)
    trainer.fit(module, loader(), loader(8))
    trainer.test_step = None
    at_server = [what for side, what in callback.notes if side == "server"]
    assert at_server == ["validate"]
    if isinstance(engine, InProcess):
        on_clients = [what for side, what in callback.notes if side == "client"]
        # Two clients: three batches to train on, one that is held out.
        assert on_clients == [*["train"] * 3, "epoch"] * 2 + ["validate"] * 2
    assert type(callback) is OnBatches
    trainer.validate(module, loader(8), verbose=False)
    assert callback.notes[-1] == ("server", "validate")


@pytest.mark.parametrize("hook", GRADIENT_HOOKS)
def test_a_modules_callback_on_gradients_acts_on_the_clients(hook):
    class OnGradients(Noting):
        pass

    setattr(OnGradients, hook, lambda self, trainer, *args: self.note(trainer, hook))
    callback = OnGradients()
    federated(rounds=1).fit(toy(callback), loader())
    assert callback.notes == [("client", hook)] * 6


def test_a_modules_callback_is_each_clients_own():
    class Counting(Callback):
        counts: list[int] = []

        def __init__(self) -> None:
            self.batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1

        def on_train_end(self, *args: Any) -> None:
            self.counts.append(self.batches)

    mine = Counting()
    federated(rounds=1).fit(toy(mine), loader())
    assert Counting.counts == [3, 3]
    assert mine.batches == 0


def test_a_modules_callback_takes_the_place_of_the_users_of_its_kind():
    users, modules = OnBatches(), OnBatches()
    federated(rounds=1, client_callbacks=[users]).fit(toy(modules, cls=Zeroed), loader(), loader(8))
    assert users.notes == []
    assert ("client", "train") in modules.notes


def test_lightnings_own_for_local_training_go_to_the_clients_and_the_others_stay(tmp_path):
    class Seen(Callback):
        kinds: list[list[str]] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.kinds.append(sorted(type(c).__name__ for c in trainer.callbacks))

    given = [GradientAccumulationScheduler({0: 3}), ModelCheckpoint(tmp_path), EarlyStopping("train_loss")]
    trainer = federated(rounds=1, enable_checkpointing=True, client_callbacks=[Seen()])
    trainer.fit(toy(*given), loader())
    assert "GradientAccumulationScheduler" in Seen.kinds[0]
    assert not {"ModelCheckpoint", "EarlyStopping"} & set(Seen.kinds[0])
    kinds = {type(callback).__name__ for callback in trainer.callbacks}
    assert {"ModelCheckpoint", "EarlyStopping"} <= kinds
    assert "GradientAccumulationScheduler" not in kinds


def test_a_second_fit_places_the_modules_callbacks_anew():
    callback, trainer = OnBatches(), federated(rounds=1)
    module = toy(callback, cls=Zeroed)
    trainer.fit(module, loader(), loader(8))
    trainer.fit_loop.max_epochs = 2
    first = len(callback.notes)
    trainer.fit(module, loader(), loader(8))
    assert len(callback.notes) == 2 * first


def test_a_modules_callbacks_do_not_act_on_the_next_module():
    callback, trainer = OnBatches(), federated(rounds=1)
    trainer.fit(toy(callback, cls=Zeroed), loader(), loader(8))
    first = len(callback.notes)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(toy(), loader(), loader(8))
    assert len(callback.notes) == first
    assert callback not in trainer.callbacks
    assert trainer.global_step == 2


# ------------------------------------------------------------------------------------------------- federated ones


def values(module: ToyModule) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def from_module(trainer: FederatedTrainer, module: Any, *callbacks: Callback) -> None:
    module.configure_callbacks = lambda: list(callbacks)


def appended(trainer: FederatedTrainer, module: Any, *callbacks: Callback) -> None:
    trainer.callbacks.extend(callbacks)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", [from_module, appended])
def test_federated_callbacks_are_taken_up_wherever_they_come_from(how, engine):
    def methods() -> list[Callback]:
        return [FedProx(mu=5.0), FedAdam(learning_rate=0.05), PartialParticipation(fraction_train=0.5)]

    expected, module, history = toy(), toy(), History()
    federated(*methods(), engine=engine).fit(expected, loader())
    plain = toy()
    federated(engine=engine).fit(plain, loader())
    trainer = federated(engine=engine)
    how(trainer, module, *methods(), history, ClientMetrics())
    trainer.fit(module, loader())
    pairs = list(zip(values(module), values(expected), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(values(module), values(plain), strict=True))
    assert len(history.rows) == 2
    assert "train_loss/min" in history.names


def test_a_partition_of_the_modules_own_takes_the_place_of_the_users():
    trainer, history = FederatedTrainer(max_rounds=1, callbacks=[Partition(2)], **QUIET), History(per_client=True)
    trainer.fit(toy(Partition(3), history), loader())
    assert [row["client"] for row in history.clients] == [0, 1, 2]
    with pytest.raises(ConfigurationError, match="Partition and ClientData both decide the partition"):
        federated(rounds=1).fit(toy(ClientData([loader()])), loader())


def test_a_partition_beside_num_clients_is_refused_wherever_it_comes_from():
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **QUIET)
    with pytest.raises(ConfigurationError, match="num_clients=2 is short for an IID Partition, and Partition decides"):
        trainer.fit(toy(Partition(3)), loader())


@pytest.mark.parametrize("how", [from_module, appended])
def test_a_second_owner_is_refused_wherever_it_comes_from(how):
    trainer, module = federated(FedAvg()), toy()
    how(trainer, module, FedAdam())
    with pytest.raises(ConfigurationError, match="FedAvg and FedAdam both decide the aggregation"):
        trainer.fit(module, loader())


def test_a_callback_of_an_entry_point_is_taken_up(monkeypatch):
    from lightning.pytorch.trainer.connectors import callback_connector

    history = History()
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda group: [history])
    federated().fit(toy(), loader())
    assert len(history.rows) == 2


@pytest.mark.parametrize("how", [from_module, appended])
def test_a_method_of_ones_own_has_all_its_parts_wherever_it_comes_from(how):
    said = []

    class Method(FederatedCallback):
        def local_callbacks(self) -> list[Callback]:
            said.append("local")
            return []

        def client_mods(self, stage: str) -> list[Any]:
            said.append("mods")

            def mod(message: Any, context: Any, call_next: Any) -> Any:
                said.append("wire")
                return call_next(message, context)

            return [mod] if stage == "train" else []

        def server_strategy(self, strategy: Any) -> Any:
            said.append("server")
            return strategy

        def on_federation_start(self, trainer: Any) -> None:
            said.append("start")

    trainer, module = federated(rounds=1), toy()
    how(trainer, module, Method())
    trainer.fit(module, loader())
    assert [said.count(part) for part in ("server", "start", "mods", "wire")] == [1, 1, 2, 2]
    assert said.count("local") >= 2


def test_the_client_app_of_a_site_has_the_methods_that_its_module_brings():
    said = []

    class Method(FederatedCallback):
        def client_mods(self, stage: str) -> list[Any]:
            said.append(stage)
            return []

    trainer = federated()
    trainer.client_app(toy(Method()), loader())
    assert {"train", "evaluate"} <= set(said)


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_the_tuner_is_refused_and_leaves_the_trainer_as_it_was(search):
    trainer, module = federated(rounds=1), toy()
    module.lr = module.batch_size = 1
    before = list(trainer.callbacks)
    with pytest.raises(ConfigurationError, match=r"(LearningRateFinder|BatchSizeFinder) takes over the training loop"):
        getattr(Tuner(trainer), search)(module, loader())
    assert trainer.callbacks == before
    trainer.fit(module, loader())
    assert trainer.global_step == 1


# ------------------------------------------------------------------------------------------------- learning rates


class Scheduled(ToyModule):
    """Two optimizers' worth of names: a schedule by epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.8, momentum=0.5, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Groups(ToyModule):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.5}, {"params": self.net[2].parameters(), "name": "head"}]
        optimizer = torch.optim.Adam(groups, lr=0.25)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return [optimizer], [{"scheduler": scheduler, "name": "mine", "interval": "step"}]


def plain_names(module: L.LightningModule, tmp_path: Any, **options: Any) -> set[str]:
    monitor = LearningRateMonitor("epoch", **options)
    logger = CSVLogger(tmp_path, "plain")
    L.Trainer(max_epochs=1, callbacks=[monitor], **{**QUIET, "logger": logger}).fit(module, loader())
    return {*monitor.lrs, *(name for name in logger.experiment.metrics_keys if name.startswith(("lr-", "mine")))}


@pytest.mark.parametrize("engine", ENGINES)
def test_learning_rate_monitor_logs_the_clients_rates(tmp_path, engine):
    monitor, history, logger = LearningRateMonitor(), History(), CSVLogger(tmp_path)
    trainer = federated(monitor, history, rounds=3, client_state="global", logger=logger, engine=engine)
    trainer.fit(toy(cls=Scheduled), loader())
    assert history["lr-SGD"] == [0.8, 0.4, 0.2]
    assert monitor.lrs == {"lr-SGD": [0.8, 0.4, 0.2]}
    assert type(monitor) is LearningRateMonitor
    assert not any("TakeOver" in name for name in (*history.names, *trainer.callback_metrics))


@pytest.mark.parametrize("cls", [Scheduled, Groups, ToyModule])
@pytest.mark.parametrize("options", [{}, {"log_momentum": True, "log_weight_decay": True}], ids=["lr", "all"])
def test_learning_rates_have_lightnings_names(cls, options, tmp_path):
    expected = plain_names(toy(cls=cls), tmp_path, **options)
    history, monitor = History(), LearningRateMonitor(**options)
    trainer = federated(monitor, history, rounds=1, logger=CSVLogger(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*(does not have many|num_workers|have no `val|log_momentum|LeafSpec).*")
        trainer.fit(toy(cls=cls), loader())
    assert {name for name in history.names if name.startswith(("lr-", "mine"))} == expected
    assert {*monitor.lrs, *monitor.last_momentum_values, *monitor.last_weight_decay_values} == expected
    assert bool(monitor.last_momentum_values) is bool(monitor.last_weight_decay_values) is bool(options)
    assert not any(name.endswith(("-momentum", "-weight_decay")) for name in monitor.lrs)


@pytest.mark.parametrize(("optimizer", "momentum"), [("SGD", 0.9), ("Adagrad", 0.0)])
def test_only_an_optimizer_without_momentum_is_told_to_have_none(optimizer, momentum, tmp_path):
    class Own(ToyModule):
        def configure_optimizers(self):
            options = {"momentum": momentum} if momentum else {}
            return getattr(torch.optim, optimizer)(self.parameters(), lr=0.1, **options)

    history = History()
    trainer = federated(LearningRateMonitor(log_momentum=True), history, rounds=1, logger=CSVLogger(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(toy(cls=Own), loader())
    said = [one for one in caught if "some optimizers do not have momentum" in str(one.message)]
    assert bool(said) is (optimizer == "Adagrad")
    assert history[f"lr-{optimizer}-momentum"] == pytest.approx([momentum])


def test_learning_rates_of_clients_that_are_trained_as_one(tmp_path):
    history = History()
    trainer = federated(
        LearningRateMonitor(), history, logger=CSVLogger(tmp_path), vectorize_clients="require", client_state="global"
    )
    trainer.fit(toy(cls=Scheduled), loader())
    assert history["lr-SGD"] == [0.8, 0.4]


def test_learning_rate_monitor_of_the_modules_own_is_the_clients_too(tmp_path):
    history = History()
    trainer = federated(history, rounds=1, logger=CSVLogger(tmp_path))
    trainer.fit(toy(LearningRateMonitor(), cls=Scheduled), loader())
    assert history["lr-SGD"] == [0.8]


def test_learning_rate_monitor_without_a_logger_is_refused_as_by_a_trainer():
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match=r"LearningRateMonitor.* no logger"):
        federated(LearningRateMonitor()).fit(toy(), loader())


def test_lambda_callbacks_are_looked_into():
    with pytest.raises(ConfigurationError, match="LambdaCallback writes on_after_backward"):
        federated(LambdaCallback(on_after_backward=lambda *args: None))


def test_a_copy_of_a_placed_callback_is_the_users_class():
    copies = []

    class Copying(Callback):
        def on_train_batch_start(self, *args: Any) -> None: ...

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            copies.append(type(copy.deepcopy(self)))

    federated(rounds=1).fit(toy(Copying()), loader(), loader(8))
    assert set(copies) == {Copying}


def test_a_callback_that_is_a_layer_of_the_module_acts_on_both_sides():
    class Layer(nn.Module, Callback):
        """As anomalib's pre-processor."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch[0].mul_(0.0)

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
            batch[0].mul_(0.0)

    class WithLayer(Zeroed):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def configure_callbacks(self) -> Any:
            return [self.layer]

    module = WithLayer()
    federated(rounds=2).fit(module, loader(), loader(8))
    assert type(module.layer) is Layer


def test_finetuning_of_the_modules_own_goes_to_the_clients():
    with pytest.raises(ConfigurationError, match=r"client_callbacks=\[BackboneFinetuning"):
        federated(BackboneFinetuning())

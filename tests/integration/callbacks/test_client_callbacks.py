"""A client's callbacks mean per client, over all rounds, what they mean in one long local fit."""

from __future__ import annotations

import datetime
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_fed import ClientError, FederatedTrainer
from lightning_fed.callbacks import ClientData, FederatedCallback, History, Partition
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET, sweep
from tests.integration.callbacks.stateful import Decays, Freeze, Scales
from tests.integration.checkpointing.resume_script import StopAt, Stopped
from tests.integration.schedules.runs import FromRound

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:The provided params to be frozen already exist"
)


BATCHES = 3


PLAIN = {**QUIET, "limit_val_batches": 0}


def loader(batches: int = BATCHES) -> DataLoader:
    return DataLoader(toy_data(8 * batches), 8)


def built(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- what a callback holds


class Holds(Callback):
    """Holds parts of the module, the datamodule, and the module itself, in a list, a partial and a bound method."""

    def __init__(self, module: Any, datamodule: Any) -> None:
        self.weight, self.buffer, self.layers = (
            module.net[0].weight,
            module.kept,
            [module.net[0], {"last": module.net[2]}],
        )
        self.module, self.datamodule, self.forward = module, datamodule, module.forward

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        held = (
            (self.module, pl_module),
            (self.datamodule, trainer.datamodule),
            (self.weight, pl_module.net[0].weight),
            (self.buffer, pl_module.kept),
            (self.layers[0], pl_module.net[0]),
            (self.layers[1]["last"], pl_module.net[2]),
            (self.forward.__self__, pl_module),
        )
        for i, (one, other) in enumerate(held):
            assert one is other, i


class WithBuffer(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(3))


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(48), 8)


ENGINES: dict[str, Callable[[], Any]] = {
    "in_process": lambda: "in_process",
    "fork": lambda: Processes(2, start_method="fork"),
    "clean process": lambda: Processes(2, start_method="forkserver"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callback_that_holds_a_layer_acts_on_the_module_s_own(engine: str) -> None:
    module, datamodule = built(WithBuffer), Data() if engine != "clean process" else None
    before = weights(module)
    callbacks = [Freeze(module.net[0]), Holds(module, datamodule)]
    trainer = FederatedTrainer(
        max_rounds=2, num_clients=2, client_callbacks=callbacks, engine=ENGINES[engine](), **QUIET
    )
    trainer.fit(module, None if datamodule else DataLoader(toy_data(48), 8), datamodule=datamodule)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"net.2.weight", "net.2.bias"}
    assert module.net[0].weight.requires_grad
    assert callbacks[0].layer is module.net[0]


def test_all_else_that_a_callback_holds_is_the_clients_own() -> None:
    class Collects(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.layer = nn.Linear(2, 2)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert self.seen == []
            assert torch.equal(self.layer.weight, torch.zeros(2, 2))
            self.seen.append(trainer.client_id)
            nn.init.ones_(self.layer.weight)

    callback = Collects()
    nn.init.zeros_(callback.layer.weight)
    trainer = FederatedTrainer(max_rounds=2, num_clients=2, client_callbacks=[callback], **QUIET)
    trainer.fit(built(ToyModule), loader())
    assert callback.seen == []


# ------------------------------------------------------------------------------------------- callbacks with a state


def long_fit(build: Callable[[], Any], epochs: int, *callbacks: Callback, data: Any = None) -> dict[str, Tensor]:
    module = built(build)
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **PLAIN)
    trainer.fit(module, loader() if data is None else data)
    return weights(module)


def federated(build: Callable[[], Any], rounds: int, *callbacks: Callback, **options: Any) -> dict[str, Tensor]:
    """The weights of the only client."""
    module = built(build)
    trainer = FederatedTrainer(
        max_rounds=rounds, callbacks=[ClientData([loader()])], client_callbacks=list(callbacks), **QUIET, **options
    )
    trainer.fit(module)
    return weights(module)


@pytest.mark.parametrize("engine", ["in_process", "fork"])
@pytest.mark.parametrize("client_state", sweep(["global", "reset", "carry"], ["global", "carry"]))
def test_what_a_callback_keeps_stays_with_the_client(client_state: Any, engine: str) -> None:
    expected = long_fit(ToyModule, 6, Decays())
    options = {"client_state": client_state, "engine": ENGINES[engine]()}
    assert_same(federated(ToyModule, 6, Decays(), **options), expected)
    assert_same(federated(ToyModule, 3, Decays(), local_epochs=2, **options), expected)


NOTES: list[Any] = []


class Notes(Callback):
    """Counts its fits, and notes when its state comes back."""

    fits = 0

    def note(self, trainer: Any, what: str) -> None:
        NOTES.append((trainer.current_round, trainer.client_id, what, self.fits))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.note(trainer, f"setup {stage}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fits = state_dict["fits"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "fit starts")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "validation starts")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.fits += 1

    def state_dict(self) -> dict[str, Any]:
        return {"fits": self.fits}


def test_a_state_comes_back_when_lightning_would_restore_it() -> None:
    NOTES.clear()
    trainer = FederatedTrainer(
        max_rounds=3,
        callbacks=[ClientData([(loader(), loader())] * 2), FromRound(2)],
        client_callbacks=[Notes()],
        **QUIET,
    )
    trainer.fit(built(ToyModule))
    # Client 0 trains in round 1, client 1 in rounds 2 and 3: with what it kept itself, as soon as all are set up.
    assert [note for note in NOTES if note[2] == "fit starts"] == [
        (1, 0, "fit starts", 0),
        (2, 1, "fit starts", 0),
        (3, 1, "fit starts", 1),
    ]
    assert {fits for *_, what, fits in NOTES if what.startswith("setup")} == {0}
    assert [note for note in NOTES if note[2] == "validation starts"] == [
        (1, 0, "validation starts", 1),
        (2, 1, "validation starts", 1),
        (3, 1, "validation starts", 2),
    ]


class Method(FederatedCallback):
    """A method whose clients keep something from round to round."""

    def local_callbacks(self) -> list[Callback]:
        return [Decays()]


def test_a_method_s_callbacks_keep_their_state_too() -> None:
    module = built(ToyModule)
    FederatedTrainer(max_rounds=6, callbacks=[ClientData([loader()]), Method()], **QUIET).fit(module)
    assert_same(weights(module), long_fit(ToyModule, 6, Decays()))


def test_lightnings_own_callbacks_with_a_state_go_on() -> None:
    waits: list[int] = []

    class Looks(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            waits.append(trainer.early_stopping_callback.wait_count)

    federated(ToyModule, 5, EarlyStopping("train_loss", patience=99, min_delta=100.0), Looks())
    assert waits == [0, 0, 1, 2, 3]
    federated(ToyModule, 3, SpikeDetection(exclude_batches_path="nowhere"))


def test_a_state_that_cannot_be_kept_is_an_error_that_names_the_callback() -> None:
    class Since(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"since": datetime.datetime.now()}

    with pytest.raises(ClientError, match=r"client 0 has a client callback Since whose state_dict\(\) cannot be kept"):
        federated(ToyModule, 1, Since())


def test_clients_do_not_share_their_callbacks_state() -> None:
    seen: list[Any] = []

    class Counts(Callback):
        fits = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append((trainer.current_round, trainer.client_id, self.fits))
            self.fits += 1

        def state_dict(self) -> dict[str, Any]:
            return {"fits": self.fits}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.fits = state_dict["fits"]

    callbacks = [ClientData([loader(), loader()]), FromRound(3)]
    FederatedTrainer(max_rounds=5, callbacks=callbacks, client_callbacks=[Counts()], **QUIET).fit(built(ToyModule))
    assert seen == [(1, 0, 0), (2, 0, 1), (3, 1, 0), (4, 1, 1), (5, 1, 2)]


def test_pruning_that_does_not_go_on_is_said() -> None:
    def pruning() -> ModelPruning:
        return ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"])

    with pytest.warns(UserWarning, match="ModelPruning begins anew on a client in each round"):
        federated(ToyModule, 2, pruning())
    assert_same(federated(ToyModule, 1, pruning(), local_epochs=2), long_fit(ToyModule, 2, pruning()))


# ------------------------------------------------------------------------------------------- finetuning


class Tuned(L.LightningModule):
    """A backbone and a head; only the head is the optimizer's at first."""

    def __init__(self, momentum: float = 0.0, scheduler: str | None = None) -> None:
        super().__init__()
        self.momentum, self.scheduler = momentum, scheduler
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.middle(self.backbone(batch[0]))), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), 0.1, momentum=self.momentum)
        if self.scheduler is None:
            return optimizer
        if self.scheduler == "step":
            schedule = {"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, 40), "interval": "step"}
        else:
            schedule = {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.9)}
        return [optimizer], [schedule]


class Unfreezes(BaseFinetuning):
    """Unfreezes the middle at one epoch, the backbone at another."""

    def __init__(self, middle: int = 1, backbone: int = 3) -> None:
        super().__init__()
        self.middle, self.backbone = middle, backbone

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.backbone, pl_module.middle])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        for name, when in (("middle", self.middle), ("backbone", self.backbone)):
            if epoch == when:
                self.unfreeze_and_add_param_group(getattr(pl_module, name), optimizer, initial_denom_lr=2)


TUNINGS: dict[str, Callable[[], BaseFinetuning]] = {
    "Unfreezes": Unfreezes,
    "BackboneFinetuning": lambda: BackboneFinetuning(2, lambda epoch: 1.3, should_align=True, verbose=False),
}


class Watch(Callback):
    """Notes at each epoch's first batch what is frozen, and the optimizer's groups."""

    def __init__(self, rates: bool = True) -> None:
        self.seen: list[Any] = []
        self.rates = rates

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        groups = [
            ([names[id(parameter)] for parameter in group["params"]], group["lr"] if self.rates else None)
            for group in trainer.optimizers[0].param_groups
        ]
        trained = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        self.seen.append((trainer.current_epoch, batch_idx, trained, groups))

    def __deepcopy__(self, memo: Any) -> Watch:
        return self


def watched(build: Callable[[], Any], epochs: int, tuning: str, rates: bool = True) -> tuple[list[Any], dict[str, Any]]:
    watch = Watch(rates)
    return watch.seen, long_fit(build, epochs, TUNINGS[tuning](), watch)


@pytest.mark.parametrize("scheduler", sweep([None, "epoch", "step"], [None, "step"]))
@pytest.mark.parametrize("tuning", TUNINGS)
def test_finetuning_stands_at_the_clients_epoch(tuning: str, scheduler: str | None) -> None:
    def build() -> Tuned:
        return Tuned(scheduler=scheduler)

    expected, trained = watched(build, 6, tuning)
    for rounds, epochs in ((6, 1), (3, 2)):
        watch = Watch()
        assert_same(federated(build, rounds, TUNINGS[tuning](), watch, local_epochs=epochs), trained)
        assert watch.seen == expected


@pytest.mark.parametrize("late", sweep([2, 4, 5], [4]))
@pytest.mark.parametrize("scheduler", ["epoch", "step"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_finetuning_stands_at_the_epoch_of_a_client_that_comes_in_late(tuning: str, scheduler: str, late: int) -> None:
    def build() -> Tuned:
        return Tuned(scheduler=scheduler)

    expected, _ = watched(build, 6, tuning)
    watch = Watch()
    callbacks = [ClientData([loader(1), loader()]), FromRound(late)]
    trainer = FederatedTrainer(max_rounds=6, callbacks=callbacks, client_callbacks=[TUNINGS[tuning](), watch], **QUIET)
    trainer.fit(built(build))
    assert watch.seen[late - 1 :] == expected[(late - 1) * BATCHES :]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_finetuning_with_reset_has_the_groups_without_the_schedules_steps(tuning: str) -> None:
    def build() -> Tuned:
        return Tuned(scheduler="epoch")

    expected, trained = watched(Tuned, 6, tuning)
    watch = Watch()
    assert_same(federated(build, 6, TUNINGS[tuning](), watch, client_state="reset"), trained)
    assert watch.seen == expected


@pytest.mark.parametrize(
    ("engine", "scheduler"),
    sweep(
        itertools.product(["in_process", "fork"], [None, "epoch", "step"]), [("in_process", None), ("fork", "epoch")]
    ),
)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_finetuning_goes_on_bit_for_bit_where_optimizers_are_carried(
    tuning: str, scheduler: str | None, engine: str
) -> None:
    def build() -> Tuned:
        return Tuned(0.9, scheduler)

    expected, trained = watched(build, 6, tuning)
    for rounds, epochs in ((6, 1), (3, 2)):
        watch = Watch()
        options = {"client_state": "carry", "local_epochs": epochs, "engine": ENGINES[engine]()}
        assert_same(federated(build, rounds, TUNINGS[tuning](), watch, **options), trained)
        if engine == "in_process":
            assert watch.seen == expected


class Sits(FromRound):
    """Client 0 trains in all rounds but some, where client 1 does."""

    def __init__(self, *out: int) -> None:
        super().__init__(0)
        self.out = out

    def sample(self, stage: Any, round: int, num_clients: int, seed: int) -> list[int]:
        return [int(round in self.out)]


@pytest.mark.parametrize("out", sweep([[2], [3], [2, 3, 4], [4, 5]], [[2, 3, 4]]))
@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_was_unfrozen_while_a_client_sat_out_is_unfrozen_when_it_comes_back(tuning: str, out: list[int]) -> None:
    expected, _ = watched(lambda: Tuned(0.9), 6, tuning, rates=False)
    watch = Watch(rates=False)
    callbacks = [ClientData([loader(), loader(1)]), Sits(*out)]
    trainer = FederatedTrainer(
        max_rounds=6, callbacks=callbacks, client_callbacks=[TUNINGS[tuning](), watch], client_state="carry", **QUIET
    )
    trainer.fit(built(lambda: Tuned(0.9)))
    by_epoch = {epoch: (trained, groups) for epoch, _, trained, groups in expected}
    assert {epoch for epoch, *_ in watch.seen} == set(range(6))
    for epoch, _, *what in watch.seen:
        assert tuple(what) == by_epoch[epoch]


@pytest.mark.parametrize("client_state", ["global", "carry"])
@pytest.mark.parametrize("steps", sweep([2, 3, 4, 9], [3, 9]))
def test_finetuning_by_local_steps_happens_once_an_epoch(steps: int, client_state: Any) -> None:
    called: list[int] = []

    class Counts(Unfreezes):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            called.append(epoch)
            super().finetune_function(pl_module, epoch, optimizer)
            if epoch > 1:
                optimizer.param_groups[-1]["lr"] *= 0.9

    def build() -> Tuned:
        return Tuned(0.9)

    watch = Watch()
    trainer = L.Trainer(max_epochs=-1, max_steps=5 * steps, callbacks=[Counts(), watch], **PLAIN)
    trainer.fit(built(build), loader())
    at = {step: groups for step, (*_, groups) in enumerate(watch.seen)}
    watch = Watch()
    called.clear()
    federated(build, 5, Counts(), watch, local_steps=steps, client_state=client_state)
    for round in range(5):  # where each round begins
        assert watch.seen[round * steps][-1] == at[round * steps], round


def test_a_verbose_or_a_watching_callback_is_not_called_for_epochs_that_are_over() -> None:
    seen: list[int] = []
    note = LambdaCallback(on_train_epoch_start=lambda trainer, module: seen.append(trainer.current_epoch))
    federated(Tuned, 4, Unfreezes(), note)
    assert seen == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------- killed and resumed


def run(directory: Path, *callbacks: Callback, ckpt_path: str | None = None, **options: Any) -> Any:
    """Three clients, of which two take part in a round; saves in ``directory``."""
    module, history = built(lambda: Tuned(0.9, "step")), History(per_client=True)
    trainer = FederatedTrainer(
        max_rounds=6,
        callbacks=[
            Partition(3),
            history,
            *callbacks,
            ModelCheckpoint(directory, save_top_k=-1, save_last=True),
        ],
        client_callbacks=[Unfreezes(2, 4), Scales(), TUNINGS["BackboneFinetuning"]()][: options.pop("many", 2)],
        **{**QUIET, "enable_checkpointing": True, **options},
    )
    trainer.fit(module, DataLoader(toy_data(60), 5, shuffle=True), ckpt_path=ckpt_path)
    return weights(module), repr((history.rows, history.clients))


@pytest.mark.parametrize(
    ("engine", "client_state"),
    sweep(
        itertools.product(["in_process", "fork"], ["global", "carry"]), [("in_process", "global"), ("fork", "carry")]
    ),
)
def test_a_run_that_was_killed_goes_on_with_what_clients_callbacks_keep(
    tmp_path: Path, client_state: Any, engine: str
) -> None:
    options = {"client_state": client_state, "engine": ENGINES[engine]()}
    expected = run(tmp_path / "whole", client_state=client_state)
    stopped = tmp_path / "stopped"

    def stop() -> None:
        shutil.copytree(stopped, tmp_path / "snapshot")
        raise Stopped

    with pytest.raises(Stopped):
        run(stopped, StopAt("round start", stop), **options)
    shutil.rmtree(stopped)
    (tmp_path / "snapshot").rename(stopped)
    found = run(stopped, ckpt_path="last", **{**options, "engine": ENGINES[engine]()})
    assert_same(found[0], expected[0])
    assert found[1] == expected[1]


# ------------------------------------------------------------------------------------------- vectorized clients


class Elementwise(Unfreezes):
    acts_elementwise = True


class ElementwiseState(Callback):
    acts_elementwise = True

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (Elementwise(), "the client callback Elementwise freezes and unfreezes layers by epoch"),
        (ElementwiseState(), "the client callback ElementwiseState keeps a state with each client"),
    ],
)
def test_clients_are_not_trained_as_one_with_callbacks_that_are_each_clients_own(
    callback: Callback, reason: str
) -> None:
    with pytest.warns(UserWarning, match=f"clients train one after the other: {reason}"):
        federated(Tuned, 2, callback, vectorize_clients=2)

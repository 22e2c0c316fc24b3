"""The server's view of a module: an epoch is a round, and the user's training hooks rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader

from lightning_fed.errors import ConfigurationError
from lightning_fed.server import view
from lightning_fed.server.view import ApplyWeights, RoundItem, RoundLoader, RoundOutputs, ServerView
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.views import viewed_as


class Runner:
    """What a view asks of the server's trainer; notes what it asked."""

    seems_automatic = True
    round_metrics = {"loss": 0.5, "acc": 1.0}

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def run_round(self) -> None:
        self.asked.append("run_round")

    def apply_weights(self) -> None:
        self.asked.append("apply_weights")

    def claim_names(self) -> None:
        self.asked.append("claim_names")

    def place_callbacks(self, given: Sequence[Callback]) -> list[Callback]:
        self.asked.append(given)
        return []

    def where_shown(self, name: str) -> dict[str, bool | None]:
        return {"prog_bar": name == "loss"}


class Noting(ToyModule):
    """Notes which of its hooks run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def on_train_epoch_end(self) -> None:
        self.ran.append("on_train_epoch_end")

    def on_after_backward(self) -> None:
        self.ran.append("on_after_backward")

    def on_validation_end(self) -> None:
        self.ran.append("on_validation_end")

    def on_validation_epoch_end(self) -> None:
        self.ran.append("on_validation_epoch_end")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.ran.append("on_train_batch_start")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("at the server")


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def module(runner: Runner) -> Iterator[Any]:
    module: Any = Noting()
    module._trainer = runner
    with viewed_as(module, ServerView):
        yield module
    assert type(module) is Noting


# -------------------------------------------------------------------------------------------------------- the items


@pytest.mark.parametrize(
    ("touch", "asked"),
    [
        (lambda item: item[0], r"it for \[0\]"),
        (lambda item: item["x"], r"it for \['x'\]"),
        (lambda item: len(item), "it for its length"),
        (lambda item: item.shape, "it for 'shape'"),
        (lambda item: next(iter(item)), r"it for \[0\]"),
    ],
)
def test_a_round_s_item_says_that_it_is_no_batch(touch: Callable[[Any], Any], asked: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"a federated round, without data: .* {asked}\. .*client_callbacks="):
        touch(RoundItem())


def test_a_round_s_item_may_be_asked_whether_it_is_there() -> None:
    assert RoundItem()
    assert not hasattr(RoundItem(), "__len_hint__")
    assert RoundItem() != RoundItem()
    assert next(iter(vars(RoundItem()).values())).shape == (1,)


def test_a_loader_gives_one_item_an_epoch_however_often_it_is_read() -> None:
    loader = RoundLoader()
    assert len(loader) == 1
    assert [[type(item) for item in loader] for _ in range(2)] == [[RoundItem]] * 2


def test_outputs_of_a_round_have_its_metrics_and_nothing_else() -> None:
    outputs = RoundOutputs(loss=torch.tensor(0.5)).copy()
    assert type(outputs) is RoundOutputs
    assert outputs["loss"] == 0.5
    with pytest.raises(ConfigurationError, match=r"outputs\['logits'\]"):
        outputs["logits"]
    assert outputs.get("logits") is None


def test_the_optimizer_s_step_applies_the_weights_after_the_closure() -> None:
    done: list[str] = []
    optimizer = ApplyWeights(lambda: done.append("weights"))
    optimizer.step(lambda: done.append("closure"))
    optimizer.step()
    assert done == ["closure", "weights", "weights"]
    assert optimizer.param_groups[0]["lr"] == 1.0


# ---------------------------------------------------------------------------------------------------------- the hooks


def test_a_batch_is_a_round_and_a_step_applies_its_weights(
    module: Any, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    monkeypatch.setattr(LightningModule, "log", lambda self, *args, **how: logged.append((*args, how)))
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer
    module.on_train_batch_start(RoundItem(), 0)
    outputs = module.training_step(RoundItem(), 0)
    assert runner.asked == ["run_round", "apply_weights"]
    how = {"on_step": True, "on_epoch": False, "batch_size": 1, "add_dataloader_idx": False}
    assert logged == [("loss", 0.5, {"prog_bar": True, **how}), ("acc", 1.0, {"prog_bar": False, **how})]
    assert outputs == {"loss": torch.tensor(0.5), "acc": torch.tensor(1.0)}


def test_the_user_s_training_hooks_rest_and_those_of_validation_do_not(module: Any, runner: Runner) -> None:
    module.on_train_epoch_end()
    module.on_after_backward()
    module.on_train_batch_start(RoundItem(), 0)
    assert module.ran == []
    module.on_validation_epoch_end()
    module.on_validation_end()
    assert module.ran == ["on_validation_epoch_end", "on_validation_end"]
    assert runner.asked == ["run_round", "claim_names"]


@pytest.mark.parametrize("several", [True, False])
def test_callbacks_that_the_module_configures_are_placed(module: Any, runner: Runner, several: bool) -> None:
    callback = Callback()
    module.configure_callbacks = lambda: (callback,) if several else callback
    with viewed_as(module, ServerView):  # takes out of sight what stands on the instance
        assert module.configure_callbacks() == []
    assert runner.asked == [[callback]]


def test_batch_hooks_know_nothing_of_a_rounds_item(module: Any) -> None:
    assert not module._fed_is_batch(RoundItem())
    assert module._fed_is_batch([torch.zeros(1)])


def test_optimization_seems_automatic_at_the_server_and_what_is_set_is_for_the_clients(runner: Runner) -> None:
    module: Any = Noting()
    with viewed_as(module, ServerView):
        assert not module.automatic_optimization  # without a trainer
        module._trainer = runner
        assert module.automatic_optimization
        module.automatic_optimization = False
        assert module.automatic_optimization
    assert not module.automatic_optimization


class WithLoader(ServerView):
    def train_dataloader(self) -> Any:
        return "the view's"


def test_the_user_s_own_loader_is_found_under_a_view() -> None:
    class Own(ToyModule):
        def train_dataloader(self) -> Any:
            return DataLoader(toy_data(4))

    module: Any = Own()
    with viewed_as(module, WithLoader):
        assert module.train_dataloader() == "the view's"
        assert isinstance(view.user_train_dataloader(module), DataLoader)
        module.__dict__["train_dataloader"] = lambda: "on the instance"
        assert view.user_train_dataloader(module) == "on the instance"

"""What keeps clients from being vectorized, found by a look at what is written; how it is explained."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed.client.local.work import LocalOptions, LocalTask, LocalWork
from lightning_fed.client.vectorized import probe
from lightning_fed.client.vectorized.probe import Candidate, count_batches, explain, run_probe
from lightning_fed.client.vectorized.rng import NotStackable
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.data import ClientLoaders


def work(module: Any = None, datamodule: Any = None, loaders: Any = None, **options: Any) -> LocalWork:
    module = ToyModule() if module is None else module
    task = LocalTask(client=0, round=1, seed=0, weights=dict(module.state_dict()))
    return LocalWork(module, datamodule, loaders or ClientLoaders(), task, LocalOptions(**options))


def with_hooks(base: type, *hooks: str, **attributes: Any) -> Any:
    """An instance of a class that overrides hooks."""
    return type("Written", (base,), {**dict.fromkeys(hooks, lambda self, *args: None), **attributes})()


def with_lstm() -> ToyModule:
    module = ToyModule()
    module.lstm = nn.LSTM(2, 2)
    return module


def by_hand() -> ToyModule:
    module = ToyModule()
    module.automatic_optimization = False
    return module


CALLBACK = "the client callback Written"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a hook that sees a batch": ({"module": with_hooks(ToyModule, "on_train_batch_start")}, "train", "on_train_batch"),
    "a hook of its own log": ({"module": with_hooks(ToyModule, "log")}, "evaluate", "Written writes log"),
    "a validation hook": ({"module": with_hooks(ToyModule, "on_validation_end")}, "evaluate", "on_validation_end"),
    "an undeclared hook": (
        {"module": with_hooks(ToyModule, "on_train_start")},
        "train",
        "Written writes on_train_start, and does not say acts_elementwise = True",
    ),
    "a datamodule's hook": (
        {"datamodule": with_hooks(LightningDataModule, "transfer_batch_to_device")},
        "train",
        "Written writes transfer_batch_to_device",
    ),
    "LSTM": ({"module": with_lstm()}, "evaluate", "nn.LSTM keeps its weights"),
    "overfit": ({"trainer": {"overfit_batches": 2}}, "train", "overfit_batches=2"),
    "fp16": ({"trainer": {"precision": "16-mixed"}}, "train", "precision='16-mixed' scales the loss"),
    "finetuning": ({"callbacks": [BackboneFinetuning()]}, "train", "BackboneFinetuning freezes and unfreezes"),
    "a callback with a state": ({"callbacks": [with_hooks(Callback, "state_dict")]}, "train", f"{CALLBACK} keeps a st"),
    "a callback on batches": (
        {"callbacks": [with_hooks(Callback, "on_train_batch_end")]},
        "train",
        f"{CALLBACK} writes on_train_batch_end",
    ),
    "an undeclared callback": (
        {"callbacks": [with_hooks(Callback, "on_after_backward")]},
        "train",
        f"{CALLBACK} writes on_after_backward, and does not say",
    ),
    "a method's callback": (
        {"method_callbacks": lambda: [with_hooks(Callback, "on_before_zero_grad")]},
        "train",
        f"{CALLBACK} writes on_before_zero_grad, and",
    ),
    "manual optimization": ({"module": by_hand()}, "train", "ToyModule optimizes manually"),
    "kept optimizers": ({"client_state": "carry"}, "train", "client_state='carry' keeps"),
    "local validation": ({"local_validation": True}, "train", "local_validation=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_written_and_cannot_be_stacked_is_named(name: str) -> None:
    options, stage, reason = REFUSED[name]
    with pytest.raises(NotStackable) as error:
        Candidate([work(**options)], stage).refuse()
    assert reason in str(error.value)


ACCEPTED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing special": ({}, "train"),
    "a training hook, in evaluation": ({"module": with_hooks(ToyModule, "on_train_batch_start")}, "evaluate"),
    "a validation hook, in training": ({"module": with_hooks(ToyModule, "on_validation_end")}, "train"),
    "a declared hook": ({"module": with_hooks(ToyModule, "on_train_start", acts_elementwise=True)}, "train"),
    "a declared callback": ({"callbacks": [with_hooks(Callback, "on_after_backward", acts_elementwise=True)]}, "train"),
    "an undeclared callback, in evaluation": ({"callbacks": [with_hooks(Callback, "on_after_backward")]}, "evaluate"),
    "finetuning, in evaluation": ({"callbacks": [BackboneFinetuning()]}, "evaluate"),
    "manual optimization, in evaluation": ({"module": by_hand()}, "evaluate"),
    "kept optimizers, in evaluation": ({"client_state": "carry"}, "evaluate"),
    "bf16": ({"trainer": {"precision": "bf16-mixed"}}, "train"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_can_be_stacked_is_not_refused(name: str) -> None:
    options, stage = ACCEPTED[name]
    Candidate([work(**options)], stage).refuse()


def test_mods_and_an_unknown_lightning_are_refused_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotStackable, match=r"^client mods work on one client's message$"):
        Candidate([work(by_hand())], "train", has_mods=True).refuse()
    monkeypatch.setattr(probe, "is_known", lambda: False)
    monkeypatch.setattr(probe, "why_slower", lambda: "Lightning 9 is not known: so it is slower")
    with pytest.raises(NotStackable, match=r"^Lightning 9 is not known$"):
        Candidate([work()], "train", has_mods=True).refuse()


def test_a_refusal_is_the_reason_and_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_run", lambda *args, **options: pytest.fail("tried"))
    assert run_probe(Candidate([work(by_hand())], "train")).reason == "ToyModule optimizes manually"


@pytest.mark.parametrize(
    ("stage", "must_pay", "refused"), [("train", True, True), ("train", False, False), ("evaluate", True, False)]
)
def test_what_would_be_slower_is_refused_where_training_must_pay(stage: str, must_pay: bool, refused: bool) -> None:
    module = ToyModule(hidden=100_000)
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    candidate = Candidate([work(module)], stage, must_pay=must_pay)
    weights = 4 * (100_000 * (8 + 1 + 2) + 2)
    if refused:
        with pytest.raises(NotStackable, match=r"with 4\.2 MiB of weights a client they would be slower"):
            candidate.check_cost()
    else:
        cost = candidate.check_cost(kept=7)
        assert (cost.weights, cost.kept) == (weights, 7)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(toy_data(16))


def test_batches_are_counted_of_the_stages_loader() -> None:
    loaders = ClientLoaders(DataLoader(toy_data(20), 8), DataLoader(toy_data(20), 4))
    assert (count_batches(loaders, "train"), count_batches(loaders, "evaluate")) == (3, 5)


@pytest.mark.parametrize(
    ("loaders", "reason"),
    [
        (ClientLoaders(datamodule=LightningDataModule()), "each client has a datamodule of its own"),
        (ClientLoaders(DataLoader(Stream(), 8)), "its data is an IterableDataset"),
        (ClientLoaders(DataLoader(toy_data(3), 8, drop_last=True)), "a client has no batches"),
    ],
)
def test_batches_that_cannot_be_counted_are_a_reason(loaders: ClientLoaders, reason: str) -> None:
    with pytest.raises(NotStackable, match=reason):
        count_batches(loaders, "train")


# ------------------------------------------------------------------------------------------------------- explanations


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NotStackable("no two\n  are  alike. At all."), "no two are alike. At all."),
        (ValueError("no  disk. And much more."), "ValueError: no disk"),
        (RuntimeError("vmap: data-dependent control flow (long)"), "what it does depends on the data"),
        (RuntimeError("vmap: It looks like you're calling .item() on"), "it calls `.item()` on a per-client value"),
        (AttributeError("no attribute combined_loader"), "it asks the trainer for a loader, which vectorized"),
        (ValueError("x" * 300), "ValueError: " + "x" * 200),
    ],
)
def test_an_error_is_explained_in_a_clause(error: Exception, text: str) -> None:
    clause = explain(error)
    assert clause.startswith(text)
    assert len(clause) < 230
    line = explain(raised(error)).removeprefix(clause)
    number = raised.__code__.co_firstlineno + 2
    assert line == f" (test_probe.py, line {number}: `raise error`)"


def test_the_line_is_the_users_and_not_a_librarys() -> None:
    def fails(tensor: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(tensor, torch.ones(3, 3))

    with pytest.raises(RuntimeError) as error:
        nn.Sequential().forward(fails(torch.ones(2, 2)))
    assert "`return nn.functional.linear(tensor, torch.ones(3, 3))`" in explain(error.value)

"""What a server callback changes between rounds reaches the clients, in whichever process they train."""

from __future__ import annotations

import threading
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import FederatedCallback, Partition
from lightning_fed.engines import Engine, InProcess, Processes
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.weights import Weights, read
from tests.helpers import QUIET, sweep


class Reads(ToyModule):
    """Its step reads all that callbacks change."""

    kind = 1.0

    def __init__(self) -> None:
        super().__init__(hidden=4)
        self.scale, self.kept = 1.0, {"factors": [1.0], "chosen": self.net[0]}
        self.register_buffer("bank", torch.ones(8), persistent=False)
        self.beside = [torch.ones(8)]
        self.isolation, self.user, self.order = 1.0, UserDict(factor=1.0), {"a": 1.1, "b": 0.9}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] * self.kind * self.user["factor"] * self.isolation * self.kept.get("trainer", 1.0)
        x = x * next(iter(self.order.values())) * self.scale * self.kept["factors"][-1] * self.bank * self.beside[0]
        if hasattr(self, "added"):
            x = self.added(x)
        loss = super().training_step((x, batch[1]), batch_idx)
        return loss + self.kept["chosen"].weight.square().mean()


class Scales(L.Callback):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.factor


class Changes(FederatedCallback):
    """Changes something after each round."""

    def __init__(self, change: Callable[[Any, Any, int], Any]) -> None:
        self.change, self.factor, self.history = change, 1.0, [1.0]

    def on_round_end(self, trainer: Any, round: int, metrics: Any) -> None:
        self.change(trainer.lightning_module, self, round)

    def local_callbacks(self) -> list[L.Callback]:
        return [Scales(self.factor * self.history[-1])]

    def client_mods(self, stage: str) -> list[Any]:
        def sharpen(message: Any, context: Any, call_next: Any) -> Any:
            reply = call_next(message, context)
            for array in reply.content["arrays"].values():
                array.__dict__["tensor"].mul_(self.factor)
            return reply

        return [sharpen] if stage == "train" else []


def _thaw(module: Any, callback: Any, round: int) -> None:
    module.net[0].weight.requires_grad_(round % 2 == 0)


def _in_place(module: Any, callback: Any, round: int) -> None:
    module.bank.mul_(1.1)
    module.beside[0].mul_(0.9)


def _hook(module: Any, callback: Any, round: int) -> None:
    module.net[1].register_forward_hook(lambda layer, args, out: out * 1.2)


CHANGES: dict[str, Callable[[Any, Any, int], Any]] = {
    "an attribute": lambda module, callback, round: setattr(module, "scale", module.scale * 0.8),
    "a list in a dict": lambda module, callback, round: module.kept["factors"].append(1.0 + round),
    "requires_grad": _thaw,
    "buffers and tensors in place": _in_place,
    "a buffer, rebound": lambda module, callback, round: setattr(module, "bank", module.bank * 1.1),
    "which layer": lambda module, callback, round: module.kept.update(chosen=module.net[2 * (round % 2)]),
    "a new layer without weights": lambda module, callback, round: setattr(module, "added", nn.Tanh()),
    "a new function": lambda module, callback, round: setattr(module, "added", lambda x: x + round),
    "a hook on a layer": _hook,
    "its own state": lambda module, callback, round: setattr(callback, "factor", 1 - round / 10),
    "a list of its own": lambda module, callback, round: callback.history.append(1 + round / 10),
    "a class": lambda module, callback, round: setattr(Reads, "dropout", round),
    "its class": lambda module, callback, round: setattr(type(module), "kind", 1 + round / 5),
    "a hyperparameter": lambda module, callback, round: module.hparams.update(lr=module.hparams.lr * 0.7),
    "a UserDict": lambda module, callback, round: module.user.update(factor=1 + round / 5),
    "an attribute with a name of ours": lambda module, callback, round: setattr(module, "isolation", 1 + round / 5),
    "a key with a name of Lightning's": lambda module, callback, round: module.kept.update(trainer=1 + round / 5),
    "an order": lambda module, callback, round: module.order.update(a=module.order.pop("a")),
}


def run(change: Any, engine: Engine, rounds: int = 3, **options: Any) -> Weights:
    torch.manual_seed(0)
    module = Reads()
    trainer = FederatedTrainer(
        max_rounds=rounds, seed=1, engine=engine, callbacks=[Partition(4), Changes(change)], **{**QUIET, **options}
    )
    trainer.fit(module, DataLoader(toy_data(32), 8, shuffle=True))
    return read(module)


@pytest.fixture(autouse=True)
def a_class_as_it_was() -> Iterator[None]:
    yield
    Reads.kind = 1.0


# One of each way to change something: by setting it, in place, in the module's layers and hooks, the callback, a class.
FEW = (
    *("an attribute", "a list in a dict", "requires_grad", "buffers and tensors in place", "a new function"),
    *("a hook on a layer", "its own state", "its class"),
)


@pytest.mark.parametrize("change", sweep(CHANGES, FEW))
def test_a_change_between_rounds_acts_on_clients_in_other_processes(change: str) -> None:
    ends = []
    for engine in (InProcess(), Processes(2, start_method="fork")):
        Reads.kind = 1.0
        ends.append(run(CHANGES[change], engine))
    here, there = ends
    torch.testing.assert_close(here, there, rtol=0, atol=0)


def test_changes_reach_workers_that_start_late() -> None:
    """In round 1 there is work for one worker only; the others start when something has changed already."""

    class Grows(Changes):
        def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Any) -> None:
            trainer.lightning_module.scale *= 0.9

    from lightning_fed.callbacks.base import CohortOwner

    class Growing(CohortOwner):
        def sample(self, stage: Any, round: int, num_clients: int, seed: int) -> list[int]:
            return list(range(min(round, num_clients)))

    ends = []
    for engine in (InProcess(), Processes(3)):
        torch.manual_seed(0)
        module = Reads()
        callbacks = [Partition(4), Grows(CHANGES["a list in a dict"]), Growing()]
        FederatedTrainer(max_rounds=4, seed=1, engine=engine, callbacks=callbacks, **QUIET).fit(
            module, DataLoader(toy_data(32), 8, shuffle=True)
        )
        ends.append(read(module))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_what_cannot_be_sent_is_refused_by_name() -> None:
    def change(module: Any, callback: Any, round: int) -> None:
        module.added = threading.Lock()

    with pytest.raises(ConfigurationError, match=r"module changed between two rounds, .* cannot be sent .* TypeError"):
        run(change, Processes(2, start_method="fork"))


def test_a_hook_on_a_weight_is_refused_by_name() -> None:
    def change(module: Any, callback: Any, round: int) -> None:
        module.net[0].weight.register_hook(lambda gradient: gradient)

    with pytest.raises(ConfigurationError, match=r"A hook on module.*weight was registered"):
        run(change, Processes(2, start_method="fork"))


def test_the_data_s_own_switches_reach_workers_too() -> None:
    class Harder(torch.utils.data.TensorDataset):
        difficulty = 1.0

        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x * self.difficulty, y

    class Curriculum(FederatedCallback):
        def __init__(self, data: Harder) -> None:
            self.data = data

        def on_round_end(self, trainer: Any, round: int, metrics: Any) -> None:
            self.data.difficulty += 1.0

    ends = []
    for engine in (InProcess(), Processes(2, start_method="fork")):
        torch.manual_seed(0)
        module, data = ToyModule(), Harder(*toy_data(32).tensors)
        FederatedTrainer(max_rounds=3, seed=1, engine=engine, callbacks=[Partition(3), Curriculum(data)], **QUIET).fit(
            module, DataLoader(data, 8, shuffle=True)
        )
        ends.append(read(module))
    torch.testing.assert_close(*ends, rtol=0, atol=0)

"""The trial that tells whether clients can be vectorized: it leaves no trace, and looks at all that comes out."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, History, Partition
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.weights import Weights, read
from tests.helpers import QUIET


def run(
    module: ToyModule, vectorize: Any, data: Any = None, rounds: int = 2, **options: Any
) -> tuple[Weights, History]:
    history = History()
    owner = data if isinstance(data, ClientData) else Partition(3)
    loader = None if isinstance(data, ClientData) else data or DataLoader(toy_data(48), 8, shuffle=True)
    trainer = FederatedTrainer(
        max_rounds=rounds,
        seed=1,
        vectorize_clients=vectorize,
        callbacks=[owner, history],
        **{**QUIET, **options},
    )
    trainer.fit(module, loader)
    return read(module), history


def built(kind: type[ToyModule]) -> ToyModule:
    torch.manual_seed(0)
    return kind()


CALLS: list[str] = []


class BuildsInSetup(ToyModule):
    """Makes its layers in ``setup``: a second call would make others."""

    def prepare_data(self) -> None:
        CALLS.append("prepare_data")

    def setup(self, stage: str) -> None:
        CALLS.append("setup fit" if stage == "fit" else "setup")
        self.net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def test_a_module_that_is_set_up_is_not_set_up_again() -> None:
    CALLS.clear()
    as_one, _ = run(built(BuildsInSetup), "require")
    assert CALLS == ["prepare_data", "setup fit"]
    torch.testing.assert_close(as_one, run(built(BuildsInSetup), False)[0], rtol=1e-4, atol=1e-6)


class Remembers(ToyModule):
    """Keeps tensors of its step in a dict that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = {"last": torch.zeros(2)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step((batch[0] + self.outputs["last"].mean(), batch[1]), batch_idx)
        self.outputs["last"] = self.net(batch[0]).mean(0).detach()
        return loss


def test_what_a_step_keeps_in_a_dict_is_refused_and_leaves_the_dict_alone() -> None:
    module = built(Remembers)
    with pytest.warns(UserWarning, match=r"clients train one after the other: its step changes module.outputs"):
        got, _ = run(module, True)
    torch.testing.assert_close(got, run(built(Remembers), False)[0], rtol=0, atol=0)
    assert module.outputs["last"].tolist() == [0, 0]


def test_the_trial_draws_nothing_of_a_loader_s_own_generator() -> None:
    def data() -> ClientData:
        generators = [torch.Generator().manual_seed(client) for client in range(3)]
        return ClientData(
            [DataLoader(toy_data(24, seed=i), 8, shuffle=True, generator=g) for i, g in enumerate(generators)]
        )

    as_one, _ = run(built(ToyModule), "require", data())
    torch.testing.assert_close(as_one, run(built(ToyModule), False, data())[0], rtol=1e-4, atol=1e-6)


class LogsTheWhole(ToyModule):
    """Logs a number that is each client's own alone, and of all clients where weights are stacked."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("norm", sum(p.detach().square().sum() for p in self.optimizers().param_groups[0]["params"]))
        return loss


def test_what_is_logged_is_compared_too() -> None:
    with pytest.warns(UserWarning, match=r"it logs norm=\S+ where one client alone logs \S+"):
        _, history = run(built(LogsTheWhole), 3)
    assert history["norm"] == run(built(LogsTheWhole), False)[1]["norm"]


def test_clients_of_whom_no_two_have_equally_many_batches_are_said_to_train_one_by_one() -> None:
    data = ClientData([DataLoader(toy_data(8 * n), 8) for n in (1, 2, 3)])
    with pytest.warns(UserWarning, match="no two of them have equally many batches") as said:
        run(built(ToyModule), True, data, rounds=3)
    assert len([one for one in said if "equally many" in str(one.message)]) == 1


def test_a_reason_is_in_the_user_s_terms() -> None:
    class Asks(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert len(self.trainer.train_dataloader)
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=r"it reads trainer.train_dataloader \(test_trial.py"):
        run(built(Asks), True)


@pytest.mark.landing
def test_a_sweep_compiles_in_each_of_its_runs(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_fed import trainer
    from lightning_fed.client.vectorized.compiled_step import CompiledStep

    compiled = []

    class Eager(CompiledStep):
        """Compiles with a backend that takes no time, and counts what runs compiled."""

        def __init__(self) -> None:
            super().__init__(backend="eager")

        def run(self, *args: Any, **kwargs: Any) -> Any:
            ran = super().run(*args, **kwargs)
            compiled[-1] += ran is not None
            return ran

    monkeypatch.setattr(trainer, "CompiledStep", Eager)
    for _ in range(10):
        compiled.append(0)
        run(built(ToyModule), "require", compile_clients=True)
    assert compiled[0] > 0
    assert compiled == [compiled[0]] * 10
    assert not [one for one in recwarn if "compile_clients" in str(one.message)]


class SeesMuch(ToyModule):
    """A buffer that grows by much, beside a step whose numbers a helper draws once for all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.draws = Draws()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 100.0 * len(batch[0])
        loss = super().training_step(batch, batch_idx)
        return loss + 2 * self.draws() * (self.net[0].weight.sum() - self.net[0].weight.sum().detach())


class Draws:
    """Draws from the system, which nobody can seed."""

    def __init__(self) -> None:
        self.numbers = random.SystemRandom()

    def __call__(self) -> float:
        return self.numbers.random()


def test_a_buffer_that_changes_by_much_hides_no_difference() -> None:
    with pytest.warns(UserWarning, match=r"vectorized clients would get another 'net"):
        run(built(SeesMuch), True)

"""Faults of configure_optimizers are raised before round 1; looking for them leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, History
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule
from tests.helpers import QUIET
from tests.integration.schedules.runs import HANDS, PLAIN, built, loader


class Wrong(ToyModule):
    """A module whose ``configure_optimizers`` gives ``what(optimizer)``."""

    def __init__(self, what: Callable[[Any], Any], needs_data: bool = False) -> None:
        super().__init__()
        self.what, self.needs_data = what, needs_data

    def configure_optimizers(self) -> Any:
        if self.needs_data:
            assert self.trainer.estimated_stepping_batches == 2 * 3
        return self.what(torch.optim.SGD(self.parameters(), lr=0.1))


def step_lr(optimizer: Any) -> Any:
    return lr_scheduler.StepLR(optimizer, 1)


def plateau(optimizer: Any, **options: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, **options)


FAULTS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "unknown interval": (
        lambda opt: [[opt], [{"scheduler": step_lr(opt), "interval": "batch"}]],
        MisconfigurationException,
        'must be "step" or "epoch" but is "batch"',
    ),
    "no monitor": (lambda opt: [[opt], [plateau(opt)]], MisconfigurationException, "must include a monitor"),
    "no scheduler": (
        lambda opt: {"optimizer": opt, "lr_scheduler": {"interval": "step"}},
        MisconfigurationException,
        'must have the key "scheduler"',
    ),
    "a number": (lambda opt: 3, MisconfigurationException, "Unknown configuration for model optimizers"),
    "several optimizers": (lambda opt: [opt, opt], RuntimeError, "only supported with manual optimization"),
    "the user's own": (lambda opt: opt.no_such_thing, AttributeError, "no_such_thing"),
}


@pytest.mark.parametrize("needs_data", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_configure_optimizers_are_raised_before_round_1_as_in_lightning(fault: str, needs_data: bool) -> None:
    what, error, match = FAULTS[fault]
    with pytest.raises(error, match=match) as plain:
        L.Trainer(max_epochs=1, **PLAIN).fit(Wrong(what), loader())
    history = History()
    trainer = FederatedTrainer(max_rounds=2, callbacks=[ClientData([loader(3)]), FaultTolerance(1), history], **QUIET)
    with pytest.raises(error, match=match) as ours:
        trainer.fit(Wrong(what, needs_data))
    assert type(ours.value) is type(plain.value)
    assert str(ours.value) == str(plain.value)
    assert history.rows == []
    assert trainer.global_step == 0


class NoOptimizers(L.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...


class NoStep(L.LightningModule):
    def configure_optimizers(self) -> None: ...


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (NoOptimizers, {}, r"No `configure_optimizers\(\)` method defined"),
        (NoStep, {}, r"No `training_step\(\)` method defined"),
        (HANDS["each batch"], {"gradient_clip_val": 1.0}, "gradient clipping is not supported for manual optimization"),
        (HANDS["each batch"], {"accumulate_grad_batches": 2}, "accumulation is not supported for manual optimization"),
    ],
)
def test_what_a_plain_trainer_refuses_of_a_module_is_refused_before_round_1(
    build: Any, options: Any, match: str
) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        L.Trainer(max_epochs=1, **PLAIN, **options).fit(build(), loader())
    history = History()
    trainer = FederatedTrainer(max_rounds=2, callbacks=[ClientData([loader()]), history], **QUIET, **options)
    with pytest.raises(MisconfigurationException, match=match):
        trainer.fit(build())
    assert history.rows == []


def test_a_look_at_configure_optimizers_opens_no_data_that_it_does_not_ask_for() -> None:
    opened: list[int] = []

    def data(client: int) -> DataLoader:
        opened.append(client)
        return loader(3)

    engine = Processes(1, start_method="fork")
    for needs_data in (False, True):
        opened.clear()
        trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(data, 2)], engine=engine, **QUIET)
        trainer.fit(Wrong(lambda opt: opt, needs_data=False))
        trainer = FederatedTrainer(max_rounds=2, callbacks=[ClientData(data, 2)], engine=engine, **QUIET)
        if needs_data:
            trainer.fit(Wrong(lambda opt: opt, needs_data=True))
        assert opened == ([0] if needs_data else [])


def test_a_look_at_configure_optimizers_leaves_no_trace() -> None:
    seen_before = []

    class Traces(ToyModule):
        def configure_optimizers(self) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            seen_before.append(self.calls)
            with torch.no_grad():
                self.net[0].weight.mul_(1 + 0.01 * torch.rand(()))
            return super().configure_optimizers()

    module = built(Traces)
    before = torch.get_rng_state()
    FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).fit(module, loader())
    assert seen_before == [1, 1, 1]
    assert torch.equal(torch.get_rng_state(), before)
    assert not hasattr(module, "calls")

    class Alone(Traces):
        pass

    one = built(Alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_fed.client.local.look_ahead.LookAhead.look", lambda self: None)
        FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).fit(one, loader())
    torch.testing.assert_close(dict(one.state_dict()), dict(module.state_dict()), rtol=0, atol=0)

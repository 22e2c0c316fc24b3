"""Optuna's own callback prunes a federated trial by round, which leaves nothing behind for the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("optuna_integration", reason='pip install "lightning_fed[sweeps]"')

import optuna
from optuna_integration import PyTorchLightningPruningCallback

from tests.compat.trials import ENGINES, RATES, ROUNDS, actors, becomes, left, trained, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_temporary_files")]


def sweep(folder: Path, engine: str, monitor: str) -> tuple[optuna.Study, dict[int, Any]]:
    """A study of three trials, each of which leaves what the others do, and the weights of those not pruned."""
    ended: dict[int, Any] = {}
    after: list[set[str]] = []

    def objective(trial: optuna.Trial) -> float:
        pruning = PyTorchLightningPruningCallback(trial, monitor=monitor)
        rate, here = trial.suggest_float("lr", 1e-5, 10, log=True), not monitor.startswith("clients/")
        try:
            trainer = trained(rate, ENGINES[engine](), folder / str(trial.number), pruning, at_server=here)
        finally:
            assert type(pruning) is PyTorchLightningPruningCallback
            becomes([], actors)
            after.append(left())
        ended[trial.number] = weights(trainer)
        return trainer.callback_metrics[monitor].item()

    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=1))
    for rate in RATES:
        study.enqueue_trial({"lr": rate})
    study.optimize(objective, n_trials=len(RATES))
    assert not set.union(*after) - after[0]
    return study, ended


@pytest.mark.parametrize("monitor", ["val_loss", "clients/val_loss"])
@pytest.mark.parametrize("engine", [pytest.param(e, marks=pytest.mark.ray) if e == "ray" else e for e in ENGINES])
def test_a_sweep_prunes_by_round_and_the_trial_after_that_is_as_if_alone(tmp_path, engine, monitor, request):
    if engine == "ray":
        request.getfixturevalue("one_ray")
    study, ended = sweep(tmp_path / "sweep", engine, monitor)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert [list(trial.intermediate_values) for trial in study.trials] == [[*range(ROUNDS)], [0, 1], [*range(ROUNDS)]]
    assert study.best_params == {"lr": RATES[2]}
    alone = trained(RATES[2], "in_process", tmp_path / "alone", at_server=monitor == "val_loss")
    torch.testing.assert_close(ended[2], weights(alone), rtol=0, atol=0)
    assert study.best_value == alone.callback_metrics[monitor].item()

"""Ray Tune's own callback reports a federated trial by round; what a scheduler stops leaves nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("optuna_integration", reason='pip install "lightning_fed[sweeps]"')  # comes with ray[tune]

from lightning.pytorch import Callback

from lightning_fed.testing import ToyModule
from tests.compat.trials import ENGINES, RATES, ROUNDS, actors, becomes, descendants, left, trained, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.usefixtures("one_ray", "own_temporary_files"),
    pytest.mark.timeout(600),
]


class Workers(Callback):
    """Writes down which processes there are below a trial's, by round."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, *args: Any) -> None:
        with self.file.open("a") as file:
            file.writelines(f"{pid}\n" for pid in descendants(os.getpid()))

    def running(self) -> list[str]:
        return [pid for pid in self.file.read_text().split() if Path(f"/proc/{pid}").exists()]


def trial(engine: str, monitor: str, file: Path) -> Callable[[dict[str, Any]], None]:
    def objective(config: dict[str, Any]) -> None:
        from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback

        report = TuneReportCheckpointCallback({"loss": monitor}, filename="trial.ckpt")
        at_server = not monitor.startswith("clients/")
        trained(config["lr"], ENGINES[engine](), Path.cwd(), report, Workers(file), at_server=at_server)

    return objective


def sweep(objective: Any, folder: Path, room: list[dict[str, float]], rates: tuple[float, ...] = RATES) -> Any:
    from ray import tune

    tuner = tune.Tuner(
        tune.with_resources(objective, tune.PlacementGroupFactory(room)),
        param_space={"lr": tune.grid_search(list(rates))},
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            max_concurrent_trials=1,
            scheduler=tune.schedulers.ASHAScheduler(grace_period=2, reduction_factor=2, max_t=ROUNDS),
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    return tuner.fit()


@pytest.mark.parametrize(
    ("engine", "monitor"),
    [("in_process", "val_loss"), ("in_process", "clients/val_loss"), ("processes", "val_loss"), ("ray", "val_loss")],
)
def test_a_scheduler_stops_a_trial_by_round_and_the_one_after_that_is_as_if_alone(tmp_path, engine, monitor):
    workers, before = Workers(tmp_path / "workers"), left()
    room = [{"CPU": 1}] + ([{"CPU": 1}] if engine == "ray" else [])
    results = sweep(trial(engine, monitor, workers.file), tmp_path / "results", room)
    assert not results.errors
    assert [result.metrics["training_iteration"] for result in results] == [ROUNDS, 2, ROUNDS]
    best = results.get_best_result()
    assert best.config == {"lr": RATES[2]}

    alone = trained(RATES[2], "in_process", tmp_path / "alone", at_server=monitor == "val_loss")
    assert best.metrics["loss"] == alone.callback_metrics[monitor].item()
    saved = ToyModule.load_from_checkpoint(Path(best.checkpoint.path) / "trial.ckpt")
    torch.testing.assert_close(dict(saved.state_dict()), weights(alone), rtol=0, atol=0)

    becomes([], actors)
    becomes([], workers.running)
    assert (engine == "processes") == bool(workers.file.read_text())
    becomes(set(), lambda: left() - before)


def test_clients_on_ray_without_room_in_the_trial_are_an_error_and_not_a_wait(tmp_path):
    results = sweep(trial("ray", "val_loss", tmp_path / "workers"), tmp_path, [{"CPU": 1}], RATES[:1])
    [error] = results.errors
    assert re.search(r"ConfigurationError: A client asks Ray for .*its trial of Ray Tune has \{'CPU': 0", str(error))

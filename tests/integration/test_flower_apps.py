"""The apps of examples/deployment/train.py as Flower calls them, on a grid that is not ours; no process is started."""

import importlib.util
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict

from lightning_fed import ClientError, ConfigurationError
from tests.integration import plain

SCRIPT = Path(__file__).parents[2] / "examples" / "deployment" / "train.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "")  # it sets that; it is restored after the test
    monkeypatch.delenv("PL_GLOBAL_SEED")
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flwr_run(script, run_config, node_config=None):
    """What `flwr run` does with three SuperNodes, each of which has this config."""
    grid = plain.ForeignGrid(script.client, 3)
    for context in grid.contexts.values():
        context.run_config = run_config
        context.node_config |= node_config or {}
    with plain.flower_identity():
        script.server(grid, Context(7, 1, {}, RecordDict(), run_config))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt")["state_dict"]


def test_the_apps_train_as_one_process_does_and_say_where_their_results_are(script, tmp_path, monkeypatch, capsys):
    said, folder = [], f"{tmp_path}/apps"
    monkeypatch.setattr("lightning_fed.server.session.rank_zero_info", said.append)
    flwr_run(script, {"max_rounds": 2, "default_root_dir": folder})
    assert "after 2 rounds" in capsys.readouterr().out
    results, summary = said
    assert results.endswith(f": logs in {folder}/lightning_logs/version_0 and checkpoints in {folder}/checkpoints.")
    assert summary.endswith("engine      Flower's ForeignGrid on cpu, seed 0")

    model, trainer = script.federation(max_rounds=2, default_root_dir=f"{tmp_path}/alone")
    trainer.fit(model, val_dataloaders=script.validation())
    apps, alone = saved(tmp_path / "apps"), saved(tmp_path / "alone")
    assert apps.keys() == alone.keys()
    assert all(torch.equal(apps[name], alone[name]) for name in alone)


def test_where_a_site_has_its_data_is_in_the_node_config(script, tmp_path):
    config = {"max_rounds": 1, "default_root_dir": str(tmp_path)}
    torch.save([torch.rand(32, 64), torch.randint(0, 10, (32,))], tmp_path / "own.pt")
    flwr_run(script, config, {"data": str(tmp_path / "own.pt")})
    with pytest.raises(ClientError, match=r"No such file or directory: '.*/none.pt'"):
        flwr_run(script, config, {"data": str(tmp_path / "none.pt")})


def test_a_name_in_the_run_config_that_nobody_knows_is_an_error_with_those_that_are_known(script, tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"max-rounds=3: .* does not know this\. It takes max_rounds, .*timeout"
    ):
        flwr_run(script, {"max-rounds": 3, "default_root_dir": str(tmp_path)})

"""The stock way: Flower's own SuperLink, SuperNodes and `flwr run`, each message in a process of its own."""

import pytest
import torch

from tests.deployment.federation import Outcome, examples, fitted
from tests.deployment.processes import free_port
from tests.deployment.stock import PROJECT


@pytest.mark.landing
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("sites", "rounds"),
    # Each message starts a process that makes the imports.
    [(2, 2), pytest.param(3, 5, marks=pytest.mark.slow)],
)
def test_flwr_run_gives_the_bits_of_one_process(scripts, sites, rounds):
    port, folder = free_port(), scripts.folder
    scripts.link(port, "--insecure", isolation="subprocess")
    for client in range(sites):
        torch.save(examples(client), data := folder / f"{client}.pt")
        node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
        scripts.start([*node, "--node-config", f'partition-id={client} data="{data}"'], f"node-{client}")
    (app := folder / "app").mkdir(exist_ok=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (folder / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    given = {"max_rounds": rounds, "check_val_every_n_epoch": 2, "clients": sites}
    config = " ".join(f"{name}={value}" for name, value in given.items()) + f' default_root_dir="{folder}"'
    run = scripts.start(["flwr", "run", str(app), "here", "--stream", "--run-config", config], "run")
    assert run.process.wait(1000) == 0, run.log
    assert "engine      Flower's HttpGrid on cpu, seed 3" in run.log
    Outcome(**torch.load(folder / "end.pt")).assert_same(fitted("in_process", **given))

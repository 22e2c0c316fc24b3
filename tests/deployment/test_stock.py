"""The stock way: Flower's own SuperLink, SuperNodes and `flwr run`, each message in a process of its own."""

import pytest
import torch

from tests.deployment.federation import CLIENTS, Outcome, examples, fitted
from tests.deployment.processes import free_port
from tests.deployment.stock import PROJECT


# Each message starts a process that makes the imports; tests/deployment/test_docs.py has a shorter run.
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_flwr_run_gives_the_bits_of_one_process(scripts):
    port, folder = free_port(), scripts.folder
    scripts.link(port, "--insecure", isolation="subprocess")
    for client in range(CLIENTS):
        torch.save(examples(client), data := folder / f"{client}.pt")
        node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
        scripts.start([*node, "--node-config", f'partition-id={client} data="{data}"'], f"node-{client}")
    (app := folder / "app").mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (folder / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    given = {"max_rounds": 5, "check_val_every_n_epoch": 2}
    config = " ".join(f"{name}={value}" for name, value in given.items()) + f' default_root_dir="{folder}"'
    run = scripts.start(["flwr", "run", str(app), "here", "--stream", "--run-config", config], "run")
    assert run.process.wait(1000) == 0, run.log
    assert "engine      Flower's HttpGrid on cpu, seed 3" in run.log
    Outcome(**torch.load(folder / "end.pt")).assert_same(fitted("in_process", **given))

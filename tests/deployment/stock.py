"""The federation of these tests as Flower's apps, for `flwr run`."""

from pathlib import Path

import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from lightning_fed.callbacks import History
from tests.deployment.federation import Outcome, module, trainer

PROJECT = """
[project]
name = "federation"
version = "1.0.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "tests.deployment.stock:server"
clientapp = "tests.deployment.stock:client"
[tool.flwr.app.config]
max_rounds = 5
check_val_every_n_epoch = 1
default_root_dir = "."
"""

server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid, context):
    model, fit = module(), trainer(callbacks=(History(per_client=True),), **context.run_config)
    fit.server_app(model)(grid, context)
    torch.save(vars(Outcome.of(fit, model)), Path(fit.default_root_dir) / "end.pt")


@client.train()
@client.evaluate()
@client.query()
def answer(message, context):
    fit = trainer(file=context.node_config["data"], **context.run_config)
    return fit.client_app(module())(message, context)

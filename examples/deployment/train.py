"""One script for a federation of three sites: the server, each site, a simulation of all, and Flower's apps.

On one machine, each in a terminal of its own::

    python train.py server
    python train.py site --client 0        # and 1, and 2

and over a network as docs/deployment.md says, there also with ``flwr run .``, for which the apps are at the end.
``python train.py alone`` simulates all in one process. The weights are the same to the bit.
"""

import argparse
from functools import partial

if __name__ == "__main__":  # before the imports that take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["server", "site", "alone"])
    parser.add_argument("--superlink", help="host:port; without it the server starts one on this machine")
    parser.add_argument("--insecure", action="store_true", help="no TLS")
    parser.add_argument("--root-certificates", help="who signed the SuperLink's certificate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--secret-file", help="the server's: the SuperLink's secret")
    parser.add_argument("--resume", action="store_true", help="the server's: go on from the last checkpoint")
    parser.add_argument("--client", type=int, help="a site's: which it is, from 0")
    parser.add_argument("--data", help="a site's: the file with its images and labels; else it has some of the bundled")
    parser.add_argument("--private-key", help="a site's: its key")
    parser.add_argument("--state-dir", help="a site's: where it keeps what it keeps from round to round")
    args = parser.parse_args()

import lightning as L
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedAdam
from lightning_fed.engines import SuperLink

SITES = 3
HERE = "127.0.0.1:8000"


class Digits(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows of sites or rounds."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits(part):
    """Return one of four parts of the bundled images: three sites' own data, and the server's for validation."""
    bunch = load_digits()
    images, labels = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    return TensorDataset(images[part::4], labels[part::4])


def site_data(client, file=None):
    """Return a site's own train loader: over images and labels in a file, or over its part of the bundled ones."""
    data = TensorDataset(*torch.load(file)) if file else digits(client)
    return DataLoader(data, batch_size=16, shuffle=True, drop_last=True)


def federation(file=None, default_root_dir=".", **given):
    """Return module and trainer, which all programs build alike; what is given replaces what stands here."""
    L.seed_everything(0)
    callbacks = [
        ClientData(partial(site_data, file=file), num_clients=SITES),
        FedAdam(learning_rate=0.02),
        L.pytorch.callbacks.ModelCheckpoint(f"{default_root_dir}/checkpoints", save_last=True),
    ]
    arguments = {"max_rounds": 5, "accelerator": "cpu", "default_root_dir": default_root_dir, **given}
    return Digits(), FederatedTrainer(callbacks=callbacks, **arguments)


def validation():
    return DataLoader(digits(3), batch_size=449)


def say(trainer):
    print(f"accuracy {float(trainer.callback_metrics['val_acc']):.4f} after {trainer.max_epochs} rounds")


def main(args):
    engine, secured = "in_process", {"root_certificates": args.root_certificates, "insecure": args.insecure}
    if args.role == "server":
        secret = {"secret_file": args.secret_file}
        engine = SuperLink(args.superlink, **secret, **secured) if args.superlink else SuperLink.local()
    model, trainer = federation(args.data, engine=engine, max_rounds=args.rounds)
    if args.role == "site":
        at = args.superlink or HERE
        secured["insecure"] |= args.superlink is None
        trainer.join(at, model, client=args.client, private_key=args.private_key, state_dir=args.state_dir, **secured)
        return
    trainer.fit(model, val_dataloaders=validation(), ckpt_path="last" if args.resume else None)
    say(trainer)


# Flower's apps: pyproject.toml names them, and what `flwr run --run-config` sets are the trainer's arguments.
server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid, context):
    model, trainer = federation(**context.run_config)
    trainer.server_app(model, val_dataloaders=validation())(grid, context)
    say(trainer)


@client.train()
@client.evaluate()
@client.query()
def answer(message, context):
    model, trainer = federation(context.node_config.get("data"), **context.run_config)
    return trainer.client_app(model)(message, context)


if __name__ == "__main__":
    main(args)

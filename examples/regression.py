"""Regression over three clients that bring their own data: once with one function for each, once with the same for all.

Where each client has a function of its own, one global model can at best learn their mean; where all have the same, it
learns that. Beside it stands what each client learns alone. Each gives its own loader through ``ClientData``::

    python examples/regression.py
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rounds of five local epochs (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="five rounds only")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the picture (%(default)s)")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

import lightning as L
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, History

# Each client's function, how it is written, and the standard deviation of the noise on it.
DIFFERENT = [
    (lambda x: x**2 + 10 * torch.sin(x), "$x^2 + 10\\,\\sin x$", 2.0),
    (lambda x: torch.exp(x) - 2 * x**2, "$e^x - 2x^2$", 1.5),
    (lambda x: 3 * x**3 - 5 * torch.cos(x), "$3x^3 - 5\\,\\cos x$", 1.0),
]
SAME = [(lambda x: x**3, "$x^3$", 1.5)] * 3

QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}


class Regressor(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.003, momentum=0.9)


def sample(function, noise):
    x = torch.rand(100, 1) * 4 - 2
    return TensorDataset(x, function(x) + noise * torch.randn(100, 1))


def federated(data, rounds):
    """Return a model trained over the clients' data, and the loss of each round."""
    L.seed_everything(0, verbose=False)
    model, history = Regressor(), History()
    clients = ClientData([DataLoader(own, batch_size=100) for own in data])
    FederatedTrainer(max_rounds=rounds, local_epochs=5, callbacks=[clients, history], **QUIET).fit(model)
    return model, history["train_loss"]


def alone(own, epochs, seed=0):
    """Return a model that Lightning's Trainer trains on one data set; with seed 0 it begins as the federated one."""
    L.seed_everything(seed, verbose=False)
    model = Regressor()
    L.Trainer(max_epochs=epochs, enable_progress_bar=False, **QUIET).fit(model, DataLoader(own, batch_size=100))
    return model


def error(model, data):
    """Return the mean squared error of one model over all clients' points."""
    with torch.no_grad():
        x, y = (torch.cat(tensors) for tensors in zip(*(own.tensors for own in data), strict=True))
        return nn.functional.mse_loss(model.net(x), y).item()


def draw(axes, clients, data, alone, together):
    """Draw each client's data and its own model in one colour, and over them the models in ``together``, by name."""
    x = torch.linspace(-2, 2, 200)[:, None]
    for i, ((_, formula, _), own, model) in enumerate(zip(clients, data, alone, strict=True)):
        axes.scatter(*(tensor.numpy() for tensor in own.tensors), s=8, alpha=0.5, color=f"C{i}")
        axes.plot(x, model.net(x).detach(), "--", color=f"C{i}", label=f"client {i} alone: {formula}")
    for (name, model), line in zip(together.items(), ("-", ":", "-."), strict=False):
        # The colour of text, which is seen on whatever the style has behind it.
        axes.plot(x, model.net(x).detach(), line, color=plt.rcParams["text.color"], linewidth=2.5, label=name)
    axes.set(xlabel="x", ylabel="y")
    axes.legend(fontsize="small")


def main(args):
    rounds = 5 if args.fast else args.rounds
    lines = []
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for row, (name, clients) in zip(axes, {"three functions": DIFFERENT, "one function": SAME}.items(), strict=True):
        L.seed_everything(0, verbose=False)
        data = [sample(function, noise) for function, _, noise in clients]
        model, losses = federated(data, rounds)
        own = [alone(part, 5 * rounds) for part in data]
        each = ", ".join(f"{error(fit, [part]):.2f}" for fit, part in zip(own, data, strict=True))
        lines.append(f"{name:<15}  federated {error(model, data):6.2f}   each client alone, on its own data {each}")
        draw(row[0], clients, data, own, {"federated": model})
        row[0].set_title(f"Clients with {name}")
        row[1].plot(range(1, rounds + 1), losses)
        row[1].set(title="Loss in the clients' local training", xlabel="round", ylabel="mean squared error")
        row[1].set_ylim(bottom=0)
        row[1].grid(alpha=0.3)
    print("\nMean squared errors", *lines, sep="\n")
    figure.savefig(args.output_dir / "regression.png", dpi=120)
    print(f"wrote {args.output_dir / 'regression.png'}")


if __name__ == "__main__":
    main(args)

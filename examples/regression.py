"""Regression over three clients that bring their own data: once with one function for each, once with the same for all.

Where each client has a function of its own, one global model can at best learn their mean; where all have the same, it
learns that. Each client gives its own loader through ``ClientData``::

    python examples/regression.py
"""

import argparse
from pathlib import Path

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
        return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)


def sample(function, noise):
    x = torch.rand(100, 1) * 4 - 2
    return TensorDataset(x, function(x) + noise * torch.randn(100, 1))


def train(clients, rounds):
    """Return a model trained over the clients, their data, and the loss of each round."""
    L.seed_everything(0, verbose=False)
    data = [sample(function, noise) for function, _, noise in clients]
    model, history = Regressor(), History()
    clients = ClientData([DataLoader(own, batch_size=100) for own in data])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    FederatedTrainer(max_rounds=rounds, local_epochs=5, callbacks=[clients, history], **quiet).fit(model)
    return model, data, history["train_loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="rounds of five local epochs (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="five rounds only")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the picture (%(default)s)")
    args = parser.parse_args()

    lines = []
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    x = torch.linspace(-2, 2, 200)[:, None]
    for row, (name, clients) in zip(axes, {"three functions": DIFFERENT, "one function": SAME}.items(), strict=True):
        model, data, losses = train(clients, 5 if args.fast else args.rounds)
        lines.append(f"{name:<16} mean squared error on the clients' data {losses[0]:.2f} -> {losses[-1]:.2f}")
        for i, ((_, formula, _), own) in enumerate(zip(clients, data, strict=True)):
            row[0].scatter(*(tensor.numpy() for tensor in own.tensors), s=8, alpha=0.6, label=f"client {i}: {formula}")
        row[0].plot(x, model.net(x).detach(), color="black", label="global model")
        row[0].set(title=f"Clients with {name}", xlabel="x", ylabel="y")
        row[0].legend(fontsize="small")
        row[1].plot(range(1, len(losses) + 1), losses)
        row[1].set(title="Training loss, mean over clients", xlabel="round", ylabel="mean squared error", yscale="log")
        row[1].grid(alpha=0.3, which="both")
    print("", *lines, sep="\n")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output_dir / "regression.png", dpi=120)
    print(f"wrote {args.output_dir / 'regression.png'}")


if __name__ == "__main__":
    main()

"""The quickstart: the same module and data, trained centrally and federated over ten clients.

Needs no download (scikit-learn's handwritten digits) and runs in seconds::

    python examples/quickstart.py
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="epochs, or rounds of one local epoch (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="two rounds only")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the picture (%(default)s)")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

import lightning as L
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_fed import FederatedTrainer


class Digits(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows of clients or rounds."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_acc", (self.net(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def digits():
    """Return the bundled images as train and test loaders."""
    bunch = load_digits()
    images, labels = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    train, test = random_split(TensorDataset(images, labels), [1437, 360])
    return DataLoader(train, batch_size=16, shuffle=True), DataLoader(test, batch_size=360)


class Curve(L.Callback):
    """An ordinary callback: keeps the accuracy after each epoch, which in a federation is a round."""

    def __init__(self):
        self.accuracy = []

    def on_validation_end(self, trainer, pl_module):
        self.accuracy.append(float(trainer.callback_metrics["val_acc"]))


def main(args):
    rounds = 2 if args.fast else args.rounds
    L.seed_everything(0)
    train_loader, test_loader = digits()
    central, federated = Curve(), Curve()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}

    trainer = L.Trainer(max_epochs=rounds, callbacks=central, **quiet)
    trainer.fit(Digits(), train_loader, test_loader)

    # The two changed lines: this one, and its import.
    trainer = FederatedTrainer(max_rounds=rounds, num_clients=10, callbacks=federated, **quiet)
    trainer.fit(Digits(), train_loader, test_loader)

    print()
    for label, curve in {"central": central, "federated, 10 clients": federated}.items():
        plt.plot(range(1, rounds + 1), curve.accuracy, marker=".", label=label)
        print(f"{label:<22} test accuracy {curve.accuracy[-1]:.3f}")
    plt.gca().set(title="Handwritten digits", xlabel="epoch or round", ylabel="test accuracy")
    plt.legend()
    plt.savefig(args.output_dir / "quickstart.png", dpi=120)
    print(f"wrote {args.output_dir / 'quickstart.png'}")


if __name__ == "__main__":
    main(args)

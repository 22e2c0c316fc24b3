"""From nearly IID clients to clients with few classes: Dirichlet label skew with alpha from 1e5 down to 0.1.

A thousand points of ten Gaussian blobs are dealt out among five clients, and a small classifier is trained federated on
them. The picture shows, for each alpha, which points each client has and how many of each class::

    python examples/label_skew.py
"""

import argparse
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
from flwr_datasets.partitioner import DirichletPartitioner
from sklearn.datasets import make_blobs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import Partition

CLIENTS, CLASSES = 5, 10


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def blobs(points, centers, seed):
    x, y = make_blobs(points, centers=centers, cluster_std=0.06, random_state=seed)
    return TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


def draw(figure, partition, points, labels):
    """For each client a scatter of its points and a bar for each class."""
    for client, (scatter, bars) in enumerate(figure.subplots(CLIENTS, 2, sharex="col", sharey="col")):
        own = partition.indices(client)
        scatter.scatter(*points[own].T, c=labels[own], cmap="tab10", vmin=0, vmax=9, s=4)
        scatter.set(xticks=[], yticks=[], xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), ylabel=f"client {client}")
        bars.bar(range(CLASSES), np.bincount(labels[own], minlength=CLASSES), color=plt.get_cmap("tab10").colors)
        bars.set(xticks=range(CLASSES), xlabel="class" if client == CLIENTS - 1 else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", type=float, nargs="+", default=[1e5, 10, 1, 0.1], help="%(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="how many rounds (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="two rounds only")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the picture (%(default)s)")
    args = parser.parse_args()

    centers = np.random.default_rng(3).uniform(-1, 1, (CLASSES, 2))
    train, test = blobs(1000, centers, 0), blobs(1000, centers, 1)
    figure = plt.figure(figsize=(4.5 * len(args.alpha), 9), layout="constrained")
    columns = np.atleast_1d(figure.subfigures(1, len(args.alpha)))
    table = ["alpha     smallest and largest client   test accuracy"]
    for alpha, column in zip(args.alpha, columns, strict=True):
        L.seed_everything(0, verbose=False)
        partition = Partition(DirichletPartitioner(CLIENTS, partition_by="label", alpha=alpha))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = FederatedTrainer(max_rounds=2 if args.fast else args.rounds, callbacks=partition, **quiet)
        model = Classifier()
        trainer.fit(model, DataLoader(train, batch_size=20, shuffle=True))
        accuracy = trainer.test(model, DataLoader(test, batch_size=1000), verbose=False)[0]["test_acc"]
        sizes = partition.sizes()
        table.append(f"{alpha:<8g}  {min(sizes):>4} and {max(sizes):>4} points          {accuracy:.3f}")
        column.suptitle(f"alpha = {alpha:g}   test accuracy {accuracy:.2f}")
        draw(column, partition, *(tensor.numpy() for tensor in train.tensors))
    print("", *table, sep="\n")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output_dir / "label_skew.png", dpi=100)
    print(f"wrote {args.output_dir / 'label_skew.png'}")


if __name__ == "__main__":
    main()

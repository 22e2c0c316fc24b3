"""From nearly IID clients to clients with few classes: Dirichlet label skew with alpha from 1e5 down to 0.1.

A thousand points of ten Gaussian blobs are dealt out among five clients, and a small classifier is trained federated on
them. The picture shows, for each alpha, whose each point is and how many of each class each client has::

    python examples/label_skew.py
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", type=float, nargs="+", default=[1e5, 10, 1, 0.1], help="%(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="how many rounds (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="two rounds only")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the picture (%(default)s)")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

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


def draw(column, partition, points, title):
    """Above the points, coloured by the client that has them; below how many of each class each client has."""
    above, below = column
    for client in range(CLIENTS):
        own = points[partition.indices(client)]
        above.scatter(*own.T, color=plt.get_cmap("Set2")(client), s=9, label=str(client))
    above.set(title=title, xticks=[], yticks=[], aspect="equal")
    partition.draw(below, title="", legend=False)
    below.label_outer()


def main(args):

    centers = np.random.default_rng(3).uniform(-1, 1, (CLASSES, 2))
    train, test = blobs(1000, centers, 0), blobs(1000, centers, 1)
    size = {"figsize": (4 * len(args.alpha), 7.5), "layout": "constrained"}
    figure, panels = plt.subplots(2, len(args.alpha), sharex="row", sharey="row", squeeze=False, **size)
    table = ["alpha     smallest and largest client   test accuracy"]
    for alpha, column in zip(args.alpha, panels.T, strict=True):
        L.seed_everything(0, verbose=False)
        partition = Partition(DirichletPartitioner(CLIENTS, partition_by="label", alpha=alpha))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = FederatedTrainer(max_rounds=2 if args.fast else args.rounds, callbacks=partition, **quiet)
        model = Classifier()
        trainer.fit(model, DataLoader(train, batch_size=20, shuffle=True))
        accuracy = trainer.test(model, DataLoader(test, batch_size=1000), verbose=False)[0]["test_acc"]
        sizes = partition.sizes()
        table.append(f"{alpha:<8g}  {min(sizes):>4} and {max(sizes):>4} points          {accuracy:.3f}")
        draw(column, partition, train.tensors[0].numpy(), f"alpha = {alpha:,g}: test accuracy {accuracy:.2f}")
    for last, title in zip(panels[:, -1], ("client", "class"), strict=True):
        last.legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5), reverse=title == "class")
    print("", *table, sep="\n")
    figure.savefig(args.output_dir / "label_skew.png", dpi=100)
    print(f"wrote {args.output_dir / 'label_skew.png'}")


if __name__ == "__main__":
    main(args)

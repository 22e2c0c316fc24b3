"""Fashion-MNIST over clients that have few labels each: one model for all, or a part of it for each client.

Twenty clients are dealt labels by Dirichlet skew (alpha 0.1). FedAvg trains one model; with FedPer each client keeps
its head, with FedBN its normalization, with Ditto a second model of its own. The picture shows the accuracy of each
client on its own held-out images::

    python examples/personalization.py --data-dir data
"""

from command_line import fashion_options

if __name__ == "__main__":  # before the imports that take seconds
    args = fashion_options(__doc__)

import lightning as L
import matplotlib.pyplot as plt
from fashion import FashionData, FashionMLP, fashion_data
from flwr_datasets.partitioner import DirichletPartitioner
from torch import nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import Ditto, FedBN, FedPer, History, Partition

METHODS = {
    "FedAvg": lambda: [],
    "FedBN": lambda: [FedBN()],
    "FedPer": lambda: [FedPer("net.head")],
    "Ditto": lambda: [Ditto(lam=0.1)],
}


class NormalizedMLP(FashionMLP):
    """784-100-100-10 with BatchNorm; its last layer is called head."""

    def __init__(self, lr=0.02):
        super().__init__(lr)
        self.net = nn.Sequential(nn.Flatten())
        for index, width in enumerate((784, 100)):
            self.net.add_module(f"layer{index}", nn.Linear(width, 100))
            self.net.add_module(f"norm{index}", nn.BatchNorm1d(100))
            self.net.add_module(f"relu{index}", nn.ReLU())
        self.net.add_module("head", nn.Linear(100, 10))


class WholeBatches(FashionData):
    """BatchNorm cannot train on the batch of one image that may be left over."""

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=32, shuffle=True, drop_last=True)


def train(method, args, data):
    """Return each client's accuracy on its own held-out images, and the rounds' mean."""
    L.seed_everything(args.seed, verbose=False)
    history = History()
    clients, alpha = (4, 1.0) if args.fast else (20, 0.1)
    partitioner = DirichletPartitioner(clients, partition_by="label", alpha=alpha, min_partition_size=50)
    trainer = FederatedTrainer(
        max_rounds=args.rounds,
        callbacks=[Partition(partitioner, val_fraction=0.2), *method(), history],
        limit_val_batches=0,  # the server's: a personal head is nobody's there
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(NormalizedMLP(), datamodule=data)
    return trainer.test_clients()["test_acc"], [row["clients/val_acc"] for row in history.rows]


def draw(found, path):
    """Left the mean over clients by round, right the accuracy of each client after the last."""
    figure, (rounds, clients) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, (own, mean) in found.items():
        rounds.plot(range(1, len(mean) + 1), mean, marker="o", markersize=3, label=name)
        clients.plot(range(1, len(own) + 1), sorted(own), marker="o", markersize=3, label=name)
    rounds.set(title="Mean over clients", xlabel="round", ylabel="accuracy on own held-out images")
    clients.set(title="Each client after the last round", xlabel="clients, from worst to best", ylabel="accuracy")
    for axes in (rounds, clients):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    rounds.legend()
    figure.savefig(path, dpi=150)


def main(args):
    data = fashion_data(args)
    data = WholeBatches(data.data_dir, data.train_images, data.test_images)
    found = {name: train(method, args, data) for name, method in METHODS.items()}
    print(f"\nAccuracy on own held-out images after {args.rounds} rounds, seed {args.seed}:")
    print("            mean by images   worst client   best client")
    for name, (own, mean) in found.items():
        print(f"  {name:<8}  {mean[-1]:.4f}           {min(own):.4f}         {max(own):.4f}")
    path = args.output_dir / "personalization.png"
    draw(found, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(args)

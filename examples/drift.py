"""Fashion-MNIST over clients with two labels each: what keeps their local training from drifting apart.

Ten clients have images of two classes each and train for several local epochs, so each runs towards its own optimum and
the mean of them is nobody's. The picture shows the test accuracy by round of FedAvg, FedProx, SCAFFOLD, FedNova and
FedDyn. (All clients have as many images and so make as many steps: FedNova, dashed, is FedAvg here.)::

    python examples/drift.py --data-dir data
"""

from command_line import fashion_options

if __name__ == "__main__":  # before the imports that take seconds
    args = fashion_options(__doc__)

import lightning as L
import matplotlib.pyplot as plt
from fashion import FashionMLP, fashion_data
from flwr_datasets.partitioner import PathologicalPartitioner

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FedDyn, FedNova, FedProx, History, Partition, Scaffold

CLIENTS, EPOCHS = 10, 3
METHODS = {
    "FedAvg": lambda: [],
    "FedProx": lambda: [FedProx(mu=0.1)],
    "SCAFFOLD": lambda: [Scaffold()],
    "FedNova": lambda: [FedNova()],
    "FedDyn": lambda: [FedDyn(alpha=0.1)],
}


def train(method, args, data):
    """Return the test accuracy after each round."""
    L.seed_everything(args.seed, verbose=False)
    history = History()
    partitioner = PathologicalPartitioner(
        CLIENTS, partition_by="label", num_classes_per_partition=2, class_assignment_mode="deterministic"
    )
    trainer = FederatedTrainer(
        max_rounds=args.rounds,
        local_epochs=EPOCHS,
        callbacks=[Partition(partitioner), *method(), history],
        vectorize_clients=True,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(FashionMLP(), datamodule=data)
    return [row["val_acc"] for row in history.rows]


def main(args):
    data = fashion_data(args)
    found = {name: train(method, args, data) for name, method in METHODS.items()}
    print(f"\nTest accuracy, two labels a client, {EPOCHS} local epochs, seed {args.seed}:")
    print("              last round   best round")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, accuracy in found.items():
        print(f"  {name:<10}  {accuracy[-1]:.4f}       {max(accuracy):.4f}")
        line = "--" if name == "FedNova" else "-"
        axes.plot(range(1, len(accuracy) + 1), accuracy, line, marker="o", markersize=3, label=name)
    axes.set(title="Two labels a client", xlabel="round", ylabel="test accuracy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    path = args.output_dir / "drift.png"
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(args)

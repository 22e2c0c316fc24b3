"""Fashion-MNIST: central training against federated averaging over ten clients, all of them in every round.

Each client has 6,000 images: 4,800 to train on, 1,200 to evaluate the global model on::

    python examples/fashion_mnist.py --data-dir data
"""

from command_line import fashion_options

if __name__ == "__main__":  # before the imports that take seconds
    args = fashion_options(__doc__)

import lightning as L
import matplotlib.pyplot as plt
from fashion import FashionMLP, fashion_data
from quickstart import Curve

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import Partition


def main(args):
    data = fashion_data(args)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}

    L.seed_everything(args.seed)
    central = Curve()
    trainer = L.Trainer(max_epochs=args.rounds, callbacks=[central], **quiet)
    model = FashionMLP()
    trainer.fit(model, datamodule=data)
    central_accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"]

    L.seed_everything(args.seed)
    federated = Curve()
    callbacks = [Partition(10, val_fraction=0.2), federated]
    trainer = FederatedTrainer(max_rounds=args.rounds, callbacks=callbacks, **quiet)
    model = FashionMLP()
    trainer.fit(model, datamodule=data)
    federated_accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"]

    print(f"\nAfter {args.rounds} epochs or rounds, seed {args.seed}:")
    print(f"  central                   test accuracy {central_accuracy:.4f}")
    print(f"  FedAvg, 10 of 10 clients  test accuracy {federated_accuracy:.4f}")

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, curve in {"central": central, "FedAvg, 10 of 10 clients": federated}.items():
        axes.plot(range(1, args.rounds + 1), curve.accuracy, marker=".", label=label)
    axes.set(title="Fashion-MNIST", xlabel="epoch or round", ylabel="test accuracy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    path = args.output_dir / "fashion_mnist.png"
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(args)

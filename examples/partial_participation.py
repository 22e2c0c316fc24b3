"""Fashion-MNIST over ten clients, of which a random five train in each round.

Prints every round's metrics: what the five logged in training (``train_loss``), what they found on their own held-out
images (``clients/val_acc``, ``clients/val_loss``), and what the server found on the test images (``val_acc``,
``val_loss``)::

    python examples/partial_participation.py --data-dir data
"""

from command_line import fashion_options

if __name__ == "__main__":  # before the imports that take seconds
    args = fashion_options(__doc__)

import lightning as L
from fashion import FashionMLP, fashion_data

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import History, PartialParticipation, Partition


def main(args):
    data = fashion_data(args)
    L.seed_everything(args.seed)
    model, history = FashionMLP(), History()
    trainer = FederatedTrainer(
        max_rounds=args.rounds,
        callbacks=[
            Partition(10, val_fraction=0.2),
            PartialParticipation(fraction_train=0.5, fraction_evaluate=0.5),
            history,
        ],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"]

    print(f"\n{history}")
    print(f"\nAfter {args.rounds} rounds, seed {args.seed}:")
    print(f"  FedAvg, 5 of 10 clients   test accuracy {accuracy:.4f}")
    path = args.output_dir / "partial_participation.png"
    history.plot(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(args)

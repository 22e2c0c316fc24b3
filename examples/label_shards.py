"""Fashion-MNIST over clients that differ: each has six shards of 1,000 images, and a shard has one label only.

Five of ten clients train in each round, so the global model leans towards the labels that these five have, and its
accuracy jumps from round to round. Draws who has what, and the curves::

    python examples/label_shards.py --data-dir data
"""

from command_line import fashion_options

if __name__ == "__main__":  # before the imports that take seconds
    args = fashion_options(__doc__)

import lightning as L
from fashion import FashionMLP, fashion_data
from flwr_datasets.partitioner import ShardPartitioner

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import History, PartialParticipation, Partition


def main(args):
    data = fashion_data(args)
    L.seed_everything(args.seed)
    shards = ShardPartitioner(num_partitions=10, partition_by="label", shard_size=data.train_images // 60)
    partition = Partition(shards, val_fraction=0.2)
    model, history = FashionMLP(), History()
    trainer = FederatedTrainer(
        max_rounds=args.rounds,
        callbacks=[partition, PartialParticipation(fraction_train=0.5, fraction_evaluate=0.5), history],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"]

    rounds = "  ".join(f"{value:.3f}" for value in history["val_acc"])
    print(f"\nServer accuracy round by round:  {rounds}")
    print(f"After {args.rounds} rounds, seed {args.seed}:")
    print(f"  FedAvg, label shards, 5 of 10 clients  test accuracy {accuracy:.4f}")
    partition.plot(args.output_dir / "label_shards_partition.png")
    history.plot(args.output_dir / "label_shards.png")
    print(f"wrote {args.output_dir / 'label_shards_partition.png'} and {args.output_dir / 'label_shards.png'}")


if __name__ == "__main__":
    main(args)

"""The README's picture: what ten clients have of each digit, beside their federated training and a central one.

scikit-learn's handwritten digits are dealt out with Dirichlet label skew. Module, data and loop are those of the
quickstart. Writes ``front.png``, which stands in ``docs/pictures``::

    python examples/front_page.py --output-dir docs/pictures
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="epochs, or rounds of one local epoch (%(default)s)")
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet distribution (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="two rounds only")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the picture (%(default)s)")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
from flwr_datasets.partitioner import DirichletPartitioner
from quickstart import Curve, Digits, digits

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import Partition

CLIENTS, CLASSES = 10, 10
# Text that reads on white and on black: the picture has no background of its own.
INK = "#808892"


def draw_labels(axes, counts):
    """Draw a bar for each client, a colour for each digit; ``counts`` is (clients, classes)."""
    left = np.zeros(len(counts))
    for digit, color in enumerate(plt.get_cmap("tab10").colors):
        axes.barh(range(len(counts)), counts[:, digit], left=left, color=color, height=0.8, label=str(digit))
        left += counts[:, digit]
    axes.invert_yaxis()
    axes.set(title="What each client has", xlabel="images, by digit", ylabel="client", yticks=range(len(counts)))
    axes.legend(ncols=CLASSES, loc="upper center", bbox_to_anchor=(0.5, -0.18), handlelength=0.7, columnspacing=0.7)


def draw_curves(axes, curves):
    """Draw the test accuracy of each training after each epoch, or round."""
    for (name, accuracy), color in zip(curves.items(), ("#4493f8", "#db6d28"), strict=True):
        axes.plot(range(1, len(accuracy) + 1), accuracy, color=color, linewidth=2.5)
        below = (0, -14) if name.startswith("federated") else (0, 7)
        place = {"textcoords": "offset points", "ha": "right", "color": color, "weight": "bold", "size": 11}
        axes.annotate(f"{name} {accuracy[-1]:.3f}", (len(accuracy), accuracy[-1]), below, **place)
    axes.set(
        title="What they learn", xlabel="epoch, or round of one local epoch", ylabel="test accuracy", ylim=(0, 1.08)
    )


def main(args):
    rounds = 2 if args.fast else args.rounds
    L.seed_everything(0)
    train_loader, test_loader = digits()
    central, federated = Curve(), Curve()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}

    L.Trainer(max_epochs=rounds, callbacks=central, **quiet).fit(Digits(), train_loader, test_loader)
    partition = Partition(DirichletPartitioner(CLIENTS, partition_by="label", alpha=args.alpha))
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=[partition, federated], **quiet)
    trainer.fit(Digits(), train_loader, test_loader)

    labels = np.array([int(label) for _, label in train_loader.dataset])
    counts = np.array([np.bincount(labels[partition.indices(i)], minlength=CLASSES) for i in range(CLIENTS)])
    curves = {"central": central.accuracy, f"federated, {CLIENTS} clients": federated.accuracy}
    dressed = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}
    with plt.rc_context({**dressed, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (bars, lines) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
        draw_labels(bars, counts)
        draw_curves(lines, curves)
        bars.legend_.set_frame_on(False)
        figure.savefig(args.output_dir / "front.png", dpi=110, transparent=True)
    print()
    for name, accuracy in curves.items():
        print(f"{name:<22} test accuracy {accuracy[-1]:.3f}")
    print(f"wrote {args.output_dir / 'front.png'}")


if __name__ == "__main__":
    main(args)

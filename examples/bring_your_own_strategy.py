"""One of ten clients sends garbage: plain averaging is lost, Flower's Krum is not.

Any strategy of ``flwr.serverapp.strategy`` runs as it is, ``FlowerStrategy(Krum(...))``. The attack is a federated
callback of our own that puts a Flower client mod around local training; either goes with any other callback::

    python examples/bring_your_own_strategy.py
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="how many rounds (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="three rounds only")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the picture (%(default)s)")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Krum
from quickstart import Curve, Digits, digits

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FedAvg, FederatedCallback, FlowerStrategy


def send_garbage(message, context, call_next):
    """Act as a Flower client mod: client 0 trains like the others, and then replies with noise for weights."""
    reply = call_next(message, context)
    if context.node_config["partition-id"] == 0:
        noise = np.random.default_rng(message.content["config"]["server-round"])
        arrays = reply.content["arrays"]
        garbage = {name: noise.normal(0, 10, array.shape).astype(array.dtype) for name, array in arrays.items()}
        reply.content["arrays"] = ArrayRecord({name: Array(values) for name, values in garbage.items()})
    return reply


class Attack(FederatedCallback):
    """A federated method in three lines: only its part on the wire is needed here."""

    def client_mods(self, stage):
        return [send_garbage] if stage == "train" else []


def main(args):
    rounds = 3 if args.fast else args.rounds

    methods = {
        "FedAvg, no attack": [FedAvg()],
        "FedAvg, attacked": [FedAvg(), Attack()],
        "Krum, attacked": [FlowerStrategy(Krum(num_malicious_nodes=1)), Attack()],
    }
    L.seed_everything(0)
    train_loader, test_loader = digits()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    curves = {name: Curve() for name in methods}
    for name, callbacks in methods.items():
        L.seed_everything(0, verbose=False)
        trainer = FederatedTrainer(max_rounds=rounds, num_clients=10, callbacks=[*callbacks, curves[name]], **quiet)
        trainer.fit(Digits(), train_loader, test_loader)

    print()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        print(f"{name:<20} test accuracy {curve.accuracy[-1]:.3f}")
        axes.plot(range(1, rounds + 1), curve.accuracy, marker=".", label=name)
    axes.set(title="One of ten clients sends garbage", xlabel="round", ylabel="test accuracy", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.output_dir / "bring_your_own_strategy.png", dpi=120)
    print(f"wrote {args.output_dir / 'bring_your_own_strategy.png'}")


if __name__ == "__main__":
    main(args)

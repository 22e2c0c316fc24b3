"""Fashion-MNIST over a hundred devices of different speed: what to do about the slow ones.

In a round with ten clients all wait for the slowest. A deadline leaves out who is late, over-selection asks thirteen
and takes the first ten, and with FedBuff ten clients train all the time, and every five replies make an update. All
have as much virtual time as synchronous FedAvg takes for its rounds. One picture has the test accuracy against that
time, and against the clients that were asked to train; another who works when, on which version of the weights::

    python examples/stragglers.py --data-dir data
"""

from command_line import fashion_options

if __name__ == "__main__":  # before the imports that take seconds
    args = fashion_options(__doc__, rounds=20)

import lightning as L
import matplotlib.pyplot as plt
from fashion import FashionMLP, fashion_data
from torch.distributions import HalfNormal

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    Deadline,
    DeviceSpeed,
    FedBuff,
    FederatedCallback,
    History,
    OverSelection,
    PartialParticipation,
)

CLIENTS, TARGET = 100, 0.72
SLOWNESS = HalfNormal(0.02)  # seconds for an example: an average client takes 29 s for its 600
METHODS = {
    "FedAvg": lambda: [PartialParticipation(0.1)],
    "deadline": lambda: [PartialParticipation(0.1), Deadline(45)],
    "over-selection": lambda: [OverSelection(0.1, factor=1.3)],
    "FedBuff": lambda: [FedBuff(concurrency=10, buffer_size=5)],
}


class Work(FederatedCallback):
    """Notes who was asked to work, when, and from which version of the weights; of whom is late there is none."""

    def __init__(self):
        self.bars, self.asked, self.begin = [], [], 0.0  # (client, begin, end, version); clients asked, by round

    def on_round_end(self, trainer, round, metrics):
        [clock] = [callback for callback in trainer.callbacks if isinstance(callback, DeviceSpeed)]
        late = [client for callback in trainer.callbacks for client in getattr(callback, "late", ())]
        if buffered := [callback.update for callback in trainer.callbacks if isinstance(callback, FedBuff)]:
            new = [(flight.client, flight.start, flight.end, flight.version) for flight in buffered[0].arrived]
        else:
            ends = {client: self.begin + clock.planned(round, client) for client in self.cohort}
            new = [(client, self.begin, end, round - 1) for client, end in ends.items()]
        new += [(client, self.begin, clock.now, None) for client in late]
        self.bars, self.asked, self.begin = self.bars + new, [*self.asked, sum(self.asked[-1:]) + len(new)], clock.now

    def on_round_start(self, trainer, round, stage, cohort):
        if stage == "train":
            self.cohort = cohort
            [clock] = [callback for callback in trainer.callbacks if isinstance(callback, DeviceSpeed)]
            if not clock.is_planned:
                clock.plan(trainer)


def train(method, args, data, seconds=None):
    """Train for some rounds, or for some virtual seconds; return what was noted."""
    L.seed_everything(args.seed, verbose=False)
    clock, history, work = DeviceSpeed(SLOWNESS, max_virtual_time=seconds), History(), Work()
    trainer = FederatedTrainer(
        max_rounds=args.rounds if seconds is None else 100 * args.rounds,
        num_clients=CLIENTS,
        callbacks=[clock, *METHODS[method](), work, history],
        vectorize_clients=True,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(FashionMLP(lr=0.05), datamodule=data)
    return history["time/virtual"], history["val_acc"], work


def reaches(times, accuracy):
    """Return when the target is reached, in virtual seconds; ``None`` if it is not."""
    return next((time for time, found in zip(times, accuracy, strict=True) if found >= TARGET), None)


def draw_curves(found, path):
    """Draw accuracy against virtual time, and against clients asked."""
    figure, (by_time, by_work) = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for name, (times, accuracy, work) in found.items():
        by_time.plot(times, accuracy, label=name)
        by_work.plot(work.asked, accuracy, label=name)
    by_time.set(title="By time", xlabel="virtual seconds", ylabel="test accuracy")
    by_work.set(title="By work", xlabel="clients asked to train")
    for axes in (by_time, by_work):
        axes.axhline(TARGET, color="grey", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    by_work.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_work(found, path, seconds):
    """Draw who works when: a line for each client of the first seconds, coloured by version."""
    figure, each = plt.subplots(2, 2, figsize=(9, 7), sharex=True, layout="constrained")
    for axes, (name, (_, _, work)) in zip(each.flat, found.items(), strict=True):
        bars = [bar for bar in work.bars if bar[1] < seconds]
        rows = {client: row for row, client in enumerate(dict.fromkeys(bar[0] for bar in bars))}
        for client, begin, end, version in bars:
            colour = "lightgrey" if version is None else f"C{version % 7}"  # before the grey one
            axes.barh(rows[client], end - begin, left=begin, color=colour, height=0.8)
        axes.set(title=name, xlim=(0, seconds), yticks=[], ylabel=f"{len(rows)} clients")
        axes.invert_yaxis()
    for axes in each[-1]:
        axes.set_xlabel("virtual seconds")
    figure.suptitle("Who works when: a colour is a version of the weights, grey is work in vain")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args):
    data = fashion_data(args)
    found = {"FedAvg": train("FedAvg", args, data)}
    seconds = found["FedAvg"][0][-1]
    found |= {name: train(name, args, data, seconds) for name in METHODS if name not in found}
    print(f"\n{seconds:.0f} virtual seconds, {CLIENTS} clients, seed {args.seed}:")
    print(f"                  updates   clients asked   test accuracy   {TARGET} after")
    for name, (times, accuracy, work) in found.items():
        after = reaches(times, accuracy)
        reached = "not reached" if after is None else f"{after:.0f} s"
        print(f"  {name:<14}  {len(times):>7}   {work.asked[-1]:>13}   {accuracy[-1]:>13.4f}   {reached}")
    for draw, name, more in ((draw_curves, "stragglers", ()), (draw_work, "stragglers_work", (seconds / 7,))):
        path = args.output_dir / f"{name}.png"
        draw(found, path, *more)
        print(f"wrote {path}")


if __name__ == "__main__":
    main(args)

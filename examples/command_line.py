"""The options of the examples with Fashion-MNIST and Shakespeare, without imports that take seconds."""

import argparse
import math
from pathlib import Path

FRACTION = 1 / 20  # the part of the passages in an epoch, of the speakers in a round
EVERY = 5  # epochs or rounds from one validation to the next, if they go into their number


def fashion_options(description, rounds=10):
    """Return what the command line says; rounds is how many there are by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="has FashionMNIST/, or gets it (%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the pictures (%(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="how many rounds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, partition, cohorts and batches (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="two rounds on 1,200 images: only to see that it runs")
    args = parser.parse_args()
    args.rounds = 2 if args.fast else args.rounds
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args


def speaker_options(description, rounds):
    """Return what an example is told, and what follows from it; rounds is how many there are by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="has shakespeare/, or gets it (%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the picture (%(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="how many epochs or rounds (%(default)s)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one, or several: a run for each (0)")
    parser.add_argument("--fast", action="store_true", help="one validation, 16 speakers: only to see that it runs")
    args = parser.parse_args()
    args.rounds = EVERY if args.fast else args.rounds
    args.every, args.passes = math.gcd(args.rounds, EVERY), max(1, round(args.rounds * FRACTION))
    args.halves = (slice(48, 56), slice(56, 64)) if args.fast else (slice(0, 70), slice(70, 141))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args

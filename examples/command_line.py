"""The options of all Fashion-MNIST examples, apart from what takes seconds to import: ``--help`` answers at once."""

import argparse
from pathlib import Path


def fashion_options(description):
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="has FashionMNIST/, or gets it (%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="for the pictures (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="how many rounds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, partition, cohorts and batches (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="two rounds on 1,200 images: only to see that it runs")
    args = parser.parse_args()
    args.rounds = 2 if args.fast else args.rounds
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args

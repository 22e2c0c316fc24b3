"""When vectorizing clients pays on this machine, module by module.

``python benchmarks/pays.py [name ...] --threads 1`` prints a round's milliseconds one after the other and as one, their
ratio (below 1 as one is faster) and what ``vectorize_clients=True`` chooses. Both ways run in turn, in one process.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from peers import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData

CLIENTS, STEPS, ROUNDS = 10, 10, 5


def mlp(*widths: int) -> nn.Module:
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """A classifier of sequences: embedding, transformer encoder, mean over tokens."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


def cnn(channels: int, first: int, second: int, side: int) -> nn.Module:
    """Convolution, pool, convolution, pool, dense; pictures of (channels, side, side)."""
    rest = ((side - 2) // 2 - 2) // 2
    return nn.Sequential(
        *(nn.Conv2d(channels, first, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(second * rest**2, 10)),
    )


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def tokens(length: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 64, (length,))


# Name -> module, one example's input, batch size.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear 784-10, batch 10": (lambda: mlp(784, 10), floats(784), 10),
    "linear 784-10, batch 256": (lambda: mlp(784, 10), floats(784), 256),
    "MLP 20-32-32-10, batch 8": (lambda: mlp(20, 32, 32, 10), floats(20), 8),
    "MLP 20-32-32-10, batch 512": (lambda: mlp(20, 32, 32, 10), floats(20), 512),
    "MLP 784-100-100-10, batch 32": (lambda: mlp(784, 100, 100, 10), floats(784), 32),
    "MLP 20-32-32-10, batch 4096": (lambda: mlp(20, 32, 32, 10), floats(20), 4096),
    "MLP 784-100-100-10, batch 256": (lambda: mlp(784, 100, 100, 10), floats(784), 256),
    "MLP 784-100-100-10, batch 1024": (lambda: mlp(784, 100, 100, 10), floats(784), 1024),
    "MLP 784-200-200-10, batch 32": (lambda: mlp(784, 200, 200, 10), floats(784), 32),
    "MLP 784-250-250-10, batch 32": (lambda: mlp(784, 250, 250, 10), floats(784), 32),
    "MLP 784-300-300-10, batch 32": (lambda: mlp(784, 300, 300, 10), floats(784), 32),
    "MLP 784-512-512-10, batch 32": (lambda: mlp(784, 512, 512, 10), floats(784), 32),
    "MLP 784-1024-1024-10, batch 32": (lambda: mlp(784, 1024, 1024, 10), floats(784), 32),
    "BatchNorm and Dropout, batch 32": (norm, floats(100), 32),
    "encoder 32 wide, 1 layer, 16 tokens": (lambda: Encoder(32, 1), tokens(16), 16),
    "encoder 32 wide, 2 layers, 16 tokens": (lambda: Encoder(32, 2), tokens(16), 16),
    "encoder 32 wide, 2 layers, 32 tokens": (lambda: Encoder(32, 2), tokens(32), 16),
    "encoder 64 wide, 1 layer, 16 tokens": (lambda: Encoder(64, 1), tokens(16), 16),
    "encoder 64 wide, 2 layers, 32 tokens": (lambda: Encoder(64, 2), tokens(32), 16),
    "encoder 64 wide, 2 layers, 128 tokens": (lambda: Encoder(64, 2), tokens(128), 16),
    "CNN 4-8, 12x12, batch 8": (lambda: cnn(1, 4, 8, 12), floats(1, 12, 12), 8),
    "CNN 8-16, 28x28, batch 16": (lambda: cnn(1, 8, 16, 28), floats(1, 28, 28), 16),
    "CNN 8-16, 28x28, batch 64": (lambda: cnn(1, 8, 16, 28), floats(1, 28, 28), 64),
    "CNN 16-32, 28x28, batch 10": (lambda: cnn(1, 16, 32, 28), floats(1, 28, 28), 10),
    "CNN 16-32, 32x32, batch 32": (lambda: cnn(3, 16, 32, 32), floats(3, 32, 32), 32),
    "CNN 32-64, 16x16, batch 10": (lambda: cnn(3, 32, 64, 16), floats(3, 16, 16), 10),
    "CNN 32-64, 32x32, batch 10": (lambda: cnn(3, 32, 64, 32), floats(3, 32, 32), 10),
}


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Rounds(L.Callback):
    """Each round's seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.began = perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds.append(perf_counter() - self.began)


def seconds(case: str, vectorize: bool | int | str) -> tuple[float, bool]:
    """Of a round, and whether clients were left alone."""
    build, example, batch = CASES[case]
    torch.manual_seed(0)
    module, rounds = Classifier(build()), Rounds()
    x = torch.stack([example() for _ in range(batch * STEPS)])
    loader = DataLoader(TensorDataset(x, torch.randint(0, 10, (len(x),))), batch_size=batch, shuffle=True)
    trainer = FederatedTrainer(
        max_rounds=ROUNDS + 2, vectorize_clients=vectorize, callbacks=[ClientData([loader] * CLIENTS), rounds], **QUIET
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module)
    alone = any("one after the other" in str(warning.message) for warning in said)
    return median(rounds.seconds[2:]), alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; by default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rank_zero_module.log.disabled = True
    print(f"torch {torch.__version__}, {args.threads} threads, {CLIENTS} clients, {STEPS} steps a round")
    for case in CASES:
        if args.names and not any(name in case for name in args.names):
            continue
        pairs = [(seconds(case, False)[0], seconds(case, "require")[0]) for _ in range(args.repeats)]
        ratios = [as_one / alone for alone, as_one in pairs]
        choice = "alone" if seconds(case, True)[1] else "vectorized"
        alone, as_one = (median(column) * 1e3 for column in zip(*pairs, strict=True))
        print(
            f"| {case} | {alone:.1f} ms | {as_one:.1f} ms | {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            f" | {choice} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

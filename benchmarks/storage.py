"""What clients keep, in memory and in files: seconds a round, and the server's memory as more clients have some.

::

    python benchmarks/storage.py time --steps 50            # 100 clients, all in each round, both ways in turn
    python benchmarks/storage.py memory --clients 10000     # each trains once; resident memory after each thousandth

SCAFFOLD on an MLP of 90k parameters, so each client keeps 90k floats; ``--steps`` of batch 32 a round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from lightning_fed import FederatedTrainer  # noqa: E402
from lightning_fed.callbacks import ClientData, FederatedCallback, PartialParticipation, Scaffold  # noqa: E402

QUIET: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")} | {
    "logger": False
}


class Net(L.LightningModule):
    """784-100-100-10."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class EachOnce(PartialParticipation):
    """A hundred clients a round, each in one round."""

    def size(self, stage: str, num_clients: int) -> int:
        return min(100, num_clients)

    def sample(self, stage: str, round: int, num_clients: int, seed: int) -> list[int]:
        return list(range(100 * (round - 1), 100 * round))


class Watch(FederatedCallback):
    """Takes the time of each round, and the process' memory after it."""

    def __init__(self, every: int = 0) -> None:
        self.seconds, self._begin, self._every = [], 0.0, every

    def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Any) -> None:
        self._begin = time.perf_counter()

    def on_round_end(self, trainer: Any, round: int, metrics: dict[str, float]) -> None:
        self.seconds.append(time.perf_counter() - self._begin)
        if self._every and round % self._every == 0:
            print(f"| {100 * round:,} | {resident():.0f} | {median(self.seconds[-self._every :]):.2f} |", flush=True)


def resident() -> float:
    """Megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def fit(clients: int, rounds: int, steps: int, storage: Any, watch: Watch, *callbacks: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 32 * steps
    x, y = torch.randn(size, 784, generator=generator), torch.randint(0, 10, (size,), generator=generator)
    data = DataLoader(TensorDataset(x, y), batch_size=32)
    methods = [ClientData(lambda client: data, num_clients=clients), Scaffold(), watch, *callbacks]
    how = {"callbacks": methods, "client_storage": storage, "accelerator": "cpu", **QUIET}
    FederatedTrainer(max_rounds=rounds, **how).fit(Net())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--storage", choices=["memory", "files"], default="files", help="of `memory` (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread")
    with tempfile.TemporaryDirectory(prefix="storage-") as folder:
        if args.what == "memory":
            print("| clients that have trained | resident memory, MB | a round of 100, s |\n|---|---|---|")
            storage = "memory" if args.storage == "memory" else folder
            fit(args.clients, args.clients // 100, args.steps, storage, Watch(every=10), EachOnce())
            return
        took: dict[str, list[float]] = {"memory": [], "files": []}
        for repeat in range(args.repeats):
            for way in took:
                watch = Watch()
                fit(100, args.rounds, args.steps, "memory" if way == "memory" else Path(folder) / str(repeat), watch)
                took[way].append(median(watch.seconds[2:]))
        ratios = [files / memory for memory, files in zip(took["memory"], took["files"], strict=True)]
        for way, seconds in took.items():
            print(f"| {way} | {median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f}) s a round |")
        print(f"| files / memory | {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |")


if __name__ == "__main__":
    main()

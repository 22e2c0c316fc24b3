"""What the clock of asynchronous training costs: milliseconds of CPU an update, and resident memory as updates go on.

::

    python benchmarks/clock.py --clients 100000 --concurrency 1000 --buffer 100 --updates 1000

Clients train a linear layer on one example, so that nearly all of a round is what surrounds the clock; the clock's own
part is who arrives next, which versions of the weights are kept, and what is logged of both.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributions import HalfNormal  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from benchmarks.storage import QUIET  # noqa: E402
from lightning_fed import FederatedTrainer  # noqa: E402
from lightning_fed.callbacks import DeviceSpeed, FedBuff  # noqa: E402


class Linear(L.LightningModule):
    """Eight numbers in, one out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Timed(FedBuff):
    """Notes what its own part of each update took, and how much memory there is at its end."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.took: list[float] = []
        self.memory: list[float] = []

    def sample(self, *args: Any) -> list[int]:
        return self._timed(super().sample, args, first=args[0] == "train")

    def weights_to_client(self, *args: Any) -> Any:
        return self._timed(super().weights_to_client, args)

    def on_round_end(self, *args: Any) -> None:
        self._timed(super().on_round_end, args)
        resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
        self.memory.append(int(resident.split()[1]) / 1024)

    def _timed(self, call: Any, args: Any, first: bool = False) -> Any:
        if first:
            self.took.append(0.0)
        begin = time.process_time()
        result = call(*args)
        self.took[-1] += time.process_time() - begin
        return result


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("clients", 100_000), ("concurrency", 1000), ("buffer", 100), ("updates", 1000)):
        parser.add_argument(f"--{name}", type=int, default=number, help="%(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    method = Timed(args.concurrency, args.buffer)
    trainer = FederatedTrainer(
        max_rounds=args.updates,
        num_clients=args.clients,
        callbacks=[DeviceSpeed(HalfNormal(1.0)), method],
        vectorize_clients=True,
        seed=0,
        **QUIET,
    )
    trainer.fit(Linear(), DataLoader(TensorDataset(torch.randn(args.clients, 8)), batch_size=8))
    fleet = f"{args.clients} clients, concurrency {args.concurrency}, buffer {args.buffer}"
    print(f"torch {torch.__version__}, one thread; {fleet}")
    print("updates         ms of CPU an update: median, 95th of 100    resident MB at the end")
    step = max(1, args.updates // 5)
    for begin in range(0, args.updates, step):
        part = sorted(1000 * seconds for seconds in method.took[begin : begin + step])
        end, late = begin + len(part), part[int(0.95 * len(part))]
        print(f"{begin + 1:>5} to {end:<5}  {median(part):.3f}, {late:.3f}  {method.memory[end - 1]:.0f}")


if __name__ == "__main__":
    main()

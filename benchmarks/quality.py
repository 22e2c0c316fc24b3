"""How accurate methods are on Fashion-MNIST, beside published figures; writes the tables of QUALITY.md.

::

    python benchmarks/quality.py                    # both tables, three seeds: one to two hours on one core
    python benchmarks/quality.py drift --seeds 0    # NIID-Bench's setting, one seed
    python benchmarks/quality.py personal           # PFLlib's setting
    python benchmarks/quality.py --show             # the tables of what has been computed
    python benchmarks/quality.py --try              # one round on few images: only to see that it runs

Each run is kept in ``.cache/quality/`` as soon as it is done, and the tables are written anew: a script that was
stopped goes on where it was. A run whose ``Settings`` (``settings.py``) have changed since is computed again; after
another change remove its file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

from benchmarks.common import CACHE, fashion  # noqa: E402
from benchmarks.settings import TABLES, Settings  # noqa: E402
from lightning_fed import FederatedTrainer  # noqa: E402
from lightning_fed.callbacks import ClientMetrics, History, Partition  # noqa: E402

OUT = Path(__file__).with_name("QUALITY.md")
QUIET: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")} | {
    "logger": False,
    "num_sanity_val_steps": 0,
}


class CNN(L.LightningModule):
    """Two 5x5 convolutions of 6 and 16 channels with 2x2 pooling, 120-84-10; ``norm`` puts BatchNorm behind them.

    ReLU comes after the pooling, which gives the same numbers in less time.
    """

    def __init__(self, settings: Settings, norm: bool = False) -> None:
        super().__init__()
        self.settings = settings
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 6), (6, 16)):
            layers += [nn.Conv2d(inputs, outputs, 5), *([nn.BatchNorm2d(outputs)] if norm else [])]
            layers += [nn.MaxPool2d(2), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(84, 10)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self.head(self.body(batch[0])), batch[1])
        self.log("val_acc", self.accuracy, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        s = self.settings
        return torch.optim.SGD(self.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)


def examples(train: bool, count: int) -> TensorDataset:
    x, y = fashion(train)
    return TensorDataset(x[:count].view(-1, 1, 28, 28), y[:count])


@dataclass(frozen=True)
class Run:
    """One method with one partition and one seed."""

    table: str
    partition: str
    method: str
    seed: int

    @property
    def file(self) -> Path:
        words = re.sub(r"[^A-Za-z0-9.]+", "_", f"{self.table} {self.partition} {self.method} {self.seed}")
        return CACHE / "quality" / f"{words}.json"

    def settings(self) -> Settings:
        common, _, methods = TABLES[self.table]
        return replace(common, local_epochs=methods[self.method].local_epochs or common.local_epochs)

    def kept(self) -> dict[str, Any] | None:
        """What an earlier call computed, with the settings of today."""
        if not self.file.exists():
            return None
        found = json.loads(self.file.read_text())
        return found if found["settings"] == asdict(self.settings()) else None

    def keep(self, result: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"settings": asdict(self.settings()), **result}))
        part.replace(self.file)

    def compute(self, settings: Settings) -> dict[str, Any]:
        """Train, and return the accuracy after each round, and of the worst client where clients evaluate."""
        _, partitions, methods = TABLES[self.table]
        method, began = methods[self.method], time.perf_counter()
        L.seed_everything(self.seed, verbose=False)
        partition = Partition(partitions[self.partition](settings.clients, self.seed), settings.val_fraction)
        own, history = settings.val_fraction > 0, History()
        trainer = FederatedTrainer(
            max_rounds=settings.rounds,
            local_epochs=settings.local_epochs,
            callbacks=[partition, *method.callbacks(), ClientMetrics(), history],
            limit_val_batches=0 if own else None,  # the server's: a personal head is nobody's there
            accelerator="cpu",
            **QUIET,
        )
        loader = DataLoader(examples(True, settings.images), batch_size=settings.batch, shuffle=True)
        trainer.fit(CNN(settings, method.norm), loader, DataLoader(examples(False, 10_000), batch_size=1000))
        result = {"accuracy": history["clients/val_acc" if own else "val_acc"]}
        if own:
            result["worst"] = history["clients/val_acc/min"]
        return {**result, "seconds": time.perf_counter() - began, "versions": versions(), "commit": commit()}


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "flwr", "flwr-datasets"))


@cache  # the code that runs is that of the script's start
def commit() -> str:
    """The last one that changed the package."""
    command = ["git", "log", "-1", "--format=%h", "--", "lightning_fed"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def runs(table: str, seeds: Iterable[int]) -> list[Run]:
    _, partitions, methods = TABLES[table]
    where = [(p, m) for p in partitions for m, method in methods.items() if p in method.published]
    return [Run(table, *cell, seed) for seed in seeds for cell in where]


def over_seeds(values: Iterable[float]) -> str:
    """Mean and standard deviation (of a sample), in percent."""
    percent = [100 * value for value in values]
    return f"{mean(percent):.1f}" + (f" ± {stdev(percent):.1f}" if len(percent) > 1 else "")


def rows(table: str, results: dict[Run, dict[str, Any]]) -> list[str]:
    settings, partitions, methods = TABLES[table]
    columns = ["partition", "method", "published", "best round", "last round", "seeds"]
    columns[5:5] = ["worst client, last round"] if settings.val_fraction else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for partition in partitions:
        for name, method in methods.items():
            found = [r for run, r in results.items() if (run.partition, run.method) == (partition, name)]
            if found:
                cells = [partition, name, method.published[partition], over_seeds(max(r["accuracy"]) for r in found)]
                cells += [over_seeds(r[kind][-1] for r in found) for kind in ("accuracy", "worst") if kind in found[0]]
                lines.append(f"| {' | '.join(cells)} | {len(found)} |")
    return lines


def section(table: str, results: dict[Run, dict[str, Any]]) -> str:
    mine = {run: result for run, result in results.items() if run.table == table}
    if not mine:
        return ""
    settings = ", ".join(f"{name} {value}" for name, value in asdict(TABLES[table][0]).items() if value)
    about = [
        f"Settings: {settings}; one thread.",
        f"Seeds {', '.join(map(str, sorted({run.seed for run in mine})))}: of weights, partition and batch order.",
        f"Versions: {'; '.join(sorted({r['versions'] for r in mine.values()}))};"
        f" lightning_fed at {', '.join(sorted({r['commit'] for r in mine.values()}))}.",
        f"{len(mine)} runs, {sum(r['seconds'] for r in mine.values()) / 60:.0f} minutes.",
    ]
    return "\n".join([*about, "", *rows(table, results)])


def write(results: dict[Run, dict[str, Any]]) -> None:
    """Put the tables between their marks."""
    text = OUT.read_text()
    for table in TABLES:
        begin, end = f"<!-- {table} -->", f"<!-- end of {table} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{section(table, results)}\n{end}{rest.split(end)[1]}"
    OUT.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="table", help=f"{', '.join(TABLES)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--try", dest="trial", action="store_true", help="one round on 3,000 images, nothing kept")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"no table {', '.join(map(repr, sorted(unknown)))}; there are {', '.join(TABLES)}")
    torch.set_num_threads(1)
    tables = args.tables or list(TABLES)
    if args.trial:
        few = {"images": 3000, "rounds": 1}
        tried = {run: run.compute(replace(run.settings(), **few)) for table in tables for run in runs(table, [0])}
        print("\n\n".join(section(table, tried) for table in tables))
        return
    for run in [] if args.show else [run for seed in args.seeds for table in tables for run in runs(table, [seed])]:
        if run.kept() is None:
            run.keep(result := run.compute(run.settings()))
            print(run, f"{result['accuracy'][-1]:.4f}, {result['seconds']:.1f} s", flush=True)
            write(kept())
    write(kept())
    print(OUT.read_text())


def kept() -> dict[Run, dict[str, Any]]:
    found = {run: run.kept() for table in TABLES for run in runs(table, range(100))}
    return {run: result for run, result in found.items() if result is not None}


if __name__ == "__main__":
    main()

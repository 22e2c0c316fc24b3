"""The federation of these tests: the server's and the sites' scripts build it, and so does one process for comparison.

Run as a script it is a site: ``python -m tests.deployment.federation '{"client": 0, ...}'``, or a server.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, FedAdam, History
from lightning_fed.engines import Engine, SuperLink
from tests.helpers import QUIET

CLIENTS = 3


class Net(LightningModule):
    """BatchNorm, Dropout, a bfloat16 buffer, and an optimizer whose state clients carry."""

    def __init__(self, hidden: int = 8, frozen: float | None = None):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 3)
        )
        self.register_buffer("narrow", torch.tensor([1.0, 3.140625], dtype=torch.bfloat16))
        if frozen is not None:
            self.scale = nn.Parameter(torch.tensor(frozen), requires_grad=False)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def module(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return SlowNet(**kwargs) if "seconds" in kwargs else Net(**kwargs)


def examples(client: int) -> list[list[torch.Tensor]]:
    """Inputs and labels to train and to validate on, of another size for each client."""
    generator = torch.Generator().manual_seed(client)

    def some(count: int) -> list[torch.Tensor]:
        y = torch.randint(0, 3, (count,), generator=generator)
        return [torch.randn(count, 8, generator=generator) + y[:, None], y]

    return [some(24 + 8 * client), some(16)]


def data(client: int, file: str | None = None) -> tuple[DataLoader, DataLoader]:
    """A train and a val loader, of a file that has what ``examples`` gives, or without one."""
    train, val = torch.load(file) if file else examples(client)
    return DataLoader(TensorDataset(*train), 8, shuffle=True), DataLoader(TensorDataset(*val), 8)


def trainer(
    engine: Engine | str = "in_process",
    max_rounds: int = 5,
    callbacks: tuple[Callback, ...] = (),
    *,
    file: str | None = None,
    clients: int = CLIENTS,
    **kwargs: Any,
) -> FederatedTrainer:
    return FederatedTrainer(
        max_rounds=max_rounds,
        engine=engine,
        client_state="carry",
        seed=3,
        callbacks=[ClientData(partial(data, file=file), num_clients=clients), FedAdam(), *callbacks],
        **{**QUIET, **kwargs},
    )


@dataclass
class Outcome:
    """What a fit ends with."""

    weights: dict[str, torch.Tensor]
    metrics: dict[str, float]
    history: list[dict[str, float]]
    clients: list[dict[str, Any]]

    @classmethod
    def of(cls, fit: FederatedTrainer, model: LightningModule) -> "Outcome":
        [history] = [callback for callback in fit.callbacks if isinstance(callback, History)]
        metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
        return cls(model.state_dict(), metrics, history.rows, history.clients)

    def assert_same(self, expected: "Outcome") -> None:
        """Bit for bit."""
        assert list(self.weights) == list(expected.weights)
        for name, tensor in expected.weights.items():
            assert self.weights[name].dtype == tensor.dtype
            assert torch.equal(self.weights[name], tensor), name
        assert self.metrics == expected.metrics
        assert self.history == expected.history
        assert self.clients == expected.clients


def fitted(engine: Engine | str, **kwargs: Any) -> Outcome:
    """What a fit gives, with its whole history."""
    model, fit = module(), trainer(engine, callbacks=(History(per_client=True),), **kwargs)
    fit.fit(model)
    return Outcome.of(fit, model)


class SlowNet(Net):
    """Takes its time in some rounds; says so in a file, for others to act meanwhile."""

    def __init__(self, seconds: float, rounds: list[int], sign: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.seconds, self.slow_in, self.sign = seconds, rounds, sign

    def on_train_epoch_start(self):
        import time

        sign = Path(self.sign)
        if self.trainer.current_round in self.slow_in and not sign.exists():
            sign.touch()
            until = time.monotonic() + self.seconds
            while time.monotonic() < until:
                time.sleep(0.05)


def site(address: str, client: int, root: str, module_kwargs=None, slow=None, **kwargs: Any) -> None:
    here = trainer("in_process", default_root_dir=root)
    train, val = data(client)
    here.join(address, module(**{**(module_kwargs or {}), **(slow or {})}), train, val, client=client, **kwargs)


def server(address: str, root: str, rounds: int, resume: bool, tolerant: bool = False, **kwargs: Any) -> None:
    callbacks = [ModelCheckpoint(root, filename="{epoch}", save_last=True, save_top_k=-1), History(per_client=True)]
    callbacks += [FaultTolerance()] if tolerant else []
    fit = trainer(
        SuperLink(address, **kwargs), rounds, tuple(callbacks), enable_checkpointing=True, default_root_dir=root
    )
    model = module()
    fit.fit(model, ckpt_path="last" if resume else None)
    torch.save(vars(Outcome.of(fit, model)), Path(root) / "end.pt")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    {"site": site, "server": server}[given.pop("role")](**given)

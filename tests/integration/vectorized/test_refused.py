"""What cannot be vectorized, or would be slower, trains one by one and says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.client.vectorized import dispatch
from lightning_fed.errors import ConfigurationError
from tests.helpers import sweep
from tests.integration.vectorized.runs import CASES, ROUNDS, Counter, Lit, assert_close, data, mlp, run


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


class Branching(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if loss > 0.5:
            loss = 2 * loss
        return loss


class Measured(Lit):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        return nn.functional.cross_entropy(logits, batch[1])


class Item(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.last = loss.item()
        return loss


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(len(x), 3, 2))[0][:, -1])


class Hooked(Lit):
    def on_train_epoch_end(self) -> None:
        self.log("epoch", 1.0)


class Own(torch.optim.SGD):
    """An optimizer of the user's own."""


class ByNorm(Callback):
    """Scales by the norm of all gradients, which are those of all clients."""

    acts_elementwise = True  # which is not so

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        norm = torch.stack([p.grad.norm() for p in pl_module.parameters()]).norm()
        for p in pl_module.parameters():
            p.grad /= norm


class Noise(Callback):
    """Draws outside of the step."""

    acts_elementwise = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for p in pl_module.parameters():
            p.grad += 1e-6 * torch.randn_like(p)


class Clips(Callback):
    """Harmless in a trial whose gradients are small."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(pl_module.parameters(), 2.0)


class Counting(Lit):
    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx) * min(1.0, self.steps / 12)


class Mixup(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        share, order = np.random.beta(1, 1), torch.randperm(len(batch[0]))
        return super().training_step((share * batch[0] + (1 - share) * batch[0][order], batch[1]), batch_idx)


class Keeps(Lit):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.matrices = [p for p in self.parameters() if p.ndim > 1]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 1e-3 * sum(p.square().sum() for p in self.matrices)


class Anchored(Lit):
    def on_train_start(self) -> None:
        self.anchors = [p.detach().clone() for p in self.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        pairs = zip(self.parameters(), self.anchors, strict=True)
        return super().training_step(batch, batch_idx) + 0.05 * sum((p - a).square().sum() for p, a in pairs)


class DeclaredAnchored(Anchored):
    acts_elementwise = True  # which is not so: the step sees all clients' anchors


class BySize(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + 1 / len(self.trainer.train_dataloader.dataset))


class Plateau(Lit):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}


class WhoAmI(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + self.trainer.client_id)


class Folded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, 6).mean(1)


REFUSED: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any], str]] = {
    "manual optimization": (Manual, {}, "Manual optimizes manually"),
    "control flow": (
        lambda: Branching(mlp()),
        {},
        r"depends on the data \(test_refused.py, line \d+: `if loss > 0.5:`\)",
    ),
    "metric object": (Measured, {}, r"test_refused.py, line \d+: `self.(accuracy|log)\("),
    "item": (lambda: Item(mlp()), {}, r"calls `.item\(\)` on a per-client value.*`self.last = loss.item\(\)`"),
    "LSTM": (lambda: Lit(Recurrent()), {}, "nn.LSTM keeps its weights where they cannot be stacked"),
    "hook": (lambda: Hooked(mlp()), {}, "Hooked writes on_train_epoch_end"),
    "own optimizer": (lambda: Lit(mlp(), partial(Own, lr=0.1)), {}, "Own is not known to act element by element"),
    "LBFGS": (lambda: Lit(mlp(), torch.optim.LBFGS), {}, "LBFGS is not known"),
    "callback that mixes clients": (
        CASES["MLP"],
        {"client_callbacks": [ByNorm()]},
        "vectorized clients would get another 'net",
    ),
    "callback that draws": (CASES["MLP"], {"client_callbacks": [Noise()]}, "drawn outside of its step"),
    "undeclared callback": (
        CASES["MLP"],
        {"client_callbacks": [Clips()]},
        "client callback Clips writes on_before_optimizer_step, and does not say acts_elementwise = True",
    ),
    "counting steps": (lambda: Counting(mlp()), {}, "its step changes module.steps"),
    "mixup": (lambda: Mixup(mlp()), {}, "draws from Python's or NumPy's generator"),
    "kept parameters": (Keeps, {}, "parameters that are kept in an attribute"),
    "anchors": (lambda: Anchored(mlp()), {}, "Anchored writes on_train_start, and does not say"),
    "anchors, declared": (lambda: DeclaredAnchored(mlp()), {}, ""),
    "by size of the data": (lambda: BySize(mlp()), {}, "reads trainer.train_dataloader"),
    "plateau": (
        lambda: Plateau(mlp()),
        {"client_state": "reset"},
        "ReduceLROnPlateau follows each client's own metric",
    ),
    "carried optimizers": (CASES["MLP"], {"client_state": "carry"}, "client_state='carry'"),
    "local validation": (CASES["MLP"], {"local_validation": True}, "local_validation=True"),
    "client id": (lambda: WhoAmI(mlp()), {}, r"reads trainer.client_id \(test_refused.py"),
    "examples of other shapes": (
        lambda: Lit(nn.Sequential(Folded(), mlp())),
        {"loaders": [DataLoader(TensorDataset(torch.randn(8, n), torch.zeros(8).long()), 4) for n in (6, 12)]},
        "clients' examples have different shapes",
    ),
    "loader workers": (
        CASES["MLP"],
        {"loaders": [DataLoader(TensorDataset(torch.randn(8, 6), torch.zeros(8).long()), num_workers=1)] * 2},
        "num_workers=1",
    ),
}


# One for each place at which it is found out: the module, its trace, the optimizer, the trial, callbacks, options.
FEW = (
    *("manual optimization", "control flow", "metric object", "LSTM", "own optimizer", "callback that mixes clients"),
    *("counting steps", "mixup", "undeclared callback", "carried optimizers", "examples of other shapes"),
)


@pytest.mark.parametrize("name", sweep(REFUSED, FEW))
def test_what_does_not_qualify_trains_one_by_one_and_says_why(name: str, counter: Counter) -> None:
    build, options, reason = REFUSED[name]
    options = {"max_rounds": 1, **options}
    alone = run(build, **copy.deepcopy(options))
    with pytest.warns(UserWarning, match=f"clients train one after the other: .*{reason}"):
        tried = run(build, vectorize_clients=True, **copy.deepcopy(options))
    assert counter.train == 0
    torch.testing.assert_close(tried[0], alone[0], rtol=0, atol=0)


class Wide(nn.Module):
    """Takes long in the memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 100_000).tanh().view(len(x), -1, 3).mean(1)


SLOWER: dict[str, tuple[Callable[[], L.LightningModule], str]] = {
    "large activations": (
        lambda: Lit(nn.Sequential(nn.Linear(6, 3), Wide())),
        r"with \d+\.\d MiB of activations a client",
    ),
    "large weights": (
        lambda: Lit(nn.Sequential(nn.Linear(6, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 3))),
        r"with 3\.9 MiB of weights a client",
    ),
}


@pytest.mark.parametrize("name", sweep(SLOWER, ["large weights"]))
def test_what_would_be_slower_is_done_only_where_a_number_says_so(name: str, counter: Counter) -> None:
    build, reason = SLOWER[name]
    slower = f"clients train one after the other: {reason} they would be slower vectorized on a CPU"
    with pytest.warns(UserWarning, match=slower):
        run(build, vectorize_clients=True, max_rounds=1)
    assert (counter.train, counter.evaluate > 0) == (0, True)
    run(build, vectorize_clients=4, max_rounds=1)
    assert counter.train > 0


def test_how_many_at_once_follows_from_memory(monkeypatch: pytest.MonkeyPatch, counter: Counter) -> None:
    sizes: list[int] = []
    fit = dispatch.vectorized_fit
    monkeypatch.setattr(dispatch, "vectorized_fit", lambda *args: sizes.append(len(args[0])) or fit(*args))
    loaders = [train for train, _ in data(sizes=[16] * 9)]
    run(CASES["MLP"], vectorize_clients=True, max_rounds=1, loaders=loaders)
    assert sizes == [9]
    sizes.clear()
    each = 4 * 4 * sum(p.numel() for p in mlp().parameters())
    monkeypatch.setattr(dispatch, "_memory", lambda device: 6 * each)
    run(CASES["MLP"], vectorize_clients=True, max_rounds=1, loaders=loaders)
    assert len(sizes) > 1
    assert max(sizes) <= 6


def test_what_does_not_qualify_is_an_error_where_it_is_required() -> None:
    with pytest.raises(ConfigurationError, match=r"vectorize_clients='require'.*Manual optimizes manually"):
        run(Manual, vectorize_clients="require")


class MeasuredInValidation(Lit):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)


def test_training_and_evaluation_qualify_apart(counter: Counter) -> None:
    with pytest.warns(UserWarning, match="clients evaluate one after the other: .*accuracy"):
        as_one = run(MeasuredInValidation, vectorize_clients="require")
    assert (counter.train, counter.evaluate) == (ROUNDS * 5, 0)
    assert_close(as_one, run(MeasuredInValidation))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vectorize_clients": 0}, "write True, 'require', or how many at once"),
        ({"vectorize_clients": "yes"}, "write True, 'require', or how many at once"),
        ({"vectorize_clients": True, "engine": "ray"}, "for engine='in_process' and engine='processes'"),
        ({"compile_clients": True}, "write vectorize_clients=True, too"),
    ],
)
def test_arguments_that_contradict(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        FederatedTrainer(max_rounds=1, num_clients=2, **options)

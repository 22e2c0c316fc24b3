"""Bad habits of modules and data: state in all the places where state can be, which one client may leave to the next.

Each habit changes something at every step and lets it act on the numbers, so that whoever finds what another one left
gets other weights.
"""

from __future__ import annotations

import copy
import functools
import random
from array import array
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, random_split
from torchmetrics import SumMetric

from lightning_fed.testing import ToyModule

Prepare = Callable[[Any], None]
Act = Callable[[Any, Tensor, int], Tensor]  # (module, x, batch_idx) -> x


def nothing(module: Any) -> None:
    pass


class Slotted:
    __slots__ = ("count", "kept")

    def __init__(self) -> None:
        self.count, self.kept = 0, []


class Tracker:
    """An object of the user's own, with an array in it."""

    def __init__(self) -> None:
        self.values = np.ones(3)
        self.calls = 0

    def note(self, x: Tensor) -> float:
        self.values *= 1.02
        self.calls += 1
        return float(self.values[0]) + 0.01 * self.calls


def counter() -> Callable[[], int]:
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return count

    return tick


def longer(kept: list[int]) -> int:
    kept.append(1)
    return len(kept)


def set_attributes(**attributes: Any) -> Prepare:
    """New copies of some values as attributes of a module."""

    def prepare(module: Any) -> None:
        for name, value in attributes.items():
            setattr(module, name, value() if callable(value) else copy.deepcopy(value))

    return prepare


def buffer(value: Tensor) -> Prepare:
    return lambda module: module.register_buffer("extra", value.clone(), persistent=False)


def scaled(change: Callable[[Any], Any]) -> Act:
    """Lets ``change(module)``, a small number, act on the inputs."""
    return lambda module, x, batch_idx: x * (1 + 0.05 * float(change(module)))


def _set(module: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(module, name, value)
    return value


def _at_first(change: Callable[[Any], Any]) -> Act:
    def act(module: Any, x: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            change(module)
        return x

    return act


def _own_layer(module: Any) -> None:
    module.own = nn.Linear(8, 8)
    module.leaves_out = "own."


def _own_layer_acts(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    return x + module.own(x)


def _lazy(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    if not hasattr(module, "found"):
        module.found = x.mean()
    return x - module.found


def _last(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    hidden = module.net[0](x)
    before, module.last = getattr(module, "last", None), hidden.mean()
    return x if before is None else x + before.detach()


def _probe_mode(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    factor = 1.3 if module.probe.training else 0.8
    module.probe.eval()
    return x * factor


def _thaw(module: Any) -> None:
    module.net[0].bias.requires_grad_(not module.net[0].bias.requires_grad)


def _new_data(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    module.teacher[0].data = module.teacher[0].data + 0.1
    return x * module.teacher[0].mean()


def _weight_attribute(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    weight = module.net[0].weight
    weight.seen = getattr(weight, "seen", 0) + 1
    return x * (1 + 0.05 * weight.seen)


def _never_reset(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    module.metric.update(x.abs().mean().detach())
    return x / (1 + float(module.metric.compute()))


GENERATOR = np.random.default_rng(5)
HELD = SimpleNamespace(draws=random.Random(5))


def _by_a_helper() -> float:
    return float(GENERATOR.uniform(0.5, 1.5))


def _remembers(x: Tensor, factor: float) -> Tensor:
    _remembers.calls += 1  # type: ignore[attr-defined]
    return x * (1 + factor * _remembers.calls)  # type: ignore[attr-defined]


_remembers.calls = 0  # type: ignore[attr-defined]


def _wrapped(function: Callable[[Any], Any]) -> Any:
    @functools.wraps(function)
    def inner(module: Any) -> Any:
        return function(module)

    return inner


class Code:
    """What it does depends on what its code finds around it."""

    @property
    def by_property(self) -> float:
        return float(GENERATOR.uniform(0.5, 1.5))

    @_wrapped
    def by_wrapped(self) -> float:
        return _by_a_helper()

    def by_default(self, draws: Any = np.random.default_rng(3)) -> float:
        return float(draws.uniform(0.5, 1.5))

    def by_holder(self) -> float:
        return HELD.draws.uniform(0.5, 1.5)

    def counts(self, calls: list[int] = []) -> float:
        return 1 + 0.05 * longer(calls)


class Patched:
    """What it does is set on its class, in the class within it, and on its methods."""

    class Settings:
        factor = 1.0

    def counts_itself(self) -> float:
        own: Any = type(self).counts_itself
        own.calls = getattr(own, "calls", 0) + 1
        return 1 + 0.05 * own.calls

    def scale(self) -> float:
        return 1.0

    def wraps_itself(self) -> float:
        before = type(self).scale
        type(self).scale = lambda own: before(own) * 1.05  # type: ignore[method-assign]
        return self.scale()


def _sensed(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    gradient = module.probe.grad
    return x * module.probe * (1 if gradient is None else 1 + 0.05 * float(gradient.abs()))


def _turned(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    if not hasattr(module, "turned"):
        module.square.weight.data, module.turned = module.square.weight.data.t(), True
    return x + module.square(x)


def _signed(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    factor = 1.1 if torch.signbit(module.zero) else 0.9
    module.zero.fill_(-0.0)
    return x * factor


def _traced(module: Any) -> None:
    module.traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))
    module.leaves_out = "traced."


def _traced_acts(module: Any, x: Tensor, batch_idx: int) -> Tensor:
    module.traced.get_submodule("1").p *= 0.8
    return x * (1 + module.traced.get_submodule("1").p)


MODULE_HABITS: dict[str, tuple[Prepare, Act]] = {
    "rebinds a buffer": (buffer(torch.ones(1)), scaled(lambda m: _set(m, extra=m.extra * 1.2))),
    "writes into a buffer": (buffer(torch.ones(1)), scaled(lambda m: m.extra.mul_(1.2))),
    "grows a buffer": (
        buffer(torch.ones(1)),
        scaled(lambda m: len(_set(m, extra=torch.cat([m.extra, m.extra[:1]])))),
    ),
    "resizes a buffer": (buffer(torch.ones(1)), scaled(lambda m: m.extra.resize_(len(m.extra) + 1).fill_(1).sum())),
    "rebinds an expanded buffer": (
        buffer(torch.ones(1).expand(8)),
        lambda m, x, i: x * _set(m, extra=m.extra * 1.05),
    ),
    "appends to a list": (set_attributes(kept=[]), scaled(lambda m: longer(m.kept))),
    "empties a list": (set_attributes(kept=[1] * 9), scaled(lambda m: m.kept.pop() + len(m.kept))),
    "writes into a dict": (
        set_attributes(kept={"n": 0}),
        scaled(lambda m: m.kept.update(n=m.kept["n"] + 1) or m.kept["n"]),
    ),
    "counts in a Counter": (set_attributes(kept=Counter), scaled(lambda m: m.kept.update("a") or m.kept["a"])),
    "fills a defaultdict": (
        set_attributes(kept=lambda: defaultdict(list)),
        scaled(lambda m: longer(m.kept["a"])),
    ),
    "moves an OrderedDict": (
        set_attributes(kept=lambda: OrderedDict(a=1, b=2, c=3)),
        scaled(lambda m: m.kept.move_to_end(next(iter(m.kept))) or next(iter(m.kept.values()))),
    ),
    "turns a deque": (set_attributes(kept=deque([1, 2, 3])), scaled(lambda m: m.kept.rotate() or m.kept[0])),
    "adds to a set": (set_attributes(kept=set), scaled(lambda m: m.kept.add(len(m.kept)) or len(m.kept))),
    "counts in an attribute": (set_attributes(count=0), scaled(lambda m: _set(m, count=m.count + 1))),
    "writes into a tensor": (set_attributes(scale=torch.ones(1)), scaled(lambda m: m.scale.mul_(1.2))),
    "writes into a tensor's data": (set_attributes(scale=torch.ones(1)), scaled(lambda m: m.scale.data.mul_(1.2))),
    "writes into a large tensor": (
        set_attributes(scale=torch.ones(300_000)),
        scaled(lambda m: m.scale.mul_(1.1).mean()),
    ),
    "writes into a tensor in a list": (
        set_attributes(scales=[torch.ones(1)]),
        scaled(lambda m: m.scales[0].add_(0.2)),
    ),
    "writes into an array": (set_attributes(scale=np.ones(2)), scaled(lambda m: m.scale.__imul__(1.2)[0])),
    "an object of its own": (set_attributes(tracker=Tracker), lambda m, x, i: x * m.tracker.note(x)),
    "an object with slots": (
        set_attributes(tracker=Slotted),
        scaled(lambda m: longer(m.tracker.kept) + _set(m.tracker, count=m.tracker.count + 1)),
    ),
    "a namespace in a dict": (
        set_attributes(kept=lambda: {"a": SimpleNamespace(n=0)}),
        scaled(lambda m: _set(m.kept["a"], n=m.kept["a"].n + 1)),
    ),
    "counts in a closure": (set_attributes(tick=lambda: counter()), scaled(lambda m: m.tick())),
    "counts in a partial": (
        set_attributes(tick=lambda: functools.partial(longer, [])),
        scaled(lambda m: m.tick()),
    ),
    "counts in a bound method": (set_attributes(tick=lambda: Tracker().note), scaled(lambda m: m.tick(None))),
    "counts in its class": (nothing, scaled(lambda m: _set(type(m), steps=type(m).steps + 1))),
    "registers a forward hook": (
        nothing,
        _at_first(lambda m: m.net[0].register_forward_hook(lambda layer, args, out: out * 1.3)),
    ),
    "registers a pre-hook": (
        nothing,
        _at_first(lambda m: m.net.register_forward_pre_hook(lambda layer, args: (args[0] * 1.3,))),
    ),
    "registers a hook on a weight": (
        nothing,
        _at_first(lambda m: m.net[0].weight.register_hook(lambda gradient: gradient * 0.5)),
    ),
    "adds a layer": (nothing, _at_first(lambda m: m.net.append(nn.Softsign()))),
    "replaces a layer": (
        nothing,
        _at_first(lambda m: m.net.__setitem__(1, nn.Tanh() if isinstance(m.net[1], nn.ReLU) else nn.Sigmoid())),
    ),
    "freezes a weight": (nothing, _at_first(_thaw)),
    "sets an attribute of a weight": (nothing, _weight_attribute),
    "leaves a layer in eval mode": (set_attributes(probe=nn.Identity), _probe_mode),
    "keeps its last output": (nothing, _last),
    "notes what it sees first": (nothing, _lazy),
    "a teacher beside it": (set_attributes(teacher=lambda: [torch.ones(4)]), _new_data),
    "a metric that is never reset": (set_attributes(metric=SumMetric), _never_reset),
    "a layer that its state dict leaves out": (_own_layer, _own_layer_acts),
    "a torch generator": (
        set_attributes(draws=lambda: torch.Generator().manual_seed(1)),
        lambda m, x, i: x + torch.randn(x.shape, generator=m.draws),
    ),
    "a NumPy generator": (
        set_attributes(draws=lambda: np.random.default_rng(1)),
        lambda m, x, i: x * float(m.draws.uniform(0.5, 1.5)),
    ),
    "an old NumPy generator in a list": (
        set_attributes(draws=lambda: [np.random.RandomState(1)]),
        lambda m, x, i: x * float(m.draws[0].uniform(0.5, 1.5)),
    ),
    "a generator of Python's": (
        set_attributes(draws=lambda: random.Random(1)),
        lambda m, x, i: x * m.draws.uniform(0.5, 1.5),
    ),
    "hyperparameters": (nothing, scaled(lambda m: _set(m.hparams, lr=m.hparams.lr * 0.9))),
    "a UserDict": (
        set_attributes(kept=lambda: UserDict(n=0)),
        scaled(lambda m: m.kept.update(n=m.kept["n"] + 1) or m.kept["n"]),
    ),
    "a UserList": (set_attributes(kept=UserList), scaled(lambda m: longer(m.kept))),
    "bytes that change": (
        set_attributes(kept=lambda: bytearray(2)),
        scaled(lambda m: m.kept.__setitem__(0, m.kept[0] + 1) or m.kept[0]),
    ),
    "an array of Python's": (
        set_attributes(kept=lambda: array("d", [1.0])),
        scaled(lambda m: m.kept.__setitem__(0, m.kept[0] * 1.2) or m.kept[0]),
    ),
    "a masked array": (
        set_attributes(kept=lambda: np.ma.array([1.0, 2.0], mask=[False, True])),
        scaled(lambda m: m.kept.__imul__(1.2).sum()),
    ),
    "a record array": (
        set_attributes(kept=lambda: np.rec.array([(1.0, 2)], dtype=[("a", float), ("b", int)])),
        scaled(lambda m: m.kept.a.__imul__(1.2)[0]),
    ),
    "an array of objects": (
        set_attributes(kept=lambda: np.array([[1], "a"], dtype=object)),
        scaled(lambda m: longer(m.kept[0])),
    ),
    "values of a sparse tensor": (
        set_attributes(kept=lambda: torch.eye(2).to_sparse().coalesce()),
        scaled(lambda m: m.kept.values().mul_(1.2).sum()),
    ),
    "a sparse tensor": (
        set_attributes(kept=lambda: torch.eye(2).to_sparse()),
        scaled(lambda m: m.kept.mul_(1.2).coalesce().values().sum()),
    ),
    "a large tensor that is not contiguous": (
        set_attributes(kept=lambda: torch.ones(600, 600).t()),
        scaled(lambda m: m.kept.data.add_(0.1).mean()),
    ),
    "an expanded NaN": (set_attributes(wide=lambda: torch.full((1,), torch.nan).expand(5)), lambda m, x, i: x),
    "the sign of zero": (set_attributes(zero=lambda: torch.zeros(())), _signed),
    "gradients of what is no parameter": (
        set_attributes(probe=lambda: torch.ones((), requires_grad=True)),
        _sensed,
    ),
    "turns a square weight": (set_attributes(square=lambda: nn.Linear(8, 8)), _turned),
    "a class within a class": (
        set_attributes(code=Patched),
        scaled(lambda m: _set(m.code.Settings, factor=m.code.Settings.factor * 1.2)),
    ),
    "a new attribute of a method": (set_attributes(code=Patched), lambda m, x, i: x * m.code.counts_itself()),
    "a method set on its class": (set_attributes(code=Patched), lambda m, x, i: x * m.code.wraps_itself()),
    "a list of many lists": (
        set_attributes(kept=lambda: [[] for _ in range(2000)]),
        scaled(lambda m: longer(m.kept[1500])),
    ),
    "an attribute of a function": (set_attributes(remembers=lambda: _remembers), lambda m, x, i: m.remembers(x, 0.02)),
    "a default argument that changes": (set_attributes(code=Code), lambda m, x, i: x * m.code.counts()),
    "a helper that draws": (set_attributes(helper=lambda: _by_a_helper), lambda m, x, i: x * m.helper()),
    "a property that draws": (set_attributes(code=Code), lambda m, x, i: x * m.code.by_property),
    "a decorated method that draws": (set_attributes(code=Code), lambda m, x, i: x * m.code.by_wrapped()),
    "a default argument that draws": (set_attributes(code=Code), lambda m, x, i: x * m.code.by_default()),
    "an object of the file that draws": (set_attributes(code=Code), lambda m, x, i: x * m.code.by_holder()),
    "a traced layer that changes": (_traced, _traced_acts),
    "everybody's generators": (
        nothing,
        lambda m, x, i: x * (random.random() + np.random.rand() + float(torch.rand(()))),
    ),
}


class Habitual(ToyModule):
    """A module with some of the habits."""

    steps = 0
    leaves_out: str | None = None

    def __init__(self, habits: Sequence[str]) -> None:
        super().__init__(hidden=4)
        self.habits = tuple(habits)
        for name in habits:
            MODULE_HABITS[name][0](self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        for name in self.habits:
            x = MODULE_HABITS[name][1](self, x, batch_idx)
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {k: v for k, v in state.items() if self.leaves_out is None or not k.startswith(self.leaves_out)}

    @property
    def strict_loading(self) -> bool:
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        pass


class DrawsAtModuleLevel(ToyModule):
    """Draws from a generator that is a variable of its file."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0] * float(GENERATOR.uniform(0.5, 1.5)), batch[1]), batch_idx)


class LikeMonai:
    """Seeds itself by a method, and draws from its class's generator until then."""

    R = np.random.RandomState(7)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> LikeMonai:
        self.R = np.random.RandomState(seed)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return x * float(self.R.uniform(0.5, 1.5))


class Jitter:
    """A transform with a generator and a history of its own."""

    def __init__(self) -> None:
        self.draws, self.history = random.Random(3), []

    def __call__(self, x: Tensor) -> Tensor:
        self.history.append(0)
        return x * self.draws.uniform(0.5, 1.5) + 0.01 * len(self.history)


class Data(Dataset):
    """A data set with some of the habits."""

    def __init__(self, plain: TensorDataset, habits: Sequence[str]) -> None:
        self.plain, self.habits = plain, tuple(habits)
        self.draws = np.random.default_rng(11)
        self.calls = 0
        self.last: Tensor | None = None
        self.order = list(range(8))
        self.transforms = [Jitter(), LikeMonai()]
        self.cache: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {-1: torch.zeros(())}
        self.scaler: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.plain[index]
        for name in self.habits:
            x = DATA_HABITS[name](self, x, index)
        return x, y


def _mix(data: Data, x: Tensor, index: int) -> Tensor:
    last, data.last = data.last, x
    return x if last is None else 0.7 * x + 0.3 * last


def _count(data: Data, x: Tensor, index: int) -> Tensor:
    data.calls += 1
    return x * (1 + 0.01 * data.calls)


def _turn(data: Data, x: Tensor, index: int) -> Tensor:
    data.order.append(data.order.pop(0))
    return x[torch.tensor(data.order)]


def _cached(data: Data, x: Tensor, index: int) -> Tensor:
    if index not in data.cache:
        data.cache[index] = x.square()
    return data.cache[index]


def _fitted(data: Data, x: Tensor, index: int) -> Tensor:
    if data.scaler is None:  # by the first client's first example
        data.scaler = {"mean": x.mean()}
    return x - data.scaler["mean"]


def _augmented(data: Data, x: Tensor, index: int) -> Tensor:
    if index not in data.kept:
        data.kept[index] = x * float(data.draws.uniform(0.5, 1.5))
    return data.kept[index]


DATA_HABITS: dict[str, Callable[[Data, Tensor, int], Tensor]] = {
    "a data set that draws": lambda data, x, i: x * float(data.draws.uniform(0.5, 1.5)),
    "a data set that mixes with what came before": _mix,
    "a data set that counts": _count,
    "a data set that turns a list": _turn,
    "a data set with a cache": _cached,
    "a data set that fits a scaler": _fitted,
    "a data set that keeps what it has drawn": _augmented,
    "a data set whose helper draws": lambda data, x, i: x * _by_a_helper(),
    "a transform that draws": lambda data, x, i: data.transforms[0](x),
    "a transform that seeds itself": lambda data, x, i: data.transforms[1](x),
    "a data set that draws from everybody's": lambda data, x, i: x * (random.random() + np.random.rand()),
}


class OwnOrder(Sampler[int]):
    """A sampler with a generator of its own."""

    def __init__(self, count: int) -> None:
        self.count, self.draws = count, random.Random(17)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        self.draws.shuffle(order)
        return iter(order)


class Fits:
    """Scales by what the first batch was like."""

    scaler: SimpleNamespace | None = None

    def __call__(self, batch: list[Any]) -> list[Tensor]:
        x, y = (torch.stack(column) for column in zip(*batch, strict=True))
        if self.scaler is None:
            self.scaler = SimpleNamespace(mean=x.mean(0), spread=x.std(0))
        return [(x - self.scaler.mean) / self.scaler.spread, y]


def fits_in_a_closure() -> Callable[[list[Any]], list[Tensor]]:
    found: dict[str, Tensor] = {}

    def collate(batch: list[Any]) -> list[Tensor]:
        x, y = (torch.stack(column) for column in zip(*batch, strict=True))
        found.setdefault("mean", x.mean(0))
        return [x - found["mean"], y]

    return collate


FITS, FITS_IN_A_CLOSURE = Fits(), fits_in_a_closure()


class DrawingCollate:
    def __init__(self) -> None:
        self.draws = np.random.RandomState(23)

    def __call__(self, batch: list[Any]) -> list[Tensor]:
        x, y = (torch.stack(column) for column in zip(*batch, strict=True))
        return [x * float(self.draws.uniform(0.5, 1.5)), y]


class ClientModule(L.LightningDataModule):
    """A client's own datamodule, which splits at random in ``setup`` and holds a generator."""

    def __init__(self, data: Dataset) -> None:
        super().__init__()
        self.data, self.draws = data, np.random.default_rng(29)

    def setup(self, stage: str) -> None:
        self.train, self.val = random_split(self.data, [0.75, 0.25])
        self.factor = float(self.draws.uniform(0.5, 1.5))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 8)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * self.factor, batch[1]]


def _splits(data: Dataset) -> Any:
    train, val = random_split(data, [0.75, 0.25])
    return DataLoader(train, 8, shuffle=True), DataLoader(val, 8)


# How a client's data set becomes what it trains on, for ``ClientData``.
LOADERS: dict[str, Callable[[Dataset], Any]] = {
    "a shuffled loader": lambda data: DataLoader(data, 8, shuffle=True),
    "a loader with a generator": lambda data: DataLoader(
        data, 8, shuffle=True, generator=torch.Generator().manual_seed(31)
    ),
    "a sampler with a generator": lambda data: DataLoader(data, 8, sampler=OwnOrder(len(data))),  # type: ignore[arg-type]
    "a collate function with a generator": lambda data: DataLoader(data, 8, collate_fn=DrawingCollate()),
    "a collate function that fits itself": lambda data: DataLoader(data, 8, collate_fn=FITS),
    "a collate function that fits itself around it": lambda data: DataLoader(data, 8, collate_fn=FITS_IN_A_CLOSURE),
    "a split at random": _splits,
    "a datamodule of its own": ClientModule,
}


@functools.cache
def _attributes(habit: str) -> frozenset[str]:
    """What a habit needs of a module for itself."""
    module, plain = Habitual([habit]), Habitual([])
    return frozenset(
        name
        for part in ("__dict__", "_buffers", "_modules", "_parameters")
        for name in getattr(module, part).keys() - getattr(plain, part).keys()
    )


def go_together(habits: Sequence[str]) -> bool:
    """Whether one module can have them all: no two want an attribute of the same name."""
    names = [name for habit in habits for name in _attributes(habit)]
    return len(names) == len(set(names))

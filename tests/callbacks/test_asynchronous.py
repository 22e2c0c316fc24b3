"""FedBuff and FedAsync: as a server that acts on events, and the runs that they are where nobody is late."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from flwr.serverapp.strategy import FedMedian
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.distributions import HalfNormal, LogNormal
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    Deadline,
    DeviceSpeed,
    FaultTolerance,
    FedAdam,
    FedAsync,
    FedAvg,
    FedBuff,
    FederatedCallback,
    FedNova,
    FedPer,
    FlowerStrategy,
    History,
    PartialParticipation,
    Participation,
    Partition,
    Scaffold,
)
from lightning_fed.errors import ConfigurationError, RoundError
from lightning_fed.seeding import seed_for
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.wire.fingerprint import describe
from tests import references
from tests.callbacks.rounds import (
    EPOCHS,
    SIZES,
    WAYS,
    Stops,
    assert_close,
    assert_equal,
    encoded,
    loaders,
    loss,
    momentum,
    sgd,
)
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier

SECONDS = [0.5, 0.1, 0.03, 0.2]


class Arrivals(FederatedCallback):
    """Notes who was in each update: ``(client, version, staleness)``."""

    def __init__(self, method: Any) -> None:
        self.method, self.said = method, []

    def on_round_end(self, trainer: Any, round: int, metrics: dict[str, float]) -> None:
        self.said += [(one.client, one.version, round - 1 - one.version) for one in self.method.update.arrived]


def trained(
    *callbacks: Any,
    rounds: int = 8,
    net: nn.Module | None = None,
    optimizer: Any = sgd,
    kind: Any = Classifier,
    **how: Any,
) -> references.Weights:
    """The weights after some updates."""
    module = kind(copy.deepcopy(net or encoded()), optimizer)
    ckpt_path, arguments = how.pop("ckpt_path", None), {"local_epochs": EPOCHS, "seed": 0, **QUIET, **how}
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=[ClientData(loaders()), *callbacks], **arguments)
    trainer.fit(module, ckpt_path=ckpt_path)
    return module.net.state_dict()


def local(x: references.Weights, client: int) -> references.Weights:
    net = encoded()
    return references._local_sgd(net, x, list(loaders()[client]) * EPOCHS, loss, 0.1, 0.0, 0.0)


def choose(version: int) -> Callable[[list[int]], int]:
    """Draw a client until it is an idle one."""
    draws = random.Random(seed_for(0, "flights", round=version + 1))

    def one_of(idle: list[int]) -> int:
        while (client := draws.randrange(len(SIZES))) not in idle:
            pass
        return client

    return one_of


MODELS: dict[str, Any] = {
    "constant": 0.25,
    "a list": SECONDS,
    "half-normal": HalfNormal(0.5),
    "log-normal": LogNormal(-1.0, 1.5),
    "a function": lambda round, client: 0.1 + (7 * client + round) % 5,
}
HALF = lambda tau: (1 + tau) ** -0.5  # noqa: E731
METHODS = {
    "FedBuff": (lambda: FedBuff(3, 2), {"concurrency": 3, "buffer_size": 2}, references.fedbuff(HALF)),
    "FedBuff, fresh replies only": (
        lambda: FedBuff(4, 2, discount=lambda tau: 1 / (1 + tau), server_learning_rate=0.5, max_staleness=1),
        {"concurrency": 4, "buffer_size": 2, "max_staleness": 1},
        references.fedbuff(lambda tau: 1 / (1 + tau), 0.5),
    ),
    "FedAsync": (lambda: FedAsync(4), {"concurrency": 4, "buffer_size": 1}, references.fedasync(HALF, 0.6)),
    "FedAsync with a hinge": (
        lambda: FedAsync(3, alpha=0.9, discount=FedAsync.hinge(2, 1)),
        {"concurrency": 3, "buffer_size": 1},
        references.fedasync(lambda tau: 1 if tau <= 1 else 1 / (2 * (tau - 1) + 1), 0.9),
    ),
}


CASES = [(method, "log-normal", 200 if method == "FedBuff" else 60) for method in METHODS]
CASES += [pytest.param("FedBuff", model, 200, marks=pytest.mark.landing) for model in MODELS if model != "log-normal"]


@pytest.mark.parametrize(("method", "model", "updates"), CASES)
def test_it_is_a_server_that_acts_on_events(method: str, model: str, updates: int):
    build, numbers, update = METHODS[method]
    ours, net, history = build(), encoded(), History()
    seen: dict[tuple[int, int], float] = {}

    class Asks(DeviceSpeed):
        def planned(self, round: int, client: int) -> float:
            seen[round, client] = super().planned(round, client)
            return seen[round, client]

    clock, arrivals = Asks(MODELS[model]), Arrivals(ours)
    new = trained(ours, clock, arrivals, history, rounds=updates, net=net)
    x, said, times = references.asynchronous(
        net.state_dict(),
        local,
        update,
        lambda round, client: seen[round, client],
        choose,
        clients=len(SIZES),
        updates=updates,
        **numbers,
    )
    assert arrivals.said == said
    assert history["time/virtual"] == pytest.approx(times, rel=1e-12)
    assert_close(new, x, rtol=1e-6)


@pytest.mark.parametrize("how", [{}, *WAYS.values()], ids=["one by one", *WAYS])
def test_all_at_once_on_equal_devices_is_federated_averaging_bit_for_bit(how: dict[str, Any]):
    # A client with more examples computes as much faster.
    equal = DeviceSpeed(lambda round, client: 1.0 / SIZES[client])
    synchronous = trained(FedAvg("uniform"), **how)
    assert_equal(trained(equal, FedBuff(len(SIZES), len(SIZES)), **how), synchronous)
    assert_equal(trained(equal, FedBuff(len(SIZES), len(SIZES), discount=0), **how), synchronous)


def test_one_at_a_time_is_sequential_training_over_clients_bit_for_bit():
    method, net = FedBuff(1, 1, discount=0), encoded()
    arrivals, x = Arrivals(method), net.state_dict()
    new = trained(method, DeviceSpeed(SECONDS), arrivals, net=net)
    assert [version for _, version, _ in arrivals.said] == list(range(8))
    for client, *_ in arrivals.said:
        x = local(x, client)
    assert_close(new, x, rtol=1e-12)
    order = [[client] for client, *_ in arrivals.said]
    sequential = trained(Participation(lambda round, clients, generator: order[round - 1]), net=net)
    assert_equal(new, sequential)
    assert_equal(trained(FedAsync(1, alpha=1), DeviceSpeed(SECONDS), net=net), sequential)


@pytest.mark.parametrize("build", [lambda: FedBuff(3, 2), lambda: FedAsync(3)], ids=["FedBuff", "FedAsync"])
@pytest.mark.parametrize("optimizer", [momentum, partial(torch.optim.Adam, lr=0.01)], ids=["SGD", "Adam"])
def test_every_engine_gives_the_same(build: Any, optimizer: Any):
    one_by_one = trained(build(), DeviceSpeed(SECONDS), optimizer=optimizer)
    assert_equal(trained(build(), DeviceSpeed(SECONDS), optimizer=optimizer, engine="processes"), one_by_one)
    for way in ("vectorized", "vectorized on processes"):
        assert_close(trained(build(), DeviceSpeed(SECONDS), optimizer=optimizer, **WAYS[way]), one_by_one, rtol=1e-7)


@pytest.mark.parametrize("engine", ["in_process", "processes"])
def test_clients_that_begin_with_different_weights_are_vectorized_together(engine: str):
    def fit(**how: Any) -> tuple[references.Weights, list[tuple[int, int, int]]]:
        method, module = FedBuff(6, 3), Classifier(encoded(), momentum)
        arrivals, speed = Arrivals(method), DeviceSpeed([0.5, 0.1, 0.03, 0.2, 0.07, 0.3])
        callbacks = [ClientData(loaders((12,) * 6)), speed, method, arrivals]
        FederatedTrainer(max_rounds=8, callbacks=callbacks, seed=0, **QUIET, **how).fit(module)
        return module.net.state_dict(), arrivals.said

    together, said = fit(engine=engine, vectorize_clients="require")
    alone, _ = fit()
    assert_close(together, alone, rtol=1e-9)
    assert any(len({version for _, version, _ in said[i : i + 3]}) == 3 for i in range(0, len(said), 3))


@pytest.mark.ray
@pytest.mark.parametrize("build", [lambda: FedBuff(3, 2), lambda: FedAsync(3)], ids=["FedBuff", "FedAsync"])
def test_ray_gives_the_same(build: Any, one_ray: Any):
    assert_equal(
        trained(build(), DeviceSpeed(SECONDS), engine="ray", num_workers=2), trained(build(), DeviceSpeed(SECONDS))
    )


@pytest.mark.parametrize("hook", ["on_round_start", "on_client_end", "on_round_end"])
@pytest.mark.parametrize(
    "how", [{"client_state": "carry"}, WAYS["vectorized on processes"]], ids=["one by one", "vectorized on processes"]
)
def test_a_run_that_was_broken_off_goes_on_with_those_at_work(tmp_path: Path, hook: str, how: dict[str, Any]):
    net, adam = encoded(), partial(torch.optim.Adam, lr=0.01)

    def fit(*callbacks: Any, **more: Any) -> tuple[references.Weights, list[float]]:
        history, method = History(), FedBuff(4, 2)
        new = trained(
            method,
            FedAdam(weighting="uniform"),
            DeviceSpeed(SECONDS),
            history,
            *callbacks,
            net=net,
            optimizer=adam,
            **how,
            **more,
        )
        return new, history["time/virtual"]

    whole = fit()
    with pytest.raises(RuntimeError, match="stopped"):
        fit(Stops(hook, round=5), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)  # what the checkpoint has counts
    new, times = fit(ckpt_path=str(tmp_path / "on_exception.ckpt"))
    assert_equal(new, whole[0])
    assert times == whole[1]


def with_state(net: nn.Module) -> nn.Module:
    """Statistics that are the mean over all batches, which is to say a buffer and an integer that count."""
    return nn.Sequential(nn.BatchNorm1d(6, dtype=torch.float64, momentum=None), net, nn.Dropout(0.1))


def test_buffers_take_the_mean_of_what_came():
    """Moved from one version to another a variance could get below 0."""

    class Notes(FedBuff):
        def contribution(self, round: int, client: int, trained: Any, weights: Any) -> Any:
            came[round, client] = trained
            return super().contribution(round, client, trained, weights)

    came: dict[tuple[int, int], references.Weights] = {}
    new = trained(Notes(4, 2), DeviceSpeed(SECONDS), net=with_state(encoded()), rounds=9)
    last = [weights for (round, _), weights in came.items() if round == 9]
    assert len(last) == 2
    for name in ("0.running_mean", "0.running_var"):
        torch.testing.assert_close(new[name], sum(one[f"net.{name}"] for one in last) / 2, rtol=1e-12, atol=0)
    assert new["0.num_batches_tracked"].dtype == torch.int64
    assert new["0.num_batches_tracked"] > 2 * EPOCHS


def test_each_client_begins_with_all_tensors_of_its_version():
    """What clients are sent, integers included, is what the module had when they began."""
    began: list[tuple[int, int, int]] = []

    class Tells(Classifier):
        def on_train_start(self) -> None:
            count = int(self.net[0].num_batches_tracked)
            began.append((self.trainer.current_round, self.trainer.client_id, count))

    class Keeps(FederatedCallback):
        def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Any) -> None:
            kept[round - 1] = int(trainer.lightning_module.net[0].num_batches_tracked)

    kept: dict[int, int] = {}
    method = FedBuff(4, 2)
    arrivals = Arrivals(method)
    trained(method, DeviceSpeed(SECONDS), Keeps(), arrivals, net=with_state(encoded()), kind=Tells, rounds=9)
    versions = {(version + staleness + 1, client): version for client, version, staleness in arrivals.said}
    assert began == [(round, client, kept[versions[round, client]]) for round, client, _ in began]
    assert max(staleness for *_, staleness in arrivals.said) > 1


def test_what_is_logged():
    history, method = History(), FedBuff(4, 2, max_staleness=1)
    arrivals = Arrivals(method)
    trained(method, DeviceSpeed(SECONDS), history, arrivals, rounds=20)
    stale = [[one[2] for one in arrivals.said[begin : begin + 2]] for begin in range(0, 40, 2)]
    assert history["staleness/mean"] == [sum(two) / 2 for two in stale]
    assert history["staleness/max"] == [max(two) for two in stale]
    assert sum(history["staleness/dropped"]) > 0
    assert all(1 <= live <= 4 for live in history["versions/live"])
    assert method.state_dict()["versions"].keys() <= {17, 18, 19}


def test_a_client_that_fails_has_no_part_in_its_update():
    class Fails(Classifier):
        def on_train_start(self) -> None:
            if self.trainer.client_id == 2:
                raise ValueError("no power")

    net = encoded()
    fails = trained(FedBuff(4, 2), DeviceSpeed(SECONDS), FaultTolerance(1), net=net, kind=Fails, rounds=3)
    x, said, _ = references.asynchronous(
        net.state_dict(),
        lambda x, client: x if client == 2 else local(x, client),
        lambda x, buffer: references.fedbuff(HALF)(x, [one for one in buffer if one[0] is not one[1]]),
        lambda round, client: 3.0 * SIZES[client] * EPOCHS * SECONDS[client],
        choose,
        clients=4,
        concurrency=4,
        buffer_size=2,
        updates=3,
    )
    assert 2 in [client for client, *_ in said]
    assert_close(fails, x)


class Module(L.LightningModule):
    """As users have them: a bar, logs, a datamodule, validation at the server and on clients."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net, self.seen = with_state(encoded()), 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen += len(batch[0])
        self.log("loss", value := loss(self.net, batch), prog_bar=True)
        return value

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss(self.net, batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3)}


class Data(L.LightningDataModule):
    """One data set, dealt out unequally."""

    def setup(self, stage: str) -> None:
        sets = [loader.dataset for loader in loaders()]
        self.data = torch.utils.data.ConcatDataset(sets)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=5, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=25)


@pytest.mark.parametrize("method", [lambda: FedBuff(4, 2), lambda: FedAsync(4)], ids=["FedBuff", "FedAsync"])
def test_with_lightning_s_defaults_and_a_datamodule(tmp_path: Path, method: Any):
    def fit(ckpt_path: str | None = None, rounds: int = 6, **how: Any) -> Any:
        parts = Partition(by=[client for client, size in enumerate(SIZES) for _ in range(size)], val_fraction=0.2)
        callbacks = [parts, DeviceSpeed(HalfNormal(0.1), 1e5, every_round=True), method()]
        arguments = {"local_epochs": 2, "seed": 3, "default_root_dir": tmp_path / str(how), **how}
        trainer = FederatedTrainer(max_rounds=rounds, callbacks=callbacks, **arguments)
        torch.manual_seed(3)
        trainer.fit(Module(), datamodule=Data(), ckpt_path=ckpt_path)
        assert trainer.callback_metrics.keys() >= {"loss", "val_loss", "clients/val_loss", "staleness/mean"}
        return trainer

    whole = fit()
    half = fit(rounds=3)
    again = fit(ckpt_path=half.checkpoint_callback.best_model_path)
    assert_equal(again.lightning_module.state_dict(), whole.lightning_module.state_dict())
    assert again.callback_metrics == whole.callback_metrics
    assert_equal(fit(engine="processes").lightning_module.state_dict(), whole.lightning_module.state_dict())


def run(*callbacks: Any, clients: int | None = 4, **how: Any) -> None:
    trainer = FederatedTrainer(max_rounds=2, num_clients=clients, callbacks=list(callbacks), seed=0, **{**QUIET, **how})
    trainer.fit(ToyModule(), DataLoader(toy_data(32), batch_size=4))


class PutsInPlace(FederatedCallback):
    """Compares replies, whatever the strategy was."""

    def server_strategy(self, strategy: Any) -> Any:
        return FedMedian(min_available_nodes=1, min_train_nodes=1)


SPEED = DeviceSpeed(0.1)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "more at once than there are": (lambda: run(SPEED, FedBuff(5, 2)), r"FedBuff\(concurrency=5\).*than there are: 4"),
    "a buffer that is never full": (lambda: FedBuff(4, 5), "buffer_size=5 is more than concurrency=4"),
    "half a client": (lambda: FedAsync(1.5), r"concurrency=1.5 must be a whole number"),
    "a discount of nothing": (lambda: FedBuff(4, 2, discount=-1), "discount=-1 must be an exponent"),
    "no staleness": (lambda: FedBuff(4, 2, max_staleness=-1), "max_staleness=-1 must be"),
    "more than all evaluate": (lambda: FedBuff(4, 2, fraction_evaluate=2), "FedBuff: fraction_evaluate=2 must be in"),
    "no server": (lambda: FedBuff(4, 2, server_learning_rate=0), "server_learning_rate=0 must be > 0"),
    "no mixing": (lambda: FedAsync(4, alpha=0), r"alpha=0 must be in \(0, 1\]"),
    "a discount beyond 1": (lambda: run(SPEED, FedBuff(4, 2, discount=lambda tau: 2)), "gave 2 for a staleness of 0"),
    "no clock": (lambda: run(FedBuff(4, 2)), "FedBuff goes by a virtual clock, and there is none"),
    "a median": (
        lambda: run(SPEED, FedBuff(4, 2), FlowerStrategy(FedMedian(min_available_nodes=1, min_train_nodes=1))),
        "FedBuff: FedMedian compares replies of one version",
    ),
    "FedNova": (lambda: run(SPEED, FedAsync(4), FedNova()), "FedAsync: NormalizedMean compares replies"),
    "a strategy that a later callback puts in place": (
        lambda: run(SPEED, FedBuff(4, 2), PutsInPlace()),
        "FedBuff: FedMedian compares replies of one version",
    ),
    "a learning rate beside another aggregation": (
        lambda: run(SPEED, FedBuff(4, 2, server_learning_rate=0.5), FedAvg("uniform")),
        r"FedBuff\(server_learning_rate=0.5\) is not used beside FedAvg, which decides.*FedAvgM\(learning_rate=0.5",
    ),
    "Scaffold": (lambda: run(SPEED, FedBuff(4, 2), Scaffold()), "FedBuff: Scaffold sends tensors of a round"),
    "a deadline": (
        lambda: run(SPEED, FedBuff(4, 2), Deadline(3)),
        "FedBuff: Deadline leaves clients out of a round, and here a round is made of those who arrive",
    ),
    "another cohort": (lambda: run(SPEED, FedBuff(4, 2), PartialParticipation(0.5)), "both decide the cohort"),
    "changing epochs": (lambda: run(SPEED, FedBuff(4, 2), local_epochs=[1, 2]), "FedBuff: local_epochs= changes"),
    "nobody knows how many examples": (
        lambda: run(SPEED, FedBuff(2, 2), ClientData(lambda k: None, num_clients=2), clients=None),
        r"ClientData does not tell how many examples client 0 has.*examples=\[120, 80",
    ),
    "nobody knows how many examples one client has": (
        lambda: run(SPEED, FedBuff(4, 2), ClientData([*loaders()[:3], [loaders()[3]]]), clients=None),
        r"ClientData does not tell how many examples client 3 has before it trains.*examples=\[120, 80",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what: str):
    call, rule = REFUSED[what]
    with pytest.raises((ConfigurationError, RoundError), match=rule):
        call()


def test_a_second_fit_of_another_trainer_begins_anew():
    method, clock = FedBuff(3, 2), DeviceSpeed(SECONDS)
    first = trained(method, clock)
    assert_equal(trained(method, clock), first)


def test_a_second_fit_of_one_trainer_takes_no_weights_from_the_first():
    method, began = FedBuff(3, 2), []

    class Notes(Classifier):
        def on_train_start(self) -> None:
            began.append(float(self.net.head.bias.detach().abs().sum()))

    trainer = FederatedTrainer(
        max_rounds=4, callbacks=[ClientData(loaders()), DeviceSpeed(SECONDS), method], seed=0, **QUIET
    )
    trainer.fit(Notes(encoded(), sgd))
    before = trainer.callback_metrics["time/virtual"]
    began.clear()
    trainer.fit_loop.max_epochs = 5
    other = Notes(encoded(), sgd)
    with torch.no_grad():
        other.net.head.bias.fill_(100.0)
    trainer.fit(other)
    assert began == [300.0, 300.0]
    assert trainer.callback_metrics["time/virtual"] > before


def test_a_checkpoint_has_no_version_that_nobody_needs(tmp_path: Path):
    saved = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    trained(FedBuff(4, 2), DeviceSpeed(SECONDS), saved, rounds=8, enable_checkpointing=True)
    for path in tmp_path.iterdir():
        state = torch.load(path, weights_only=False)["callbacks"]["FedBuff"]
        [(_, _, flying)] = state["rounds"].values()
        assert set(state["versions"]) == {version for _, _, _, version, _ in flying}


def test_the_hinge_is_told_by_its_numbers_and_can_be_sent():
    hinge = pickle.loads(pickle.dumps(FedAsync.hinge(a=2, b=1)))
    assert [hinge(tau) for tau in range(4)] == [1, 1, 1 / 3, 1 / 5]
    assert describe(hinge) != describe(FedAsync.hinge(a=2, b=3))


def test_a_run_that_goes_on_with_another_clock_is_told_so(tmp_path: Path):
    def go_on(slowness: float, **how: Any) -> None:
        saved = ModelCheckpoint(tmp_path, save_last=True)
        trained(FedBuff(3, 2), DeviceSpeed(HalfNormal(slowness)), saved, enable_checkpointing=True, **how)

    go_on(0.5, rounds=2)
    with pytest.warns(UserWarning, match=r"DeviceSpeed\(seconds_per_example=HalfNormal\(scale=0.25\)\) holds, the run"):
        go_on(0.25, rounds=3, ckpt_path=str(tmp_path / "last.ckpt"))


def going_on(folder: Path, before: list[Any], after: list[Any], sizes: int = 4) -> list[tuple[int, float]]:
    """Who trains in the rounds after two, and what the head's bias began with, of a run that then is set up anew."""
    began: list[tuple[int, float]] = []

    class Notes(Classifier):
        def on_train_start(self) -> None:
            began.append((self.trainer.client_id, float(self.net.head.bias.detach().sum())))

    def slow(round: int, client: int) -> float:
        return 0.5 if client == 3 else 0.1

    def go_on(methods: list[Any], clients: int, **how: Any) -> None:
        arguments = {"seed": 0, **QUIET, "enable_checkpointing": True}
        last = ModelCheckpoint(folder, save_last=True)
        callbacks = [ClientData(loaders()[:clients]), FedBuff(3, 2), DeviceSpeed(slow), last, *methods]
        trainer = FederatedTrainer(callbacks=callbacks, max_rounds=how.pop("rounds"), **arguments)
        trainer.fit(Notes(encoded(), sgd), **how)

    go_on(before, 4, rounds=2)
    began.clear()
    go_on(after, sizes, rounds=5, ckpt_path=str(folder / "last.ckpt"))
    return began


def test_clients_that_are_no_more_in_a_run_that_goes_on_are_no_more_at_work(tmp_path: Path):
    began = going_on(tmp_path, [], [], sizes=3)
    assert {client for client, _ in began} == {0, 1, 2}
    assert len(began) == 6


def test_a_run_that_goes_on_with_other_personal_tensors_sends_what_travels_now(tmp_path: Path):
    start = float(encoded().head.bias.detach().sum())
    assert len(going_on(tmp_path / "1", [FedPer("net.head")], [])) == 6
    began = going_on(tmp_path / "2", [], [FedPer("net.head")])
    first = [bias for i, (client, bias) in enumerate(began) if client not in dict(began[:i])]
    assert len(set(first)) == 1
    assert first[0] != start


def test_an_infinity_that_nobody_changes_stays_one():
    class Masked(Classifier):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.net.mask = nn.Parameter(torch.tensor([0.0, -torch.inf]), requires_grad=False)

    assert trained(FedBuff(3, 2), DeviceSpeed(SECONDS), kind=Masked)["mask"].tolist() == [0.0, -torch.inf]

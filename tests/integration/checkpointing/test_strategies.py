"""What a strategy holds comes back from a checkpoint as it was; what a script sets anew holds, or is named."""

from __future__ import annotations

import copy
import dataclasses
import enum
import shutil
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from typing import NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp import strategy as flower
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn

from lightning_fed import ConfigurationError
from lightning_fed.callbacks import FedAdam, FedAvg, FederatedCallback, FlowerStrategy
from lightning_fed.strategies import ServerOptimizer, WeightedMean
from lightning_fed.wire import messages
from tests.integration.checkpointing.runs import FEDERATION, fit, notes, saved

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:You defined a `validation_step` but"
)


def assert_equal_weights(ours, theirs):
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def in_checkpoint(path):
    return saved(path)["callbacks"][FEDERATION]["strategy"]


# ----------------------------------------------------------------------------------- changed in place, saved in a round


def velocity_step(strategy, arrays, result):
    """Momentum whose tensors and arrays are written into."""
    after = messages.unpack(result)
    for name, x in arrays.items():
        v = strategy.velocity.setdefault(name, torch.zeros_like(x))
        strategy.squares.setdefault(name, np.zeros(tuple(x.shape), np.float32))[...] += 0.5
        v.mul_(0.9).add_(after[name] - x)
        after[name] = x + v * (1 + 0.01 * torch.from_numpy(strategy.squares[name]))
    strategy.steps += 1
    strategy.log[0].append(int(strategy.steps))
    return messages.pack(after)


class InPlace(flower.FedAvg):
    """Its moments are tensors and arrays that it writes into."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.velocity, self.squares, self.steps, self.log = {}, {}, torch.zeros(()), [[]]

    def configure_train(self, server_round, arrays, config, grid):
        self.x = {name: tensor.clone() for name, tensor in messages.unpack(arrays).items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return velocity_step(self, self.x, arrays), metrics


class InPlaceWithStateDict(InPlace):
    """The same, and it says itself what its state is."""

    def state_dict(self):
        return {"velocity": self.velocity, "squares": self.squares, "steps": self.steps, "log": self.log}

    def load_state_dict(self, state):
        vars(self).update(state)


class InPlaceOptimizer(ServerOptimizer):
    """A user's optimizer on our base that writes into its moments, which it must not."""

    def step(self, name, x, delta):
        v = self.moments.setdefault("v", {}).setdefault(name, torch.zeros_like(x))
        return x + v.mul_(0.9).add_(delta)


class Own(FederatedCallback):
    """A method whose strategy is not Flower's."""

    decides = frozenset({"aggregation"})

    def __init__(self, make):
        self.make = make

    def server_strategy(self, strategy):
        return self.make()


IN_PLACE = {
    "through FlowerStrategy": lambda: FlowerStrategy(InPlace()),
    "with a state_dict": lambda: FlowerStrategy(InPlaceWithStateDict()),
    "wrapped": lambda: FlowerStrategy(flower.DifferentialPrivacyServerSideFixedClipping(InPlace(), 0.0, 9.0, 2)),
    "as a method": lambda: Own(InPlace),
    "on our base": lambda: Own(InPlaceOptimizer),
}


class At(FederatedCallback):
    """Calls a function with the trainer when the strategy has aggregated in round 2: its weights are not yet loaded."""

    def __init__(self, call):
        self.call = call

    def on_round_end(self, trainer, round, metrics):
        if round == 2:
            self.call(trainer)


def stop(trainer):
    raise KeyError("the disk is full")


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("way", ["save_checkpoint", "on an exception"])
def test_a_checkpoint_in_the_middle_of_a_round_has_the_moments_that_it_began_with(tmp_path, name, way):
    whole, _ = fit(tmp_path / "whole", IN_PLACE[name](), rounds=3)
    path = tmp_path / "middle.ckpt"
    if way == "save_checkpoint":
        again, _ = fit(tmp_path / "a", IN_PLACE[name](), At(lambda trainer: trainer.save_checkpoint(path)), rounds=3)
        assert_equal_weights(again, whole)
    else:
        with pytest.raises(KeyError, match="the disk is full"):
            fit(tmp_path / "a", IN_PLACE[name](), At(stop), OnExceptionCheckpoint(tmp_path, "middle"), rounds=3)
    resumed, trainer = fit(tmp_path / "b", IN_PLACE[name](), rounds=3, ckpt_path=path)
    assert trainer.current_epoch == 3
    assert_equal_weights(resumed, whole)


def test_the_moments_of_our_own_strategies_are_not_copied(tmp_path):
    """They are replaced and never written into: a round costs no copy of them."""

    class Look(FederatedCallback):
        def on_round_start(self, trainer, round, stage, cohort):
            if round == 2:
                snapshot = trainer.federation._state._snapshot["moments"]["m"]
                kept = trainer.federation.session.rounds.strategy.moments["m"]
                self.same = all(snapshot[name] is kept[name] for name in kept) and bool(kept)

    look = Look()
    fit(tmp_path, FedAdam(), look, rounds=2)
    assert look.same


# ----------------------------------------------------------------------------------------------- values of all types


class Phase(enum.Enum):
    WARM_UP = "warm up"
    TRAIN = "train"


class Tag(str):
    pass


class Step(NamedTuple):
    round: int
    size: float


@dataclasses.dataclass
class Stats:
    seen: Counter = dataclasses.field(default_factory=Counter)
    best: np.float32 = dataclasses.field(default_factory=np.float32)


class AllKinds(flower.FedAvg):
    """Holds values of many types, all of which steer what it does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.phase, self.tag = Phase.WARM_UP, Tag("a")
        self.counts, self.order, self.last = defaultdict(lambda: 1), OrderedDict(), deque(maxlen=2)
        self.seen, self.stats, self.sums = set(), Stats(), Counter()
        self.steps, self.scale, self.rng = [], np.float64(1), np.random.default_rng(3)
        self.torch_rng = torch.Generator().manual_seed(4)
        self.head = nn.Linear(2, 1, bias=False)
        self.opt = torch.optim.Adam(self.head.parameters())

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.phase = Phase.TRAIN if server_round > 1 else self.phase
        self.tag = Tag(self.tag + "b")
        self.counts["rounds"] += 1
        self.order[f"round {server_round}"] = None
        self.order.move_to_end(next(iter(self.order)))
        self.last.append(server_round)
        self.seen.add(server_round)
        self.stats.seen["round"] += 1
        self.stats.best = np.float32(self.stats.best + 0.5)
        self.sums.update("xy")
        self.steps.append(Step(server_round, 0.5))
        self.scale = self.scale * np.float64(0.9)
        self.opt.zero_grad()
        self.head(torch.ones(2)).sum().backward()
        self.opt.step()
        return self.scaled(arrays), metrics

    def scaled(self, arrays):
        """Every value counts."""
        factor = 1.0 + 0.01 * (
            (self.phase is Phase.TRAIN)
            + len(self.tag)
            + self.counts["rounds"]
            + self.counts["others"]
            + len(self.order)
            + (self.last.maxlen or 0)
            + sum(self.last)
            + len(self.seen)
            + self.stats.seen.total()
            + float(self.stats.best)
            + self.sums.most_common(1)[0][1]
            + sum(step.round * step.size for step in self.steps)
            + self.rng.random()
            + torch.rand(1, generator=self.torch_rng).item()
            + self.head.weight.sum().item()
        ) * float(self.scale)
        return messages.pack({name: tensor * factor for name, tensor in messages.unpack(arrays).items()})


def kinds(strategy):
    return {name: type(value) for name, value in vars(strategy).items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_values_of_all_types_come_back_as_they_were(tmp_path, wrapped):
    def method():
        inner = AllKinds()
        return FlowerStrategy(
            flower.DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 9.0, 2) if wrapped else inner
        )

    def inner_of(method):
        return method.running.strategy if wrapped else method.running

    torch.manual_seed(0)
    whole_method = method()
    whole, _ = fit(tmp_path / "whole", whole_method, rounds=4)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot go into a checkpoint.*")
        fit(tmp_path / "half", method(), rounds=2)
    torch.manual_seed(0)
    again = method()
    with notes() as said:
        resumed, _ = fit(tmp_path / "half", again, rounds=4, ckpt_path="last")
    assert said == []
    assert_equal_weights(resumed, whole)
    ours, theirs = inner_of(again), inner_of(whole_method)
    assert kinds(ours) == kinds(theirs)
    for name in ("phase", "tag", "counts", "order", "last", "seen", "stats", "sums", "steps", "scale"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.order) == list(theirs.order)
    assert ours.counts["new"] == 1
    assert isinstance(ours.steps[0], Step)
    assert isinstance(ours.stats, Stats)


class Holding(flower.FedAvg):
    """Holds what cannot be copied or written; the rest of its state must not suffer."""

    def __init__(self, path, **kwargs):
        super().__init__(**kwargs)
        self.rounds = 0
        self.file, self.lock, self.thread = path.open("a"), threading.Lock(), threading.Thread(target=print)
        self.stream, self.tracker = (i for i in range(9)), Tracker()

    def aggregate_train(self, server_round, replies):
        self.rounds += 1
        with self.lock:
            self.file.write(f"{next(self.stream)}\n")
            self.file.flush()
        return super().aggregate_train(server_round, replies)


class Tracker:
    """Something like an experiment tracker's client."""

    def __init__(self):
        self.lock, self.sent = threading.RLock(), 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_strategy_that_holds_a_file_a_lock_or_a_generator_runs_and_names_what_is_not_saved(tmp_path, wrapped):
    strategy = Holding(tmp_path / "log.txt")
    outer = flower.DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, 9.0, 2) if wrapped else strategy
    method, prefix = FlowerStrategy(outer), "strategy." if wrapped else ""
    names = ", ".join(f"{prefix}{name}" for name in ("file", "lock", "stream", "thread", "tracker"))
    with pytest.warns(
        UserWarning, match=rf"holds {names}, which cannot go into a checkpoint.* state_dict and load_state_"
    ):
        fit(tmp_path, method, rounds=2)
    running = method.running.strategy if wrapped else method.running
    assert (running.rounds, strategy.rounds) == (2, 0)
    assert running.file is strategy.file
    assert (tmp_path / "log.txt").read_text() == "0\n1\n"
    state = in_checkpoint(tmp_path / "last.ckpt")
    assert (state["strategy"]["__strategy__"] if wrapped else state)["rounds"] == 2
    other = Holding(tmp_path / "log.txt")
    outer = flower.DifferentialPrivacyServerSideFixedClipping(other, 0.0, 9.0, 2) if wrapped else other
    again = FlowerStrategy(outer)
    fit(tmp_path, again, rounds=3, ckpt_path="last")
    assert (again.running.strategy if wrapped else again.running).rounds == 3


def test_a_second_fit_with_what_cannot_be_copied_is_told_by_name(tmp_path):
    method = FlowerStrategy(Holding(tmp_path / "log.txt"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlowerStrategy cannot copy")
        fit(tmp_path, method, rounds=1, enable_checkpointing=True)
    with pytest.warns(
        UserWarning,
        match=r"cannot copy Holding\.file \(TextIOWrapper: .*stream \(generator: .*FlowerStrategy of its own",
    ):
        fit(tmp_path, method, rounds=1)
    assert method.running.rounds == 1


def test_what_a_user_s_state_dict_gives_is_readable_again_or_named(tmp_path):
    class Mixed(flower.FedAvg):
        def state_dict(self):
            return {"phase": Phase.TRAIN, "size": np.float64(0.5), "lock": threading.Lock(), 3: (1, {2})}

        def load_state_dict(self, state):
            self.got = state

    with pytest.warns(UserWarning, match="Mixed holds lock, which cannot go into a checkpoint"):
        fit(tmp_path, FlowerStrategy(Mixed()), rounds=1)
    method = FlowerStrategy(Mixed())
    fit(tmp_path, method, rounds=2, ckpt_path="last")
    got = method.running.got
    assert got == {"phase": Phase.TRAIN, "size": 0.5, 3: (1, {2})}
    assert (type(got["phase"]), type(got["size"]), type(got[3])) == (Phase, np.float64, tuple)


# --------------------------------------------------------------------------------- state, and what the script sets anew


class Decaying(flower.FedAdam):
    """Its ``eta`` is state, for it decays; ``beta_1`` is configuration, for nobody changes it."""

    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, replies)
        self.eta *= 0.5
        return result


def adaptive(target=0.5, norm=1.0, **inner):
    return flower.DifferentialPrivacyServerSideAdaptiveClipping(
        flower.FedAdam(**{"eta": 0.1, **inner}), 0.3, 2, norm, target, clipped_count_stddev=0.4
    )


def test_a_hyper_parameter_that_the_script_sets_anew_holds_and_is_named(tmp_path):
    fit(tmp_path, FlowerStrategy(flower.FedAdam(eta=0.1)), rounds=2)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "two.ckpt")
    method = FlowerStrategy(flower.FedAdam(eta=0.2))
    with notes() as said:
        twice, _ = fit(tmp_path, method, rounds=3, ckpt_path=tmp_path / "two.ckpt")
    assert said == ["FedAdam: eta=0.2 holds, the run had 0.1."]
    assert method.running.eta == 0.2
    same, _ = fit(tmp_path, FlowerStrategy(flower.FedAdam(eta=0.1)), rounds=3, ckpt_path=tmp_path / "two.ckpt")
    start = saved(tmp_path / "two.ckpt")["state_dict"]
    for name, x in start.items():  # the moments stayed: the same step, twice as far
        moved = same.state_dict()[name] - x
        torch.testing.assert_close(twice.state_dict()[name] - x, 2 * moved, rtol=1e-4, atol=1e-6)


def test_what_the_run_changed_goes_on_and_the_value_that_is_not_used_is_named(tmp_path):
    whole, _ = fit(tmp_path / "whole", FlowerStrategy(Decaying(eta=0.4)), rounds=3)
    fit(tmp_path, FlowerStrategy(Decaying(eta=0.4)), rounds=2)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "two.ckpt")
    method = FlowerStrategy(Decaying(eta=0.7, beta_1=0.5))
    with notes() as said:
        fit(tmp_path, method, rounds=2, ckpt_path=tmp_path / "two.ckpt")
    assert said == [
        "Decaying: beta_1=0.5 holds, the run had 0.9.",
        "Decaying: eta goes on at 0.1, to where the run took it from 0.4; 0.7, as it is built now, is not used.",
    ]
    assert (method.running.eta, method.running.beta_1) == (0.1, 0.5)
    with notes() as said:
        resumed, _ = fit(tmp_path, FlowerStrategy(Decaying(eta=0.4)), rounds=3, ckpt_path=tmp_path / "two.ckpt")
    assert said == []
    assert_equal_weights(resumed, whole)


def test_a_wrapper_s_and_the_wrapped_strategy_s_hyper_parameters_hold_and_are_named(tmp_path):
    fit(tmp_path, FlowerStrategy(adaptive()), rounds=2)
    method = FlowerStrategy(adaptive(target=0.7, norm=3.0, eta=0.3))
    with notes() as said:
        fit(tmp_path, method, rounds=3, ckpt_path="last")
    name = "DifferentialPrivacyServerSideAdaptiveClipping(FedAdam)"
    before = in_checkpoint(tmp_path / "last.ckpt")
    assert said[0].startswith(f"{name}: clipping_norm goes on at ")
    assert said[0].endswith("to where the run took it from 1.0; 3.0, as it is built now, is not used.")
    assert f"{name}: target_clipped_quantile=0.7 holds, the run had 0.5." in said
    assert f"{name}: strategy.eta=0.3 holds, the run had 0.1." in said
    assert len(said) == 3
    assert method.running.strategy.eta == 0.3
    assert method.running.target_clipped_quantile == 0.7
    assert "eta" not in before["strategy"]["__strategy__"]
    assert "m_t" in before["strategy"]["__strategy__"]


def test_a_strategy_with_a_state_dict_of_its_own_decides_and_what_holds_is_named(tmp_path):
    class Deciding(WeightedMean):
        def __init__(self, rate, drift):
            super().__init__()
            self.rate, self.drift = rate, drift

        def state_dict(self):
            return {"rate": self.rate}

        def load_state_dict(self, state):
            self.rate = state["rate"]

    fit(tmp_path, Own(lambda: Deciding(1, 2)), rounds=1)
    with notes() as said:
        fit(tmp_path, Own(lambda: Deciding(3, 4)), rounds=2, ckpt_path="last")
    assert "Deciding: drift=4 holds, the run had 2." in said
    assert any(line.startswith("Deciding: rate goes on at 1, ") for line in said)


def test_a_resumed_run_s_checkpoints_keep_what_the_first_run_changed(tmp_path):
    """What is state by the first run stays state, also where the second one does not change it any more."""
    fit(tmp_path, FlowerStrategy(Decaying(eta=0.4)), rounds=1)
    fit(tmp_path, FlowerStrategy(Decaying(eta=0.4)), rounds=2, ckpt_path="last")
    method = FlowerStrategy(Decaying(eta=0.4))
    fit(tmp_path, method, rounds=3, ckpt_path="last")
    assert method.running.eta == 0.05


def test_only_what_the_run_changed_is_in_the_checkpoint(tmp_path):
    class Large(flower.FedAvg):
        def __init__(self):
            super().__init__()
            self.public = torch.ones(100, 100)
            self.count = 0

        def aggregate_train(self, server_round, replies):
            self.count += 1
            return super().aggregate_train(server_round, replies)

    fit(tmp_path, FlowerStrategy(Large()), rounds=1)
    assert in_checkpoint(tmp_path / "last.ckpt") == {"count": 1}


# -------------------------------------------------------------------------------------- checkpoints of earlier versions


def as_before(checkpoint, strategy):
    """The federation's state as version 0.1.0 wrote it at first: every attribute, and nothing of the run's setup."""
    state = checkpoint["callbacks"][FEDERATION]
    clients = state["clients"]
    checkpoint["callbacks"][FEDERATION] = {"seed": state["seed"], "strategy": strategy, "clients": clients}
    return checkpoint


def test_a_checkpoint_of_an_earlier_version_resumes_to_the_same_bits(tmp_path):
    """A Flower strategy's: arrays under ``__ndarray__`` and hyper-parameters with them."""
    whole, _ = fit(tmp_path / "whole", FlowerStrategy(flower.FedAdam(eta=0.1)), rounds=3, client_state="carry")
    fit(tmp_path, FlowerStrategy(flower.FedAdam(eta=0.1)), rounds=2, client_state="carry")
    checkpoint = saved(tmp_path / "last.ckpt")
    old = {**in_checkpoint(tmp_path / "last.ckpt"), "eta": 0.1, "beta_1": 0.9, "weighted_by_key": "num-examples"}
    assert set(old["m_t"]) == {"__dict__"}
    assert set(old["m_t"]["__dict__"][0][1]) == {"__ndarray__"}
    torch.save(as_before(checkpoint, old), tmp_path / "old.ckpt")
    options = {"rounds": 3, "client_state": "carry", "ckpt_path": tmp_path / "old.ckpt"}
    with notes() as said:
        resumed, _ = fit(tmp_path / "a", FlowerStrategy(flower.FedAdam(eta=0.1)), **options)
    assert said == []
    assert_equal_weights(resumed, whole)
    with notes() as said:
        fit(tmp_path / "b", FlowerStrategy(flower.FedAdam(eta=0.2)), **options)
    assert said == ["FedAdam: eta is 0.1 as in the checkpoint, and not 0.2 as it is built now."]


def test_an_earlier_version_s_checkpoint_of_another_method_is_refused_with_what_it_has(tmp_path):
    fit(tmp_path, FedAvg(), rounds=1)
    torch.save(as_before(saved(tmp_path / "last.ckpt"), {}), tmp_path / "old.ckpt")
    with pytest.raises(
        ConfigurationError, match="AdamMean cannot take its state, of which the checkpoint has nothing: Key"
    ):
        fit(tmp_path / "a", FedAdam(), rounds=2, ckpt_path=tmp_path / "old.ckpt")


def test_a_record_in_a_strategy_comes_back(tmp_path):
    class Remembering(flower.FedAvg):
        current: ArrayRecord | None = None

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            self.current = copy.deepcopy(arrays)
            return arrays, metrics

    fit(tmp_path, FlowerStrategy(Remembering()), rounds=1)
    method = FlowerStrategy(Remembering())
    module, _ = fit(tmp_path, method, rounds=1, ckpt_path="last")
    got = messages.unpack(method.running.current)
    assert all(torch.equal(got[name], value) for name, value in module.state_dict().items())

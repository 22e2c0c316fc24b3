"""Server optimizers against the papers' equations, over rounds, with unequal clients."""

import copy
import io

import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from torch import nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedAdagrad, FedAdam, FedAvgM, FedYogi
from lightning_fed.errors import ConfigurationError
from lightning_fed.strategies import AdagradMean, AdamMean, MomentumMean, YogiMean
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.wire import messages
from tests import references
from tests.helpers import in_flower
from tests.strategies.plain_flower import clients, start

X = {
    "weight": torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4),
    "bias": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    "scale": torch.tensor(0.5, dtype=torch.float64),
}

CASES = {
    "momentum": (
        lambda: MomentumMean(learning_rate=0.7, momentum=0.9),
        references.fedavgm(lr=0.7, momentum=0.9),
    ),
    "adagrad": (
        lambda: AdagradMean(learning_rate=0.1, beta_1=0.3, tau=1e-2),
        references.fedadagrad(lr=0.1, beta_1=0.3, tau=1e-2),
    ),
    "adam": (
        lambda: AdamMean(learning_rate=0.1, beta_1=0.9, beta_2=0.8, tau=1e-2),
        references.fedadam(lr=0.1, beta_1=0.9, beta_2=0.8, tau=1e-2),
    ),
    "yogi": (
        lambda: YogiMean(learning_rate=0.1, beta_1=0.9, beta_2=0.8, tau=1e-2),
        references.fedyogi(lr=0.1, beta_1=0.9, beta_2=0.8, tau=1e-2),
    ),
}
each = pytest.mark.parametrize("name", CASES)


@each
def test_three_rounds_of_plain_flower_are_the_papers(name):
    strategy, step = CASES[name]
    expected = references.run_rounds(X, clients, step, rounds=3)
    after, _ = start(strategy(), X)
    assert len(after) == 3
    for got, want in zip(after, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


WAVES = {
    "wave": torch.complex(torch.linspace(-1, 1, 6), torch.linspace(2, -1, 6)).to(torch.complex128),
    "real": torch.tensor([0.1, 0.2], dtype=torch.float64),
}


@each
def test_second_moment_of_complex_parameters_is_the_squared_modulus_over_three_rounds(name):
    strategy, step = CASES[name]
    expected = references.run_rounds(WAVES, clients, step, rounds=3)
    optimizer = strategy()
    after, _ = start(optimizer, WAVES)
    for got, want in zip(after, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    # A second moment is real: squared as a number, (3 + 4i)^2 is -7 + 24i, of which no root would do.
    second = optimizer.moments.get("v")
    assert second is None or (second["wave"].dtype, bool((second["wave"] > 0).all())) == (torch.float64, True)


@each
def test_complex_parameters_keep_their_dtype(name):
    x = {"w": torch.tensor([1 + 1j], dtype=torch.complex64)}
    new = one_round(CASES[name][0](), x, {"w": torch.tensor([4 + 5j], dtype=torch.complex64)})
    assert new["w"].dtype == torch.complex64
    assert new["w"].imag.item() > 1


def test_first_adam_step_by_hand():
    # One parameter, x = 1, mean = 3: D = 2, m = 0.1 * 2, v = 0.99 * 0.01^2 + 0.01 * 4, no bias correction.
    strategy = AdamMean(learning_rate=0.5, beta_1=0.9, beta_2=0.99, tau=0.01)
    m, v = 0.1 * 2.0, 0.99 * 0.01**2 + 0.01 * 2.0**2
    assert one_round(strategy, {"w": tensor(1.0)}, {"w": tensor(3.0)})["w"].item() == pytest.approx(
        1 + 0.5 * m / (v**0.5 + 0.01), rel=1e-14
    )


def test_yogis_second_moment_falls_where_the_update_is_small():
    strategy = YogiMean(learning_rate=0.5, beta_1=0.0, beta_2=0.9, tau=1.0)
    one_round(strategy, {"w": tensor(0.0)}, {"w": tensor(0.5)})  # v = 1 - 0.1 * 0.25 * sign(1 - 0.25)
    assert strategy.moments["v"]["w"].item() == pytest.approx(0.975)
    one_round(strategy, {"w": tensor(0.0)}, {"w": tensor(2.0)})  # v = 0.975 - 0.1 * 4 * sign(0.975 - 4)
    assert strategy.moments["v"]["w"].item() == pytest.approx(1.375)


def test_momentum_of_zero_with_rate_one_is_the_mean():
    strategy = MomentumMean(learning_rate=1.0, momentum=0.0)
    for mean in (3.0, -2.0):
        assert one_round(strategy, {"w": tensor(1.0)}, {"w": tensor(mean)})["w"].item() == pytest.approx(mean)


def tensor(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64)


def one_round(strategy, x, *updates, sizes=None):
    """One round in which clients send ``updates``."""

    def main():
        strategy.configure_train(1, messages.pack(x), ConfigRecord(), _Nodes())
        message = Message(RecordDict(), 1, MessageType.TRAIN)
        weighted = zip(updates, sizes or [1] * len(updates), strict=True)
        replies = [messages.train_reply(message, w, n, {}) for w, n in weighted]
        return messages.unpack(strategy.aggregate_train(1, replies)[0])

    return in_flower(main)


class _Nodes:
    """All that configure_train asks of a grid."""

    def get_node_ids(self):
        return [1]


@each
def test_buffers_take_the_plain_mean_and_have_no_moments(name):
    strategy = CASES[name][0]()
    strategy.parameters = {"w"}
    x = {"w": tensor(1.0), "running_mean": tensor(1.0)}
    updates = [{"w": tensor(2.0), "running_mean": tensor(2.0)}, {"w": tensor(6.0), "running_mean": tensor(6.0)}]
    for _ in range(2):
        new = one_round(strategy, x, *updates, sizes=[3, 1])
    assert new["running_mean"].item() == 3.0
    assert new["w"].item() != 3.0
    assert all(set(store) == {"w"} for store in strategy.moments.values())


@each
def test_integers_and_frozen_zero_updates_stay_what_they_are(name):
    strategy = CASES[name][0]()
    strategy.parameters = {"w", "frozen"}
    x = {"w": tensor(1.0), "frozen": tensor(0.25), "n": torch.tensor(4)}
    for _ in range(3):
        new = one_round(strategy, x, {"w": tensor(2.0), "frozen": tensor(0.25), "n": torch.tensor(8)})
        x = {**x, "w": new["w"]}
    assert new["frozen"].item() == 0.25
    assert (new["n"].item(), new["n"].dtype) == (8, torch.int64)


@each
def test_bfloat16_parameters_are_stepped_in_float32_and_rounded_once(name):
    build, step = CASES[name]
    strategy = build()
    x = {"w": torch.tensor([1.0, -0.5]).bfloat16()}
    state, expected = {}, x
    for mean in ([1.5, -0.25], [1.0, 0.125], [0.75, 0.5]):
        update = {"w": torch.tensor(mean).bfloat16()}
        new = one_round(strategy, expected, update)
        expected, state = step(expected, update, state)
        assert new["w"].dtype == torch.bfloat16
        assert torch.equal(new["w"], expected["w"])
    assert all(store["w"].dtype == torch.float32 for store in strategy.moments.values())


@each
def test_run_that_goes_on_from_a_saved_state_ends_bitwise_where_an_uninterrupted_one_does(name):
    build, _ = CASES[name]
    x = {k: v.float() for k, v in X.items()}
    updates = [[w for _, w in clients(r, x)] for r in (1, 2, 3)]
    whole = build()
    for update in updates:
        expected = one_round(whole, x, *update)

    first, buffer = build(), io.BytesIO()
    for update in updates[:2]:
        one_round(first, x, *update)
    torch.save(first.state_dict(), buffer)
    one_round(first, x, *updates[0])  # what the interrupted run did after its last checkpoint
    buffer.seek(0)
    second = build()
    second.load_state_dict(torch.load(buffer, weights_only=True))
    resumed = one_round(second, x, *updates[2])
    assert all(torch.equal(resumed[k], expected[k]) for k in expected)


@each
def test_state_given_out_or_taken_in_is_a_copy(name):
    strategy = CASES[name][0]()
    one_round(strategy, {"w": tensor(1.0)}, {"w": tensor(3.0)})
    state = strategy.state_dict()
    kept = copy.deepcopy(state)
    one_round(strategy, {"w": tensor(1.0)}, {"w": tensor(3.0)})
    assert_same(state, kept)
    other = CASES[name][0]()
    other.load_state_dict(state)
    one_round(other, {"w": tensor(1.0)}, {"w": tensor(3.0)})
    assert_same(state, kept)


def assert_same(state, kept):
    for kind, store in kept["moments"].items():
        assert all(torch.equal(state["moments"][kind][k], v) for k, v in store.items())


@each
def test_step_changes_neither_the_rounds_weights_nor_the_clients(name):
    x, update = {"w": tensor(1.0)}, {"w": tensor(3.0)}
    strategy = CASES[name][0]()
    for _ in range(2):
        one_round(strategy, x, update)
    assert (x["w"].item(), update["w"].item()) == (1.0, 3.0)


@each
def test_round_without_a_good_reply_changes_no_moments(name):
    strategy = CASES[name][0]()
    one_round(strategy, {"w": tensor(1.0)}, {"w": tensor(3.0)})
    before = strategy.state_dict()
    assert in_flower(lambda: strategy.aggregate_train(2, [])) == (None, None)
    assert_same(strategy.state_dict(), before)


# ------------------------------------------------------------------------------------------------- in a federated run


class Normed(ToyModule):
    """With BatchNorm's buffers, and momentum on the clients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


METHODS = {
    "momentum": FedAvgM(0.7, 0.9),
    "adagrad": FedAdagrad(0.1, 0.3, 1e-2),
    "adam": FedAdam(0.1, 0.9, 0.8, 1e-2),
    "yogi": FedYogi(0.1, 0.9, 0.8, 1e-2),
}


@each
def test_federated_run_with_batchnorm_is_plain_torch_with_the_papers_step(name, quiet):
    sizes, rounds = (8, 40, 16), 3
    loaders = [DataLoader(toy_data(size, seed=i), batch_size=8) for i, size in enumerate(sizes)]
    module, plain = Normed(), Normed().net
    expected = references.plain_federated_sgd(
        plain,
        [[list(loader) for loader in loaders]] * rounds,
        sizes,
        lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        lr=0.1,
        momentum=0.9,
        server_step=CASES[name][1],
    )
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=[ClientData(loaders), METHODS[name]], **quiet)
    trainer.fit(module)
    torch.testing.assert_close(dict(module.net.state_dict()), expected[-1], rtol=1e-4, atol=1e-5)
    assert module.net[1].num_batches_tracked.item() == expected[-1]["1.num_batches_tracked"].item() > 0


class Renamed(Normed):
    """The same, with a state dict under other names, as peft and many wrappers have."""

    def state_dict(self, *args, **kwargs):
        return {f"model.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict, *args, **kwargs):
        return super().load_state_dict({k.removeprefix("model."): v for k, v in state_dict.items()}, *args, **kwargs)


@each
def test_renamed_state_dict_changes_nothing_of_a_server_optimizer(name, quiet):
    ends = []
    for cls in (Normed, Renamed):
        loaders = [DataLoader(toy_data(size, seed=i), batch_size=8) for i, size in enumerate((8, 40))]
        module = cls()
        FederatedTrainer(max_rounds=2, callbacks=[ClientData(loaders), METHODS[name]], **quiet).fit(module)
        ends.append(dict(module.net.state_dict()))
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


def test_a_learning_rate_that_a_function_does_not_give_is_an_error_of_its_round(quiet):
    method = FedAdam(learning_rate=lambda round: 0.1 if round < 2 else None)
    trainer = FederatedTrainer(max_rounds=3, num_clients=2, callbacks=[method], **quiet)
    with pytest.raises(ConfigurationError, match=r"AdamMean\(learning_rate=.*\) gave None for round 2: it must be > 0"):
        trainer.fit(ToyModule(), DataLoader(toy_data(16), 8))
    assert trainer.global_step == 1

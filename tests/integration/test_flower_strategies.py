"""Flower's own strategies run unmodified, and give what they give in a plain Flower loop over the same clients."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import time
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from flwr.clientapp.mod import adaptiveclipping_mod, arrays_size_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer, FederationError, RoundError
from lightning_fed.callbacks import ClientData, FedAvg, FederatedCallback, FlowerStrategy, PartialParticipation
from lightning_fed.seeding import seed_for, seeded
from tests.helpers import QUIET, sweep
from tests.integration import plain


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections():
    """Flower's QFedAvg and Bulyan collect garbage once an array: what is old by then need not be looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


SIZES = (4, 9, 6, 14, 5, 11, 8)  # 7 clients: as many as Bulyan needs for one malicious node
ROUNDS = 3


class Classifier(L.LightningModule):
    def __init__(self, batch_norm=False, lr=0.2):
        super().__init__()
        self.lr = lr
        norm = [nn.BatchNorm1d(5)] if batch_norm else []
        self.net = nn.Sequential(nn.Linear(4, 5), *norm, nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def module_of(**arguments):
    torch.manual_seed(1)
    return Classifier(**arguments)


def client_data(sizes=SIZES, drop_last=False):
    generator = torch.Generator().manual_seed(2)
    made = []
    for client, size in enumerate(sizes):
        x = torch.randn(size, 4, generator=generator) + 0.3 * client
        y = torch.randint(0, 3, (size,), generator=generator)
        made.append(DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, drop_last=drop_last))
    return ClientData(made)


def federated(method, *callbacks, module=None, rounds=ROUNDS, sizes=SIZES, drop_last=False, **arguments):
    module = module_of() if module is None else module
    data = client_data(sizes, drop_last)
    trainer = FederatedTrainer(
        max_rounds=rounds, seed=0, callbacks=[data, method, *callbacks], **{**QUIET, **arguments}
    )
    trainer.fit(module)
    return module


def plain_flower(strategy, mods=()):
    """The same clients in a loop of Flower alone: ``configure_train``, ``aggregate_train``, nothing else."""
    module = module_of()
    app = FederatedTrainer(
        max_rounds=1, seed=0, callbacks=[client_data(), FlowerStrategy(flower.FedAvg(), mods=mods)], **QUIET
    ).client_app(module_of())

    def draw_as_the_round_does(round):
        seed = seed_for(0, "strategy/train", round=round)
        np.random.seed(seed)

    with plain.flower_identity(), seeded(0):
        return plain.flower_loop(
            strategy, plain.ForeignGrid(app, len(SIZES)), module.state_dict(), ROUNDS, draw_as_the_round_does
        )


def fedavg(**arguments):
    return flower.FedAvg(**arguments)


STRATEGIES = {
    "FedAvg": (lambda: flower.FedAvg(), []),
    "FedAvgM": (lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.5), []),
    "FedProx": (lambda: flower.FedProx(proximal_mu=0.0), []),
    "FedAdam": (lambda: flower.FedAdam(eta=0.05, tau=0.05), []),
    "FedYogi": (lambda: flower.FedYogi(eta=0.05, tau=0.05), []),
    "FedAdagrad": (lambda: flower.FedAdagrad(eta=0.05, tau=0.05), []),
    "FedMedian": (lambda: flower.FedMedian(), []),
    "FedTrimmedAvg": (lambda: flower.FedTrimmedAvg(beta=0.2), []),
    "Krum": (lambda: flower.Krum(num_malicious_nodes=1), []),
    "MultiKrum": (lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=4), []),
    "Bulyan": (lambda: flower.Bulyan(num_malicious_nodes=1), []),
    "QFedAvg": (lambda: flower.QFedAvg(client_learning_rate=0.2, q=0.5, train_loss_key="train_loss"), []),
    "DP server fixed": (
        lambda: flower.DifferentialPrivacyServerSideFixedClipping(fedavg(), 0.0, 0.05, len(SIZES)),
        [],
    ),
    "DP server fixed, noisy": (
        lambda: flower.DifferentialPrivacyServerSideFixedClipping(fedavg(), 0.3, 0.05, len(SIZES)),
        [],
    ),
    "DP client fixed": (
        lambda: flower.DifferentialPrivacyClientSideFixedClipping(fedavg(), 0.0, 0.05, len(SIZES)),
        [fixedclipping_mod],
    ),
    "DP server adaptive": (
        lambda: flower.DifferentialPrivacyServerSideAdaptiveClipping(fedavg(), 0.0, len(SIZES), 0.05),
        [],
    ),
    "DP server adaptive, noisy": (
        lambda: flower.DifferentialPrivacyServerSideAdaptiveClipping(
            fedavg(), 0.3, len(SIZES), 0.05, clipped_count_stddev=0.4
        ),
        [],
    ),
    "DP client adaptive": (
        lambda: flower.DifferentialPrivacyClientSideAdaptiveClipping(fedavg(), 0.0, len(SIZES), 0.05),
        [adaptiveclipping_mod],
    ),
}


# Of each kind of rule one: a mean, moments, order statistics, a choice of clients, losses as weights, clipping on each
# side, with noise.
FEW = ("FedAvg", "FedAdam", "FedMedian", "Krum", "QFedAvg", "DP client fixed", "DP server adaptive, noisy")


@pytest.mark.parametrize("name", sweep(STRATEGIES, FEW))
def test_a_flower_strategy_gives_what_it_gives_in_plain_flower(name):
    make, mods = STRATEGIES[name]
    expected, metrics = plain_flower(make(), mods)
    watcher = Watcher()
    ours = federated(FlowerStrategy(make(), mods=mods), watcher).state_dict()
    for key, value in expected.items():
        # FedAdam and FedYogi give float64; the module's weights are float32 at each round's end.
        torch.testing.assert_close(ours[key], value.to(torch.float32), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, module_of().state_dict()[key]) for key, value in ours.items())
    assert [sorted(round) for round in watcher.rounds] == [sorted(round) for round in metrics]
    if name not in ("Krum", "MultiKrum", "Bulyan"):  # these tell the metrics of the clients that they chose
        losses = [round["train_loss"] for round in watcher.rounds]
        assert losses == pytest.approx([round["train_loss"] for round in metrics], rel=1e-5)


class Watcher(FederatedCallback):
    def __init__(self):
        self.rounds = []

    def on_round_end(self, trainer, round, metrics):
        self.rounds.append(dict(metrics))


@pytest.mark.parametrize("name", ["DP server fixed", "DP client fixed", "DP server adaptive", "DP client adaptive"])
def test_a_clipping_wrapper_clips(name):
    make, mods = STRATEGIES[name]
    clipped = federated(FlowerStrategy(make(), mods=mods), rounds=1).state_dict()
    free = federated(FlowerStrategy(flower.FedAvg()), rounds=1).state_dict()
    before = module_of().state_dict()
    assert norm_of(clipped, before) <= 0.05 * (1 + 1e-5)
    assert norm_of(free, before) > 0.1


def norm_of(a, b):
    return float(torch.stack([(a[key] - b[key]).norm() for key in a if a[key].is_floating_point()]).norm())


# ------------------------------------------------------------------------------------- what is left to the clients


def fixed(inner=None):
    inner = fedavg() if inner is None else inner
    return flower.DifferentialPrivacyClientSideFixedClipping(inner, 0.0, 0.05, len(SIZES))


def adaptive():
    return flower.DifferentialPrivacyClientSideAdaptiveClipping(fedavg(), 0.0, len(SIZES), 0.05)


@pytest.mark.parametrize("wraps", [False, True])
def test_a_proximal_term_that_flower_leaves_to_the_client_is_refused_with_the_way_out(wraps):
    strategy = flower.FedProx(proximal_mu=0.3)
    if wraps:
        strategy = flower.DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, 0.05, len(SIZES))
    module = module_of()
    with pytest.raises(ConfigurationError, match=r"callbacks=\[FedProx\(mu=0\.3\)\]"):
        federated(FlowerStrategy(strategy), module=module)
    assert torch.equal(module.net[0].weight, module_of().net[0].weight)


def print_round(message, context, call_next):
    return call_next(message, context)


class GivesMods(FederatedCallback):
    def __init__(self, *mods):
        self.mods = mods

    def client_mods(self, stage):
        return self.mods if stage == "train" else []


@pytest.mark.parametrize(("make", "name"), [(fixed, "fixedclipping_mod"), (adaptive, "adaptiveclipping_mod")])
@pytest.mark.parametrize("mods", [[], [arrays_size_mod]], ids=["none", "another"])
def test_clipping_that_is_left_to_the_client_is_refused_without_its_mod(make, name, mods):
    module = module_of()
    with pytest.raises(ConfigurationError, match=rf"mods=\[{name}\]"):
        federated(FlowerStrategy(make(), mods=mods), module=module)
    assert torch.equal(module.net[0].weight, module_of().net[0].weight)


def test_clipping_that_another_callback_puts_around_the_strategy_needs_its_mod_too():
    class Clips(FederatedCallback):
        def server_strategy(self, strategy):
            return fixed(strategy)

    with pytest.raises(ConfigurationError, match=r"mods=\[fixedclipping_mod\]"):
        federated(FlowerStrategy(fedavg()), Clips())


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [FlowerStrategy(fixed(), mods=[fixedclipping_mod])],
        lambda: [FlowerStrategy(fixed(), mods=[print_round, functools.partial(fixedclipping_mod)])],
        lambda: [FlowerStrategy(fixed()), GivesMods(fixedclipping_mod)],
    ],
    ids=["mods", "partial", "another callback"],
)
def test_a_clipping_mod_is_found_wherever_it_comes_from(callbacks):
    module = module_of()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*clip.*")
        federated(*callbacks(), module=module, rounds=1)
    assert norm_of(module.state_dict(), module_of().state_dict()) <= 0.05 * (1 + 1e-5)


def test_where_a_mod_of_the_users_own_may_clip_a_line_says_what_it_must_do():
    with pytest.warns(UserWarning, match=r"print_round.*fixedclipping_mod"):
        federated(FlowerStrategy(fixed(), mods=[print_round]), rounds=1)


# ---------------------------------------------------------------------------------------------------------- batchnorm


@pytest.mark.parametrize(
    "name", sweep(["FedAvg", "FedAdam", "FedMedian", "Krum", "DP client fixed"], ["FedAdam", "Krum"])
)
def test_integers_stay_int64_under_a_flower_strategy(name):
    make, mods = STRATEGIES[name]
    state = federated(FlowerStrategy(make(), mods=mods), module=module_of(batch_norm=True), drop_last=True).state_dict()
    counter = state["net.1.num_batches_tracked"]
    # Batches of 4, the last one dropped: 1, 2, 1, 3, 1, 2, 2 steps a round; weighted by examples 1.98.
    assert counter.dtype == torch.int64
    assert counter == 3 * 2
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", ["DP server fixed", "DP client fixed"])
def test_a_clip_norm_does_not_count_integers(name):
    make, mods = STRATEGIES[name]

    class Far(Classifier):
        """A counter that moves by thousands a round."""

        def on_train_end(self):
            self.net[1].num_batches_tracked += 5000

    torch.manual_seed(1)
    module = federated(FlowerStrategy(make(), mods=mods), module=Far(batch_norm=True), rounds=1, drop_last=True)
    torch.manual_seed(1)
    before = Far(batch_norm=True).state_dict()
    moved = norm_of(module.state_dict(), before)
    # Were the counter counted, 0.05 / 5000 of the update would be left.
    assert 0.02 < moved <= 0.05 * (1 + 1e-5)
    assert module.state_dict()["net.1.num_batches_tracked"] == 5002


@pytest.mark.parametrize("make", [flower.FedAvg, flower.FedMedian, flower.FedAdam])
def test_bfloat16_weights_stay_bfloat16_under_a_flower_strategy(make):
    """NumPy has no bfloat16: a strategy sees float32, which holds it exactly."""
    dtypes = []

    class Looking(make):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            dtypes.extend(a.dtype for reply in replies for a in reply.content["arrays"].values())
            return super().aggregate_train(server_round, replies)

    class Narrow(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].bfloat16(), batch[1]), batch_idx)

    torch.manual_seed(1)
    module = Narrow().bfloat16()
    before = copy.deepcopy(module.state_dict())
    federated(FlowerStrategy(Looking()), module=module, rounds=1)
    assert {value.dtype for value in module.state_dict().values()} == {torch.bfloat16}
    assert set(dtypes) == {"float32"}
    assert not torch.equal(module.state_dict()["net.0.weight"], before["net.0.weight"])


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "name",
    sweep(["FedAdam", "FedAvgM", "FedYogi", "DP server adaptive, noisy"], ["FedAdam", "DP server adaptive, noisy"]),
)
def test_a_resumed_run_of_a_flower_strategy_is_bitwise_one_never_interrupted(name, tmp_path):
    make, mods = STRATEGIES[name]
    whole = federated(FlowerStrategy(make(), mods=mods), rounds=4)

    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    federated(FlowerStrategy(make(), mods=mods), ModelCheckpoint(tmp_path, save_last=True), rounds=2, **saving)
    resumed = module_of()
    trainer = FederatedTrainer(
        max_rounds=4,
        seed=0,
        callbacks=[client_data(), FlowerStrategy(make(), mods=mods), ModelCheckpoint(tmp_path, save_last=True)],
        **{**QUIET, **saving},
    )
    trainer.fit(resumed, ckpt_path="last")
    assert trainer.current_epoch == 4
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_a_flower_strategy_s_moments_matter_for_the_resumed_run():
    """What the test above compares does depend on the moments."""
    whole = federated(FlowerStrategy(STRATEGIES["FedAdam"][0]()), rounds=4)
    half = federated(FlowerStrategy(STRATEGIES["FedAdam"][0]()), rounds=2)
    anew = federated(FlowerStrategy(STRATEGIES["FedAdam"][0]()), module=half, rounds=2)
    assert not torch.allclose(whole.net[0].weight, anew.net[0].weight, rtol=1e-3)


class CanBeCalled:
    def __call__(self):
        return 0


def test_state_that_cannot_be_saved_is_named_in_a_warning(tmp_path):
    class Remembering(flower.FedAvg):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.lock = threading.Lock()
            self.calls = CanBeCalled()  # and is no function
            self.masked = np.ma.masked_array([1, 2], mask=[True, False])
            self.count = 0

        def aggregate_train(self, server_round, replies):
            self.count += 1
            return super().aggregate_train(server_round, replies)

    with pytest.warns(UserWarning, match="Remembering holds calls, lock, masked, which cannot go into a checkpoint"):
        federated(
            FlowerStrategy(Remembering()),
            ModelCheckpoint(tmp_path, save_last=True),
            rounds=1,
            enable_checkpointing=True,
        )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["lightning_fed.Federation"]["strategy"]["count"] == 1


def test_a_run_that_saves_nothing_says_nothing_of_what_cannot_be_saved():
    strategy = flower.FedAvg()
    strategy.lock = threading.Lock()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot go into a checkpoint.*")
        federated(FlowerStrategy(strategy), rounds=1)


def test_a_strategy_that_can_be_saved_gives_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot go into a checkpoint.*")
        federated(
            FlowerStrategy(flower.FedAdam()),
            ModelCheckpoint(tmp_path, save_last=True),
            rounds=1,
            enable_checkpointing=True,
        )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["lightning_fed.Federation"]["strategy"]["m_t"]


def test_a_second_fit_does_not_start_with_the_moments_of_the_first():
    method = FlowerStrategy(STRATEGIES["FedAdam"][0]())
    first, second = federated(method), federated(method)
    assert torch.equal(first.net[0].weight, second.net[0].weight)
    assert method.strategy.m_t is None
    assert method.running.m_t is not None


# ------------------------------------------------------------------------------------------------------ participation


@pytest.mark.landing
@pytest.mark.timeout(60)
def test_fewer_clients_than_a_strategy_waits_for_is_an_error_and_no_hang():
    with pytest.raises(
        ConfigurationError, match=r"waits for more clients than take part in the round: 1\..*min_train_nodes"
    ):
        federated(FlowerStrategy(flower.FedAvg()), sizes=(4,))


@pytest.mark.timeout(60)
def test_a_cohort_smaller_than_a_strategy_waits_for_is_an_error_and_no_hang():
    with pytest.raises(ConfigurationError, match="waits for more clients than take part in the round: 1"):
        federated(FlowerStrategy(flower.FedAvg()), PartialParticipation(fraction_train=0.01))


@pytest.mark.landing
@pytest.mark.timeout(60)
def test_a_strategy_that_waits_in_a_way_of_its_own_is_an_error_and_no_hang():
    class Impatient(flower.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            while len(list(grid.get_node_ids())) < 100:
                time.sleep(0.05)

    with pytest.raises(ConfigurationError, match=f"waits for more clients than take part in the round: {len(SIZES)}"):
        federated(FlowerStrategy(Impatient()))


def test_a_strategy_may_ask_for_the_nodes_as_often_as_it_likes():
    class Curious(flower.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            assert {len(list(grid.get_node_ids())) for _ in range(20)} == {len(SIZES)}
            return super().configure_train(server_round, arrays, config, grid)

    ours, theirs = (federated(FlowerStrategy(make()), rounds=1) for make in (Curious, flower.FedAvg))
    assert torch.equal(ours.net[0].weight, theirs.net[0].weight)


def test_one_client_runs_with_a_strategy_that_is_content_with_one():
    method = FlowerStrategy(flower.FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1))
    module = federated(method, sizes=(8,))
    assert not torch.equal(module.net[0].weight, module_of().net[0].weight)


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda: flower.Bulyan(num_malicious_nodes=2), SIZES),
        (
            lambda: flower.DifferentialPrivacyServerSideFixedClipping(flower.Bulyan(num_malicious_nodes=2), 0, 1, 7),
            SIZES,
        ),
    ],
    ids=["Bulyan", "wrapped Bulyan"],
)
def test_a_strategy_that_gives_no_weights_is_an_error_that_names_it(make, sizes):
    module = module_of()
    with pytest.raises(RoundError, match=f"Round 1: {type(make()).__name__} gave no new weights") as caught:
        federated(FlowerStrategy(make()), module=module, sizes=sizes)
    assert caught.value.round == 1
    assert torch.equal(module.net[0].weight, module_of().net[0].weight)


def test_a_strategy_that_raises_is_an_error_that_names_it():
    class Raises(flower.FedAvg):
        def aggregate_train(self, server_round, replies):
            raise KeyError("no_such_key")

    with pytest.raises(RoundError, match=r"Round 1: Raises could not aggregate the train replies: .*'no_such_key'"):
        federated(FlowerStrategy(Raises()))


def test_a_number_that_a_strategy_needs_and_clients_do_not_log_is_an_error_that_says_so():
    with pytest.raises(
        ClientError, match=r"Round 1, train: client 0 sent no number 'no_such_loss', which QFedAvg needs"
    ):
        federated(FlowerStrategy(flower.QFedAvg(client_learning_rate=0.1, train_loss_key="no_such_loss")))


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_strategy_that_raises_where_it_makes_messages_is_an_error_that_names_it(stage):
    class Raises(flower.FedAvg):
        pass

    def configure(self, server_round, arrays, config, grid):
        raise KeyError("no such key")
        yield

    setattr(Raises, f"configure_{stage}", configure)
    module = Validates()
    before = module.net[0].weight.detach().clone()
    loader = DataLoader(TensorDataset(torch.randn(9, 4), torch.zeros(9, dtype=torch.long)), batch_size=4)
    callbacks = [ClientData([(loader, loader)] * 2), FlowerStrategy(Raises())]
    with pytest.raises(
        RoundError, match=rf"Round 1: Raises could not make the {stage} messages: KeyError: 'no such key'"
    ):
        FederatedTrainer(max_rounds=1, callbacks=callbacks, **QUIET).fit(module)
    assert torch.equal(module.net[0].weight, before)


class Validates(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def test_a_strategy_for_trees_ends_in_an_error_that_names_it():
    with pytest.raises(RoundError, match="Round 1: FedXgbBagging could not make the train messages"):
        federated(FlowerStrategy(flower.FedXgbBagging()))


def test_only_a_flower_strategy_is_taken():
    with pytest.raises(ConfigurationError, match=r"wants an instance of flwr\.serverapp\.strategy\.Strategy"):
        FlowerStrategy("FedAvg")
    assert issubclass(ConfigurationError, FederationError)


class Cohorts(FederatedCallback):
    def __init__(self):
        self.train = []

    def on_round_start(self, trainer, round, stage, cohort):
        if stage == "train":
            self.train.append(tuple(cohort))


def test_a_strategy_s_own_fraction_samples_and_is_reproducible():
    results = []
    for _ in range(2):
        cohorts = Cohorts()
        module = federated(FlowerStrategy(flower.FedAvg(fraction_train=0.5, min_train_nodes=1)), cohorts)
        results.append((cohorts.train, module.net[0].weight.detach().clone()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert [len(cohort) for cohort in results[0][0]] == [3, 3, 3]
    assert len(set(results[0][0])) > 1
    assert all(list(cohort) == sorted(cohort) for cohort in results[0][0])


def test_a_cohort_of_partial_participation_is_all_that_a_flower_strategy_sees():
    cohorts, reference = Cohorts(), Cohorts()
    seen = []

    class Counting(flower.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            seen.append(len(list(grid.get_node_ids())))
            return super().configure_train(server_round, arrays, config, grid)

    ours = federated(FlowerStrategy(Counting()), PartialParticipation(0.5), cohorts)
    theirs = federated(FedAvg(), PartialParticipation(0.5), reference)
    assert cohorts.train == reference.train
    assert seen == [4, 4, 4]
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_the_strategy_that_the_user_holds_is_not_changed():
    strategy = flower.FedAdam()
    before = copy.deepcopy(vars(strategy))
    federated(FlowerStrategy(strategy), rounds=1)
    assert vars(strategy) == before


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_a_flower_strategy_aggregates_the_clients_own_evaluation():
    class Evaluating(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    loaders = [client_data()._clients(client) for client in range(len(SIZES))]
    pairs = ClientData([(loader, DataLoader(loader.dataset, batch_size=4)) for loader in loaders])
    watcher = Watcher()
    torch.manual_seed(1)
    module = Evaluating()
    FederatedTrainer(max_rounds=2, seed=0, callbacks=[pairs, FlowerStrategy(flower.FedAvgM()), watcher], **QUIET).fit(
        module
    )
    x, y = (torch.cat([loader.dataset.tensors[i] for loader in loaders]) for i in (0, 1))
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(module.net(x), y))
    assert watcher.rounds[-1]["clients/val_loss"] == pytest.approx(expected, rel=1e-6)

"""One client in one round is a plain Trainer bit for bit, and a seed fixes a whole run bit for bit."""

from __future__ import annotations

import copy
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FederatedCallback, History, PartialParticipation, Partition
from lightning_fed.seeding import seed_all, seed_for
from tests.helpers import QUIET

EPOCHS = 3


class Automatic(L.LightningModule):
    """Dropout, BatchNorm, Adam and a schedule that moves within the epochs of one round."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3), nn.Dropout(0.1)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x + 0.1 * torch.randn_like(x)), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.3)]


class Manual(Automatic):
    """Two optimizers stepped by hand, one of them every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        body.step()
        if batch_idx % 2:
            head.step()
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()

    def configure_optimizers(self):
        body = torch.optim.Adam(self.net[0].parameters(), lr=0.02)
        head = torch.optim.SGD(self.net[4].parameters(), lr=0.1, momentum=0.9)
        return [body, head], [torch.optim.lr_scheduler.StepLR(body, step_size=1, gamma=0.3)]


class Data(L.LightningDataModule):
    """Reads its data in ``setup``, and changes each batch on its way."""

    def setup(self, stage):
        self.dataset = examples(22)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=8, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x * 2.0, y


def examples(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def module_of(cls):
    torch.manual_seed(0)
    return cls()


def own_loader(**arguments):
    return {"train_dataloaders": DataLoader(examples(22), batch_size=8, shuffle=True, **arguments)}


def with_generator():
    return own_loader(generator=torch.Generator().manual_seed(9))


DATA = {
    "loader": own_loader,
    "loader that drops the last batch": lambda: own_loader(drop_last=True),
    "datamodule": lambda: {"datamodule": Data()},
}


def differing(ours, theirs):
    assert ours.keys() == theirs.keys()
    return [name for name, value in theirs.items() if not torch.equal(ours[name], value)]


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("cls", [Automatic, Manual])
def test_one_client_one_round_is_bitwise_a_plain_trainer(cls, data):
    seed = 17
    ours, theirs = module_of(cls), module_of(cls)
    start = copy.deepcopy(ours.state_dict())

    with isolate_rng():
        seed_all(seed_for(seed, "train", round=1, client=0))
        L.Trainer(max_epochs=EPOCHS, **QUIET).fit(theirs, **data())
    FederatedTrainer(max_rounds=1, num_clients=1, local_epochs=EPOCHS, seed=seed, **QUIET).fit(ours, **data())

    assert differing(ours.state_dict(), theirs.state_dict()) == []
    assert "net.0.weight" in differing(ours.state_dict(), start)


def test_a_plain_trainer_from_another_seed_is_another_run():
    """What the tests above compare does depend on the seed."""
    trained = []
    for client in (0, 1):
        module = module_of(Automatic)
        with isolate_rng():
            seed_all(seed_for(17, "train", round=1, client=client))
            L.Trainer(max_epochs=EPOCHS, **QUIET).fit(module, **own_loader())
        trained.append(module.state_dict())
    assert "net.0.weight" in differing(*trained)


def test_one_client_one_round_logs_what_a_plain_trainer_logs():
    ours, theirs = module_of(Automatic), module_of(Automatic)
    history, plain = History(), L.Trainer(max_epochs=EPOCHS, **QUIET)
    with isolate_rng():
        seed_all(seed_for(0, "train", round=1, client=0))
        plain.fit(theirs, **own_loader())
    trainer = FederatedTrainer(max_rounds=1, num_clients=1, local_epochs=EPOCHS, seed=0, callbacks=[history], **QUIET)
    trainer.fit(ours, **own_loader())
    expected = float(plain.callback_metrics["train_loss"])
    assert history["train_loss"] == [pytest.approx(expected, rel=1e-6)]
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------------ reproducible


class Cohorts(FederatedCallback):
    """Keeps who took part."""

    def __init__(self):
        self.seen = []

    def on_round_start(self, trainer, round, stage, cohort):
        self.seen.append((round, stage, tuple(cohort)))


class Validating(Automatic):
    def validation_step(self, batch, batch_idx):
        x, y = batch
        # Noise in validation draws from the global state, which a run must not take from outside.
        self.log("val_loss", nn.functional.cross_entropy(self.net(x + torch.randn_like(x)), y))


def run(seed=3, outside=0):
    """A run with everything that draws: partition, cohort, batch order, dropout, noise, held-out parts."""
    module = module_of(Validating)
    partition, cohorts, history = Partition(6, val_fraction=0.25), Cohorts(), History(per_client=True)
    trainer = FederatedTrainer(
        max_rounds=4,
        local_epochs=2,
        seed=seed,
        callbacks=[partition, PartialParticipation(0.5, 0.5), cohorts, history],
        **QUIET,
    )
    loader = DataLoader(examples(90), batch_size=8, shuffle=True)
    with isolate_rng():
        seed_all(outside)
        trainer.fit(module, loader, DataLoader(examples(20, seed=6), batch_size=8))
    dealt = [partition.indices(client).tolist() for client in range(6)]
    held_out = [partition.split(client)[1].tolist() for client in range(6)]
    return {
        "weights": module.state_dict(),
        "rows": history.rows,
        "clients": history.clients,
        "dealt": dealt,
        "held_out": held_out,
        "cohorts": cohorts.seen,
    }


@pytest.fixture(scope="module")
def first():
    return run()


def assert_same_run(first, second):
    assert differing(first["weights"], second["weights"]) == []
    for what in ("rows", "clients", "dealt", "held_out", "cohorts"):
        assert first[what] == second[what], what


def test_two_runs_of_one_seed_are_bitwise_equal(first):
    assert_same_run(first, run())
    assert len(first["rows"]) == 4
    assert {"train_loss", "val_loss", "clients/val_loss"} <= first["rows"][0].keys()


def test_the_global_random_state_outside_does_not_change_a_run(first):
    assert_same_run(first, run(outside=456))


def test_what_setup_draws_is_the_run_s_too():
    class Split(Data):
        def setup(self, stage):
            self.dataset, self.rest = torch.utils.data.random_split(examples(30), [24, 6])

    class Building(Automatic):
        def configure_model(self):
            self.extra = nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.extra.weight.square().sum()

    states = []
    for outside in (123, 456):
        module = module_of(Building)
        with isolate_rng():
            seed_all(outside)
            FederatedTrainer(max_rounds=1, num_clients=2, seed=0, **QUIET).fit(module, datamodule=Split())
        states.append(module.state_dict())
    assert "extra.weight" in states[0]
    assert differing(*states) == []


def test_a_run_leaves_the_global_random_state_as_it_was():
    module = module_of(Automatic)
    with isolate_rng():
        seed_all(7)
        before = torch.get_rng_state()
        FederatedTrainer(max_rounds=1, num_clients=2, seed=0, **QUIET).fit(module, **own_loader())
        assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_changes_partition_cohort_and_result(first):
    second = run(seed=4)
    assert "net.0.weight" in differing(first["weights"], second["weights"])
    for what in ("dealt", "held_out", "cohorts", "rows", "clients"):
        assert first[what] != second[what], what


def test_the_seed_of_seed_everything_is_the_run_s_seed(first, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert_same_run(first, run(seed=None))


def test_cohorts_change_from_round_to_round(first):
    cohorts = [cohort for round, stage, cohort in first["cohorts"] if stage == "train"]
    assert len(cohorts) == 4
    assert len(set(cohorts)) > 1
    assert all(len(cohort) == 3 and list(cohort) == sorted(cohort) for cohort in cohorts)


def test_a_second_fit_of_a_finished_trainer_trains_no_further_as_with_a_plain_one():
    module = module_of(Automatic)
    trainer = FederatedTrainer(max_rounds=2, num_clients=2, seed=0, **QUIET)
    trainer.fit(module, **own_loader())
    after = copy.deepcopy(module.state_dict())
    trainer.fit(module, **own_loader())
    assert differing(module.state_dict(), after) == []


def test_a_loader_with_a_generator_of_its_own_is_reproducible_and_shuffles_anew_each_round():
    batches = []

    class Recorder(Automatic):
        def training_step(self, batch, batch_idx):
            batches.append((self.trainer.current_round, self.trainer.client_id, batch[0][:, 0].tolist()))
            return super().training_step(batch, batch_idx)

    seen = []
    for _ in range(2):
        batches.clear()
        trainer = FederatedTrainer(max_rounds=2, num_clients=2, seed=0, **QUIET)
        trainer.fit(module_of(Recorder), **with_generator())
        seen.append(list(batches))
    assert seen[0] == seen[1]
    rounds = [[x for r, client, x in seen[0] if (r, client) == (round, 0)] for round in (1, 2)]
    assert rounds[0] != rounds[1]
    assert sorted(itertools.chain(*rounds[0])) == sorted(itertools.chain(*rounds[1]))

"""Checkpoints that cannot be taken are explained; what a resumed run has otherwise than before is named."""

from __future__ import annotations

import re
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from flwr.serverapp import strategy as flower
from flwr_datasets.partitioner import DirichletPartitioner
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FederatedCallback,
    FedProx,
    FlowerStrategy,
    History,
    PartialParticipation,
    Partition,
)
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET
from tests.integration import plain

FEDERATION = "lightning_fed.Federation"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:You defined a `validation_step` but"
)


class Toy(ToyModule):
    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class Counting(Toy):
    """Counts how often it trains."""

    trained = 0

    def training_step(self, batch, batch_idx):
        type(self).trained += 1
        return super().training_step(batch, batch_idx)


class OneTensor(L.LightningModule):
    """With one parameter, a plain optimizer's state is of the server's shape."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(8))

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.w - batch[1]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=0.1)


def loader(seed=0):
    return DataLoader(toy_data(32, seed), batch_size=8)


def trainer_of(directory, *callbacks, rounds=4, **options):
    """A trainer that saves ``last.ckpt`` in a directory."""
    saving = ModelCheckpoint(directory, save_last=True, enable_version_counter=False)
    arguments = {**QUIET, "enable_checkpointing": True, "default_root_dir": directory, "seed": 0, **options}
    if not any("partition" in getattr(callback, "decides", ()) for callback in callbacks):
        arguments.setdefault("num_clients", 2)
    return FederatedTrainer(max_rounds=rounds, callbacks=[*callbacks, saving], **arguments)


def fit(directory, *callbacks, module=None, ckpt_path=None, **options):
    torch.manual_seed(1)
    module = ToyModule() if module is None else module
    trainer = trainer_of(directory, *callbacks, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module, trainer


def saved(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    """A checkpoint of two rounds."""
    directory = tmp_path_factory.mktemp("federated")
    fit(directory, rounds=2)
    return directory / "last.ckpt"


@pytest.fixture(scope="module")
def central(tmp_path_factory):
    """A plain Trainer's checkpoint after two epochs."""
    path = tmp_path_factory.mktemp("central") / "central.ckpt"
    save_central(ToyModule(), path)
    return path


def save_central(module, path, **how):
    trainer = L.Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, loader())
    trainer.save_checkpoint(path, **how)


@contextmanager
def notes():
    """The warning in which a resumed run says what it has otherwise; a list of its lines, empty if there is none."""
    lines = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    said = [str(warning.message) for warning in caught if "otherwise than before" in str(warning.message)]
    assert len(said) <= 1
    lines += [line.removeprefix("- ") for text in said for line in text.splitlines()[1:]]


# ----------------------------------------------------------------------------------------- files that are no checkpoint


def empty(path, federated):
    path.write_bytes(b"")


def truncated(path, federated):
    data = federated.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def text(path, federated):
    path.write_text("not what it seems\n" * 9)


def a_pickle(path, federated):
    path.write_bytes(b"\x80\x04garbage")


def a_zip(path, federated):
    shutil.make_archive(str(path), "zip", federated.parent, federated.name)
    shutil.move(f"{path}.zip", path)


def damaged(path, federated):
    """Some bytes of its pickle are others."""
    data = bytearray(federated.read_bytes())
    middle = data.index(b"data.pkl") + 200
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)


def a_list(path, federated):
    torch.save([1, 2], path)


def a_tensor(path, federated):
    torch.save(torch.ones(2), path)


def weights_alone(path, federated):
    torch.save(ToyModule().state_dict(), path)


def another_s(path, federated):
    torch.save({"model": ToyModule().state_dict(), "optimizer": {}, "step": 3}, path)


def a_folder(path, federated):
    path.mkdir()


FILES = {
    empty: r"is empty \(0 bytes\): whoever wrote it was stopped, or the disk was full\.",
    truncated: r"is truncated: [\d,]+ bytes are there, and its end is missing",
    text: r"is no file of torch's: its 162 bytes begin with b'not what it seem'",
    a_pickle: r"is a pickle of 9 bytes that is damaged",
    a_zip: r"is a zip archive of [\d,]+ bytes that torch did not write",
    damaged: r"is damaged: 'archive/data\.pkl' among its [\d,]+ bytes is not what was written",
    a_list: r"holds a list, and is no checkpoint of Lightning's",
    a_tensor: r"holds a Tensor, and is no checkpoint of Lightning's",
    weights_alone: r"holds weights alone \(net\.0\.weight, .* and 1 more\).*module\.load_state_dict\(torch\.load\(",
    another_s: r"is no checkpoint of Lightning's: it has no 'state_dict' and no 'pytorch-lightning_version', it has",
    a_folder: r"is a folder, not a checkpoint file",
}


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_file_that_is_no_checkpoint_is_named_with_what_it_is(tmp_path, federated, make, stage):
    path = tmp_path / "some.ckpt"
    make(path, federated)
    trainer, Counting.trained = trainer_of(tmp_path), 0
    with pytest.raises(ConfigurationError, match=f"^{re.escape(str(path))} {FILES[make]}") as caught:
        getattr(trainer, stage)(Counting(), loader(), ckpt_path=path)
    assert Counting.trained == 0
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["last", "hpc", "best"])
@pytest.mark.parametrize("make", [empty, truncated, text, a_list], ids=lambda make: make.__name__)
def test_a_checkpoint_that_lightning_chose_is_named_by_its_path(tmp_path, federated, name, make):
    """A run was saved; then the file is spoilt that ``"last"``, ``"best"`` or ``"hpc"`` stands for."""
    _, trainer = fit(tmp_path, rounds=1)
    path = {"last": tmp_path / "last.ckpt", "hpc": tmp_path / "hpc_ckpt_1.ckpt"}.get(name)
    path = path or Path(trainer.checkpoint_callback.best_model_path)
    if path.exists():
        path.unlink()
    make(path, federated)
    again = trainer if name == "best" else trainer_of(tmp_path)
    with pytest.raises(ConfigurationError, match=f"^{re.escape(str(path))} {FILES[make]}"):
        again.fit(ToyModule(), loader(), ckpt_path=name)
    if name == "best":
        with pytest.raises(ConfigurationError, match=f"^{re.escape(str(path))} {FILES[make]}"):
            again.test(Toy(), loader(), ckpt_path=name)


def test_the_way_out_names_the_checkpoints_that_are_beside_it(tmp_path):
    fit(tmp_path, rounds=2)
    (tmp_path / "last.ckpt").write_bytes(b"")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"last\.ckpt is empty") as caught:
        trainer_of(tmp_path).fit(ToyModule(), loader(), ckpt_path="last")
    assert "epoch=1-step=2.ckpt is beside it" in str(caught.value)
    assert "or delete it to begin anew" in str(caught.value)
    for path in tmp_path.glob("e*.ckpt"):
        path.unlink()
    with pytest.raises(ConfigurationError, match=r"Delete it, or leave ckpt_path out, to begin anew\.$"):
        trainer_of(tmp_path).fit(ToyModule(), loader(), ckpt_path="last")


def test_a_file_that_is_not_there_is_lightning_s_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*none\.ckpt"):
        trainer_of(tmp_path).fit(ToyModule(), loader(), ckpt_path=tmp_path / "none.ckpt")


def test_last_still_begins_anew_where_there_is_none_yet(tmp_path):
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        _, trainer = fit(tmp_path, ckpt_path="last", rounds=1)
    assert trainer.current_epoch == 1


@pytest.mark.parametrize("fault", ["setup", "file", "rounds"])
def test_a_run_that_fails_before_it_goes_on_does_not_overwrite_what_was_saved_on_an_exception(tmp_path, fault):
    class Stop(FederatedCallback):
        def on_round_end(self, trainer, round, metrics):
            if round == 3:
                raise LookupError("in round 3")

    class Broken(ToyModule):
        def setup(self, stage):
            raise LookupError("no data")

    path = tmp_path / "exception.ckpt"
    with pytest.raises(LookupError, match="in round 3"):
        fit(tmp_path, OnExceptionCheckpoint(tmp_path, "exception"), Stop())
    assert saved(path)["global_step"] == 2
    if fault == "file":
        path.write_bytes(path.read_bytes()[:-100])
    before = path.read_bytes()
    module, rounds = Broken() if fault == "setup" else None, 1 if fault == "rounds" else 4
    with (
        pytest.raises((LookupError, ConfigurationError)),
        pytest.warns(UserWarning, match=r"exception\.ckpt stays as it is: the run has not begun"),
    ):
        fit(tmp_path, OnExceptionCheckpoint(tmp_path, "exception"), module=module, ckpt_path=path, rounds=rounds)
    assert path.read_bytes() == before


class Custom:
    """Something that ``weights_only`` does not read."""


def test_objects_that_are_not_read_for_safety_stay_torch_s_error_with_the_way_out(tmp_path, federated):
    path = tmp_path / "custom.ckpt"
    torch.save({**saved(federated), "mine": Custom()}, path)
    with pytest.raises(Exception, match="Weights only load failed") as caught:
        trainer_of(tmp_path).fit(ToyModule(), loader(), ckpt_path=path)
    assert not isinstance(caught.value, ConfigurationError)
    assert "weights_only=False to fit" in "".join(caught.value.__notes__)
    trainer = trainer_of(tmp_path)
    trainer.fit(ToyModule(), loader(), ckpt_path=path, weights_only=False)
    assert trainer.current_epoch == 4


class Renamed(Toy):
    def __init__(self):
        super().__init__()
        self.head, self.net = self.net, nn.Identity()


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: Toy(hidden=3),
            r"another module than this Toy: 'net\.0\.weight' is \(8, 8\) there and \(3, 8\) here, .*"
            r"It was built with hidden=8 \(here 3\).*Toy\.load_from_checkpoint",
        ),
        (
            Renamed,
            r"another module than this Renamed: it has no 'head\.0\.weight', .* and 1 more; it has 'net\.0\.weight', .*"
            " and 1 more, which this one has not",
        ),
    ],
    ids=["other shapes", "other names"],
)
def test_another_module_s_checkpoint_is_named_with_what_differs(tmp_path, federated, stage, make, expected):
    with pytest.raises(ConfigurationError, match=f"^{re.escape(str(federated))} is a checkpoint of {expected}"):
        getattr(trainer_of(tmp_path), stage)(make(), loader(), ckpt_path=federated)


def test_an_error_of_the_module_s_own_loading_stays_as_it_is(tmp_path, federated):
    class Particular(ToyModule):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            raise RuntimeError("not today")

    with pytest.raises(RuntimeError, match=r"^not today$"):
        trainer_of(tmp_path).validate(Particular(), loader(), ckpt_path=federated)


# ----------------------------------------------------------------------------------------- plain Trainer's checkpoints


def optimizers_of(make):
    class Module(ToyModule):
        def configure_optimizers(self):
            return make(self)

    return Module


CENTRAL = {
    "one optimizer": ToyModule,
    "no optimizer": optimizers_of(lambda self: None),
    "two parameter groups": optimizers_of(
        lambda self: torch.optim.SGD([{"params": [p]} for p in self.net[0].parameters()], lr=0.1)
    ),
    "one tensor": OneTensor,
}


@pytest.mark.parametrize("name", CENTRAL)
@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
def test_a_plain_trainer_s_checkpoint_is_refused_with_the_way_to_its_weights(tmp_path, name):
    module, path = CENTRAL[name], tmp_path / "central.ckpt"
    save_central(module(), path)
    way_out = rf"{module.__name__}\.load_from_checkpoint\('{re.escape(str(path))}'\), and fit that without ckpt_path"
    with pytest.raises(ConfigurationError, match=rf"is a checkpoint of a plain Trainer after epoch 2, .*{way_out}"):
        trainer_of(tmp_path).fit(module(), loader(), ckpt_path=path)


@pytest.mark.parametrize("by", ["a plain Trainer", "a FederatedTrainer"])
def test_a_checkpoint_of_weights_only_is_refused_with_the_way_to_them(tmp_path, federated, by):
    path = tmp_path / "weights.ckpt"
    if by == "a plain Trainer":
        save_central(ToyModule(), path, weights_only=True)
    else:
        _, trainer = fit(tmp_path, rounds=1)
        trainer.save_checkpoint(path, weights_only=True)
    with pytest.raises(ConfigurationError, match=r"holds weights only .*ToyModule\.load_from_checkpoint\("):
        trainer_of(tmp_path).fit(ToyModule(), loader(), ckpt_path=path)


def test_the_way_out_works(tmp_path, central):
    module = ToyModule.load_from_checkpoint(central)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert all(torch.equal(value, saved(central)["state_dict"][name]) for name, value in before.items())
    trainer = trainer_of(tmp_path, rounds=1)
    trainer.fit(module, loader())
    assert trainer.current_epoch == 1
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_plain_trainer_s_checkpoint_is_validated_and_tested(tmp_path, stage, weights_only):
    path, module = tmp_path / "central.ckpt", Toy()
    save_central(module, path, weights_only=weights_only)
    ours = getattr(trainer_of(tmp_path), stage)(Toy(), loader(), ckpt_path=path)
    theirs = getattr(L.Trainer(**QUIET), stage)(module, loader())
    assert str(ours) == str(theirs)


def test_a_checkpoint_that_lost_the_federation_s_state_goes_on_and_names_what_is_missing(tmp_path, federated):
    path = tmp_path / "stripped.ckpt"
    torch.save({name: value for name, value in saved(federated).items() if name != "callbacks"}, path)
    with pytest.warns(
        UserWarning, match=rf"{re.escape(str(path))} has no '{FEDERATION}' .*strategy.*clients keep.*seed are missing"
    ):
        _, trainer = fit(tmp_path, rounds=3, ckpt_path=path)
    assert trainer.current_epoch == 3


def test_a_checkpoint_that_lost_a_part_of_the_state_names_it(tmp_path, federated):
    checkpoint = saved(federated)
    del checkpoint["callbacks"][FEDERATION]["strategy"], checkpoint["callbacks"][FEDERATION]["clients"]
    path = tmp_path / "stripped.ckpt"
    torch.save(checkpoint, path)
    with notes() as said:
        fit(tmp_path, rounds=3, ckpt_path=path, client_state="carry")
    assert "The checkpoint has no state of the strategy: WeightedMean begins anew." in said
    assert "The checkpoint has nothing that clients kept: their optimizers begin anew." in said


def test_a_federated_checkpoint_does_not_resume_a_plain_trainer_and_its_weights_load(tmp_path, federated):
    """What the README says of it: the plain Trainer refuses the server optimizer's state."""
    with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        L.Trainer(max_epochs=4, **QUIET).fit(ToyModule(), loader(), ckpt_path=federated)
    module = ToyModule.load_from_checkpoint(federated)
    assert type(module) is ToyModule
    L.Trainer(max_epochs=1, **QUIET).fit(module, loader())


def test_a_federated_checkpoint_does_not_resume_a_plain_trainer_of_a_module_with_one_parameter(tmp_path):
    fit(tmp_path, module=OneTensor(), rounds=1)
    with pytest.raises(KeyError, match="momentum"):  # never a step with the server's learning rate of 1
        L.Trainer(max_epochs=4, **QUIET).fit(OneTensor(), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_a_plain_trainer_tests_a_federated_checkpoint(federated):
    (result,) = L.Trainer(**QUIET).validate(ToyModule(), loader(), ckpt_path=federated, verbose=False)
    (expected,) = L.Trainer(**QUIET).validate(ToyModule.load_from_checkpoint(federated), loader(), verbose=False)
    assert result == expected


# ------------------------------------------------------------------------------------------- another run's checkpoints


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [1],
        lambda state: [],
        lambda state: 0,
        lambda state: {"strategy": 5, "clients": "x", "seed": "y"},
        lambda state: {**state, "clients": {"one": {}}},
        lambda state: {**state, "clients": {0: 5}},
        lambda state: {**state, "setup": {"FederatedTrainer": None}},
        lambda state: {**state, "arguments": 3},
        lambda state: dict.fromkeys(state),
    ],
)
def test_a_runs_state_of_another_shape_is_named_with_the_way_out(tmp_path, federated, change):
    checkpoint = saved(federated)
    checkpoint["callbacks"][FEDERATION] = change(checkpoint["callbacks"][FEDERATION])
    path, trained = tmp_path / "changed.ckpt", Counting.trained
    torch.save(checkpoint, path)
    says = rf"{re.escape(str(path))}: what it holds as '{FEDERATION}' .*Counting\.load_from_checkpoint\("
    with pytest.raises(ConfigurationError, match=says):
        fit(tmp_path, module=Counting(), rounds=3, ckpt_path=path)
    assert Counting.trained == trained


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_fewer_rounds_than_were_done_are_refused(tmp_path, federated, rounds):
    if rounds == 1:
        with pytest.raises(ConfigurationError, match=r"has done 2 rounds, and this run is to end after 1\."):
            fit(tmp_path, rounds=rounds, ckpt_path=federated)
    else:
        _, trainer = fit(tmp_path, rounds=rounds, ckpt_path=federated)
        assert trainer.current_epoch == rounds


def test_the_same_run_goes_on_without_a_word(tmp_path, federated):
    with notes() as said:
        fit(tmp_path, rounds=3, ckpt_path=federated)
    assert said == []


def dirichlet():
    return DirichletPartitioner(num_partitions=2, partition_by="label", alpha=5.0, min_partition_size=2)


OTHERWISE = {
    "seed": (
        {},
        {"seed": 5},
        r"The checkpoint is of a run with seed 0, this one has seed 5: .*FederatedTrainer\(seed=0\)",
    ),
    "more clients": (
        {},
        {"num_clients": 3},
        [
            r"The run had 2 clients, this one has 3: they have other data than before\.",
            r"Partition\(partitioner=IidPartitioner\(num_partitions=3\)\) holds, the run had partitioner=Iid",
        ],
    ),
    "fewer clients": (
        {"num_clients": 4, "client_state": "carry"},
        {"num_clients": 2, "client_state": "carry"},
        [
            r"The run had 4 clients, this one has 2: they",
            r"What clients 2, 3 kept is dropped\.",
            r"Partition\(partitioner=IidPartitioner\(num_partitions=2\)\) holds",
        ],
    ),
    "local epochs": (
        {},
        {"local_epochs": 2},
        r"FederatedTrainer\(local_epochs=2\) holds, the run had local_epochs=1\.",
    ),
    "local steps": ({}, {"local_steps": 1}, r"FederatedTrainer\(local_steps=1\) holds, the run had local_steps=None\."),
    "client_state": (
        {"client_state": "reset"},
        {"client_state": "carry"},
        [
            r"FederatedTrainer\(client_state='carry'\) holds, the run had client_state='reset'\.",
            r"The checkpoint has nothing that clients kept: their optimizers begin anew\.",
        ],
    ),
    "partitioner": (
        {"partition": Partition(2)},
        {"partition": Partition(dirichlet())},
        r"Partition\(partitioner=DirichletPartitioner\(.*\)\) holds, the run had partitioner=IidPartitioner\(num_",
    ),
    "val_fraction": (
        {"partition": Partition(2)},
        {"partition": Partition(2, val_fraction=0.5)},
        r"Partition\(val_fraction=0\.5\) holds, the run had val_fraction=0\.0\.",
    ),
    "participation": (
        {"cohort": PartialParticipation(1.0)},
        {"cohort": PartialParticipation(0.5)},
        r"PartialParticipation\(fraction_train=0\.5\) holds, the run had fraction_train=1\.0\.",
    ),
    "mu": ({"prox": FedProx(0.1)}, {"prox": FedProx(0.2)}, r"FedProx\(mu=0\.2\) holds, the run had mu=0\.1\."),
    "no FedProx": ({"prox": FedProx(0.1)}, {}, r"FedProx\(mu=0\.1\) was part of the run, and is none of this one\."),
    "new FedProx": ({}, {"prox": FedProx(0.1)}, r"FedProx\(mu=0\.1\) was no part of the run\."),
    "learning rate": (
        {"method": FedAdam(learning_rate=0.1)},
        {"method": FedAdam(learning_rate=0.2)},
        r"FedAdam\(learning_rate=0\.2\) holds, the run had learning_rate=0\.1\.",
    ),
    "new history": ({}, {"history": History()}, r"History has nothing in the checkpoint: it begins in this round\."),
}


def test_a_module_s_hparams_that_a_script_sets_anew_are_named(tmp_path):
    adam = optimizers_of(lambda self: torch.optim.Adam(self.parameters(), lr=self.hparams["lr"]))
    how = {"client_state": "carry"}
    fit(tmp_path, module=adam(lr=0.1), rounds=1, **how)
    with notes() as said:
        fit(tmp_path, module=adam(lr=0.2), rounds=2, ckpt_path="last", **how)
    assert said == [
        "What clients' optimizers kept goes on, learning rates included (client_state='carry').",
        "Module(lr=0.2) holds, the run had lr=0.1.",
    ]
    with notes() as said:
        fit(tmp_path, module=adam(lr=0.2), rounds=3, ckpt_path="last", **how)
    assert said == []


def split_options(options):
    callbacks = [value for value in options.values() if isinstance(value, L.Callback)]
    return callbacks, {name: value for name, value in options.items() if not isinstance(value, L.Callback)}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_a_resumed_run_has_otherwise_is_named_once(tmp_path, what):
    before, after, expected = OTHERWISE[what]
    callbacks, options = split_options(before)
    fit(tmp_path, *callbacks, rounds=2, **options)
    callbacks, options = split_options(after)
    with notes() as said:
        _, trainer = fit(tmp_path, *callbacks, rounds=3, ckpt_path="last", **options)
    assert trainer.current_epoch == 3
    expected = [expected] if isinstance(expected, str) else expected
    for pattern in expected:
        assert sum(bool(re.match(pattern, line)) for line in said) == 1, said
    assert len(said) == len(expected)


def test_a_history_that_is_not_there_any_more_is_named_by_lightning(tmp_path):
    fit(tmp_path, History(), rounds=2)
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['History'\]"):
        fit(tmp_path, rounds=3, ckpt_path="last")


def test_a_new_history_has_the_rounds_from_here_on(tmp_path, federated):
    history = History()
    fit(tmp_path, history, rounds=4, ckpt_path=federated)
    assert [row["round"] for row in history.rows] == [3, 4]


def test_numbers_of_numpy_among_the_metrics_do_not_spoil_the_checkpoint(tmp_path):
    class Adds(FederatedCallback):
        def on_round_end(self, trainer, round, metrics):
            metrics["mine"] = np.float64(0.5)

    fit(tmp_path, History(per_client=True), Adds(), rounds=1)
    assert saved(tmp_path / "last.ckpt")["callbacks"]["History"]["rows"][0]["mine"] == 0.5
    history = History(per_client=True)
    fit(tmp_path, history, Adds(), rounds=2, ckpt_path="last")
    assert history["mine"] == [0.5, 0.5]


def test_an_argument_that_a_callback_s_own_state_overwrites_is_named(tmp_path):
    """As Lightning's EarlyStopping does, whose state has the patience."""

    class Growing(FederatedCallback):
        def __init__(self, step):
            self.step, self._size = step, 0

        def state_dict(self):
            return {"step": self.step}

        def load_state_dict(self, state):
            self.step = state["step"]

    fit(tmp_path, Growing(1), EarlyStopping("train_loss", patience=7), rounds=1)
    with notes() as said:
        fit(tmp_path, Growing(2), EarlyStopping("train_loss", patience=9), rounds=2, ckpt_path="last")
    assert said == [
        "Growing(step=1) holds, as in the checkpoint; 2 is not used.",
        "EarlyStopping(patience=7) holds, as in the checkpoint; 9 is not used.",
    ]


class Adaptive(FederatedCallback):
    """Its argument is where it begins, and state from then on."""

    def __init__(self, mu, name="a"):
        self.mu, self.name = mu, name

    def local_callbacks(self):
        return []

    def on_round_end(self, trainer, round, metrics):
        self.mu *= 2

    def state_dict(self):
        return {"mu": self.mu} if self.mu > 0.3 else {}

    def load_state_dict(self, state):
        self.mu = state["mu"]


def test_an_argument_that_the_run_itself_changes_is_named_only_where_the_script_changes_it(tmp_path):
    fit(tmp_path, Adaptive(0.1), rounds=3)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "three.ckpt")
    same = Adaptive(0.1)
    with notes() as said:
        fit(tmp_path, same, rounds=4, ckpt_path=tmp_path / "three.ckpt")
    assert said == []
    assert same.mu == 1.6
    other = Adaptive(0.2)
    with notes() as said:
        fit(tmp_path, other, rounds=4, ckpt_path=tmp_path / "three.ckpt")
    assert said == ["Adaptive(mu=0.8) holds, as in the checkpoint; 0.2 is not used."]


def test_a_callback_that_had_nothing_to_save_is_not_taken_for_a_new_one(tmp_path):
    fit(tmp_path, Adaptive(0.1), rounds=1)
    with notes() as said:
        fit(tmp_path, Adaptive(0.1), rounds=2, ckpt_path="last")
    assert said == []


def test_a_learning_rate_that_is_changed_on_resume_holds_and_the_moments_stay(tmp_path):
    """By hand: the moments after two rounds, and a third one with the new learning rate."""
    fit(tmp_path, FedAdam(learning_rate=0.1), rounds=2)
    start = saved(tmp_path / "last.ckpt")
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "two.ckpt")
    same, _ = fit(tmp_path, FedAdam(learning_rate=0.1), rounds=3, ckpt_path=tmp_path / "two.ckpt")
    twice, _ = fit(tmp_path, FedAdam(learning_rate=0.2), rounds=3, ckpt_path=tmp_path / "two.ckpt")
    for name, x in start["state_dict"].items():
        moved, further = same.state_dict()[name] - x, twice.state_dict()[name] - x
        torch.testing.assert_close(further, 2 * moved, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------- another method's state


METHODS = {
    "FedAvg": FedAvg,
    "FedAvgM": FedAvgM,
    "FedAdam": FedAdam,
    "Flower's FedAvg": lambda: FlowerStrategy(flower.FedAvg()),
    "Flower's FedAdam": lambda: FlowerStrategy(flower.FedAdam()),
    "Flower's FedMedian": lambda: FlowerStrategy(flower.FedMedian()),
    "wrapped": lambda: FlowerStrategy(flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAdam(), 0.1, 1.0, 2)),
}


@pytest.mark.parametrize("after", METHODS)
@pytest.mark.parametrize("before", ["FedAvg", "FedAdam", "Flower's FedAdam", "wrapped"])
def test_another_method_goes_on_from_the_weights_with_a_state_of_its_own(tmp_path, before, after):
    fit(tmp_path, METHODS[before](), rounds=1)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "one.ckpt")
    with notes() as said:
        module, trainer = fit(tmp_path, METHODS[after](), rounds=2, ckpt_path=tmp_path / "one.ckpt")
    assert trainer.current_epoch == 2
    told = [line for line in said if line.startswith("The run aggregated with")]
    if before == after:
        assert said == []
        return
    assert len(told) == 1
    assert "begins anew" in told[0]
    # As if that method had begun with these weights in this round.
    checkpoint = saved(tmp_path / "one.ckpt")
    checkpoint["callbacks"][FEDERATION].pop("method")
    checkpoint["callbacks"][FEDERATION].pop("strategy")
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    expected, _ = fit(tmp_path / "bare", METHODS[after](), rounds=2, ckpt_path=tmp_path / "bare.ckpt")
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


class OwnState(flower.FedAvg):
    """A strategy that says itself what its state is."""

    names = ("total",)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.total = torch.zeros(1)

    def aggregate_train(self, server_round, replies):
        self.total += 1
        return super().aggregate_train(server_round, replies)

    def state_dict(self):
        return {name: getattr(self, name) for name in self.names}

    def load_state_dict(self, state):
        for name in self.names:
            setattr(self, name, state[name])


def test_a_strategy_that_cannot_take_its_state_is_named_with_what_the_checkpoint_has(tmp_path):
    fit(tmp_path, FlowerStrategy(OwnState()), rounds=1)
    strategy = OwnState()
    strategy.names, strategy.drift = ("total", "drift"), torch.zeros(1)
    with pytest.raises(
        ConfigurationError,
        match=r"last\.ckpt: OwnState cannot take its state, of which the checkpoint has 'total': KeyError: 'drift'\."
        r" .*MyModule\.load_from_checkpoint",
    ):
        fit(tmp_path, FlowerStrategy(strategy), rounds=2, ckpt_path="last")


class Momentum(ToyModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Adam(ToyModule):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_another_optimizer_cannot_go_on_with_what_clients_kept(tmp_path):
    fit(tmp_path, module=Momentum(), rounds=1, client_state="carry")
    with pytest.raises(
        ClientError, match=r"client 0 has kept the state of SGD, and configure_optimizers now gives Adam"
    ):
        fit(tmp_path, module=Adam(), rounds=2, client_state="carry", ckpt_path="last")
    fit(tmp_path, module=Adam(), rounds=2, client_state="global", ckpt_path="last")


# ----------------------------------------------------------------------------------------------------- grids of others


@pytest.mark.parametrize("client_state", ["carry", "reset"])
def test_what_clients_keep_is_named_where_it_cannot_be_given_back(tmp_path, client_state):
    from flwr.app import Context, RecordDict

    fit(tmp_path, rounds=1, client_state=client_state)
    server, clients = (trainer_of(tmp_path, rounds=2, client_state=client_state) for _ in range(2))
    app = clients.client_app(ToyModule(), loader())
    with notes() as said, plain.flower_identity():
        server.server_app(ToyModule(), ckpt_path=tmp_path / "last.ckpt")(
            plain.ForeignGrid(app, 2), Context(7, 1, {}, RecordDict(), {})
        )
    expected = "What clients kept cannot be given back to them on this grid."
    assert said == ([expected] if client_state == "carry" else [])

"""A file that is no checkpoint, or another module's, is named with what it is."""

from __future__ import annotations

import re
import shutil
from inspect import signature
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn

from lightning_fed import ConfigurationError
from lightning_fed.callbacks import FederatedCallback
from lightning_fed.testing import ToyModule
from tests.integration.checkpointing.runs import Counting, Toy, fit, loader, saved, trainer_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:You defined a `validation_step` but"
)


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


def flipped(path, federated):
    """One bit of its weights is another: torch reads it all the same."""
    data, weight = bytearray(federated.read_bytes()), saved(federated)["state_dict"]["net.0.weight"]
    data[data.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(data)


def zeros(path, federated):
    """What some file systems leave after a loss of power."""
    path.write_bytes(bytes(federated.stat().st_size))


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
    flipped: r"is damaged: '[^']+/data/\d+' among its [\d,]+ bytes is not what was written",
    zeros: r"is no file of torch's: its [\d,]+ bytes begin with b'\\x00",
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


def test_a_checkpoint_without_checksums_is_read(tmp_path, federated):
    path = tmp_path / "some.ckpt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(saved(federated), path)
    finally:
        torch.serialization.set_crc32_options(True)
    _, trainer = fit(tmp_path, ckpt_path=path)
    assert trainer.current_epoch == 4


def counts_of(checkpoint):
    fit = checkpoint["loops"]["fit_loop"]
    return fit["epoch_progress"]["current"], fit["epoch_loop.manual_optimization.optim_step_progress"]["total"]


def a_negative_round(checkpoint):
    checkpoint["global_step"] = -1


def a_round_in_words(checkpoint):
    checkpoint["global_step"] = "two"


def more_rounds(checkpoint):
    checkpoint["global_step"] = 3


def fewer_epochs(checkpoint):
    counts_of(checkpoint)[0]["completed"] = 0


def negative_epochs(checkpoint):
    epochs, steps = counts_of(checkpoint)
    epochs["completed"] = checkpoint["global_step"] = steps["completed"] = -1


def no_loops(checkpoint):
    del checkpoint["loops"]


def no_epochs(checkpoint):
    del checkpoint["loops"]["fit_loop"]["epoch_progress"]


def loops_of_another_kind(checkpoint):
    checkpoint["loops"] = [1]


@pytest.mark.parametrize(
    ("change", "said"),
    {
        a_negative_round: r"it says that it has done -1 rounds \('global_step'\), 2 \(steps\)",
        a_round_in_words: "it says that it has done 'two' rounds",
        more_rounds: r"it says that it has done 3 rounds \('global_step'\), 2 \(steps\)",
        fewer_epochs: r"and 0 \(epochs\)",
        negative_epochs: "it says that it has done -1 rounds",
        no_loops: "there is no 'loops'",
        no_epochs: "there is no 'epoch_progress'",
        loops_of_another_kind: "list indices",
    }.items(),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_that_cannot_say_in_which_round_to_go_on_is_refused(tmp_path, federated, change, said):
    checkpoint, path = saved(federated), tmp_path / "some.ckpt"
    change(checkpoint)
    torch.save(checkpoint, path)
    trainer, Counting.trained = trainer_of(tmp_path), 0
    with pytest.raises(ConfigurationError, match=f"^{re.escape(str(path))} is damaged, or was changed: .*{said}"):
        trainer.fit(Counting(), loader(), ckpt_path=path)
    assert Counting.trained == 0


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


@pytest.mark.skipif(
    "weights_only" not in signature(Trainer.fit).parameters, reason="before Lightning 2.6 all objects are read"
)
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

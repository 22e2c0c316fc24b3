"""What simulated clients keep, in files: the same bits, resumed from them, and errors that say what is missing."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, PartialParticipation, Personal, Scaffold
from lightning_fed.engines.client_states import StatesInFiles
from tests.callbacks.rounds import EPOCHS, ROUNDS, SIZES, WAYS, Chosen, Stops, loaders, momentum
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

ARGUMENTS: dict[str, dict[str, Any]] = {"in process": {}, **WAYS, "carry": {"client_state": "carry"}}


def fit(
    folder: Path, *callbacks: Any, ckpt_path: Any = None, storage: Any = "memory", rounds: int = ROUNDS, **how: Any
) -> Any:
    module = Classifier(copy.deepcopy(network(torch.float64)), momentum)
    saves = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    methods = [Scaffold(), Personal("net.2")]
    trainer = FederatedTrainer(
        max_rounds=rounds,
        local_epochs=EPOCHS,
        callbacks=[
            ClientData(loaders()),
            *([] if any(isinstance(one, PartialParticipation) for one in callbacks) else [Chosen()]),
            *methods,
            saves,
            *callbacks,
        ],
        client_storage=storage,
        **{**QUIET, "enable_checkpointing": True, "default_root_dir": folder},
        **how,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def assert_same(one: Any, other: Any) -> None:
    for client in range(len(SIZES)):
        ours, theirs = (fit.personal_module(client).state_dict() for fit in (one, other))
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("way", ARGUMENTS)
def test_files_give_the_same_bits(way: str, tmp_path: Path) -> None:
    in_memory = fit(tmp_path / "memory", **ARGUMENTS[way])
    in_files = fit(tmp_path / "files", storage=tmp_path / "kept", **ARGUMENTS[way])
    assert_same(in_files, in_memory)
    assert len(list((tmp_path / "kept").iterdir())) == len(SIZES)
    checkpoint = torch.load(tmp_path / "files" / "checkpoints" / "epoch=2.ckpt", weights_only=True)
    clients = checkpoint["callbacks"]["lightning_fed.Federation"]["clients"]
    assert "tensor" not in str(clients)


@pytest.mark.parametrize("hook", ["on_client_end", "on_round_end"])
@pytest.mark.parametrize("way", ["in process", "processes"])
def test_a_run_goes_on_from_its_files_bit_for_bit(way: str, hook: str, tmp_path: Path) -> None:
    whole, stops = fit(tmp_path / "whole", **ARGUMENTS[way]), Stops(hook)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path, stops, storage=tmp_path / "kept", **ARGUMENTS[way])
    for rounds in (2, 1):
        path = tmp_path / "checkpoints" / f"epoch={rounds - 1}.ckpt"
        assert_same(fit(tmp_path, ckpt_path=path, storage=tmp_path / "kept", **ARGUMENTS[way]), whole)


def test_files_that_nobody_needs_go_and_those_of_the_last_checkpoints_stay(tmp_path: Path) -> None:
    states, counts = StatesInFiles(tmp_path / "kept"), []
    for round in range(1, 13):
        states.begin_round()
        states.put(7, RecordDict({"kept": ConfigRecord({"round": round})}), round, "train")
        if round in (2, 4):
            saved = states.save(before_round=False)
        counts.append(len(list((tmp_path / "kept" / "client-7").iterdir())))
    assert counts == [1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4, 4]
    states.load(saved)
    assert states.read(7)["kept"]["round"] == 4  # type: ignore[index]


def test_files_of_a_checkpoint_stay_as_long_as_it_is_there(tmp_path: Path) -> None:
    """However many were saved since: `best` and `last` are often old."""
    states, kept = StatesInFiles(tmp_path / "kept"), tmp_path / "kept" / "client-7"
    best, last, later = (str(tmp_path / name) for name in ("best.ckpt", "last.ckpt", "later.ckpt"))

    def train(round: int) -> None:
        states.begin_round()
        states.put(7, RecordDict({"kept": ConfigRecord({"round": round})}), round, "train")

    def save(path: str, is_written: bool = True) -> Any:
        saved = states.save(before_round=False)
        if is_written:
            Path(path).touch()
        states.saved_at(path)
        return saved

    train(1)
    first, _ = save(best), save(later, is_written=False)  # in the background: not there yet
    for round in range(2, 12):
        train(round)
        newest = save(last)
    for saved, round in ((first, 1), (newest, 11)):
        again = StatesInFiles(tmp_path / "kept")
        again.load(saved)
        assert again.read(7)["kept"]["round"] == round  # type: ignore[index]
    Path(best).unlink()
    Path(later).touch()
    train(12)
    save(last)
    assert any(path.stem.endswith("-1-train") for path in kept.iterdir())  # what was late is there now
    Path(later).unlink()
    for round in range(13, 20):
        train(round)
        save(last)
    assert not any(path.stem.endswith("-1-train") for path in kept.iterdir())


@pytest.mark.parametrize("way", ["in process", "processes"])
def test_an_old_checkpoint_of_a_long_run_is_gone_on_from(way: str, tmp_path: Path) -> None:
    old = ModelCheckpoint(tmp_path / "old", filename="{epoch}", every_n_epochs=6, save_top_k=-1)
    how: Any = {**ARGUMENTS[way], "storage": tmp_path / "kept", "rounds": 9}
    whole = fit(tmp_path, old, PartialParticipation(0.5), **how)
    checkpoint = tmp_path / "old" / "epoch=5.ckpt"
    shutil.rmtree(tmp_path / "checkpoints")
    assert_same(fit(tmp_path, old, PartialParticipation(0.5), ckpt_path=checkpoint, **how), whole)


def stopped(folder: Path, storage: Any) -> Path:
    with pytest.raises(RuntimeError, match="stopped"):
        fit(folder, Stops("on_round_end"), storage=storage)
    return folder / "checkpoints" / "epoch=1.ckpt"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = stopped(tmp_path, tmp_path / "kept")
    with pytest.raises(ConfigurationError, match=r"client 0 keeps is in a file .*go on with client_storage="):
        fit(tmp_path, ckpt_path=path)
    shutil.rmtree(tmp_path / "kept" / "client-2")
    with pytest.raises(ConfigurationError, match=r"What client 2 keeps should be in .*client-2.* cannot be read"):
        fit(tmp_path, ckpt_path=path, storage=tmp_path / "kept")


@pytest.mark.parametrize("how", ["truncated", "a bit"])
def test_a_damaged_file_is_named_and_not_used(how: str, tmp_path: Path) -> None:
    everybody = PartialParticipation(1.0)
    how: Any = {"storage": tmp_path / "kept"}
    trainer = fit(tmp_path, everybody, **how)
    own = trainer.personal_module(2).net[2].weight.detach().numpy().tobytes()
    [path] = [p for p in (tmp_path / "kept" / "client-2").iterdir() if own in p.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.find(own) + 2] ^= 0x40
    path.write_bytes(content if how == "a bit" else content[: len(content) // 2])
    with pytest.raises(ConfigurationError, match=rf"What client 2 keeps should be in {path}, which cannot be read"):
        trainer.personal_module(2)
    with pytest.raises(ConfigurationError, match=r"What client 2 keeps should be in .*, which cannot be read"):
        fit(tmp_path, everybody, ckpt_path=tmp_path / "checkpoints" / "epoch=2.ckpt", rounds=ROUNDS + 1, **how)


def test_what_a_checkpoint_holds_itself_goes_into_files(tmp_path: Path) -> None:
    whole, path = fit(tmp_path / "whole"), stopped(tmp_path, "memory")
    assert_same(fit(tmp_path, ckpt_path=path, storage=tmp_path / "kept"), whole)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"client_storage=.*file.*Write a folder of your own"):
        fit(tmp_path, storage=tmp_path / "file")
    with pytest.raises(ConfigurationError, match='client_storage=3 must be "memory", or a folder'):
        FederatedTrainer(max_rounds=1, num_clients=2, client_storage=3, **QUIET)  # type: ignore[arg-type]


def test_a_client_that_fails_keeps_what_it_had(tmp_path: Path) -> None:
    from tests.callbacks.test_personal import Spoils

    how = {"client_callbacks": [Spoils()]}
    in_memory = fit(tmp_path / "memory", FaultTolerance(min_results=1), **how)
    in_files = fit(tmp_path / "files", FaultTolerance(min_results=1), storage=tmp_path / "kept", **how)
    assert_same(in_files, in_memory)

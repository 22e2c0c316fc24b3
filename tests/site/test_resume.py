"""A server that is killed and resumed over sites that keep what is theirs: to the bits of one process, or an error."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, FedAdam, FederatedCallback, Personal, Scaffold
from lightning_fed.errors import ClientError
from lightning_fed.site.resident import Site
from lightning_fed.site.states import StateFolder
from tests.deployment.federation import CLIENTS, data, module
from tests.engines.link import Link, Linked
from tests.helpers import QUIET
from tests.integration.callbacks.stateful import Scales

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:The dirpath has changed"
)
ROUNDS = 4
WAYS = {
    "reset": {"client_state": "reset"},
    "carry": {"client_state": "carry"},
    "what callbacks keep": {"client_state": "reset", "client_callbacks": True},
    "what methods keep": {"client_state": "reset", "methods": True},
}


def trainer(
    engine: Any, folder: Path, *callbacks: Any, client_callbacks: bool = False, methods: bool = False, **options: Any
) -> Any:
    return FederatedTrainer(
        max_rounds=ROUNDS,
        engine=engine,
        seed=3,
        callbacks=[
            ClientData(data, num_clients=CLIENTS),
            FedAdam(),
            *([Scaffold(), Personal("net.4")] if methods else []),
            ModelCheckpoint(folder, filename="{epoch}", save_last=True, save_top_k=-1),
            *callbacks,
        ],
        client_callbacks=[Scales()] if client_callbacks else None,
        **{**QUIET, "enable_checkpointing": True, "default_root_dir": folder, **options},
    )


class Sites:
    """Sites that have joined a SuperLink in memory, each with a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.folder, self._options, self._patch = folder, options, monkeypatch
        self.sites: dict[int, Site] = {}
        for client in range(CLIENTS):
            self.restart(client)
        self.link = Link({11 + client: self._at(client) for client in range(CLIENTS)})

    def state_dir(self, client: int) -> Path:
        return self.folder / f"client-{client}"

    def restart(self, client: int, state_dir: Path | None = None) -> None:
        self._patch.setattr(Site, "serve", lambda site: self.sites.update({client: site}))
        train, val = data(client)
        where = {"client": client, "insecure": True, "state_dir": state_dir or self.state_dir(client)}
        trainer("in_process", self.folder, **self._options).join("127.0.0.1:1", module(), train, val, **where)

    def _at(self, client: int) -> Any:
        def site(message: Message) -> Message:
            return self.sites[client]._answers.to(message, 11 + client)

        return site


@pytest.fixture
def sites_of(tmp_path, monkeypatch):
    return lambda **options: Sites(tmp_path / "sites", monkeypatch, **options)


class Killed(BaseException):
    """What ends a server without a word: nothing is saved any more."""


class Kill(FederatedCallback):
    """Kills the server when it has taken client 1's reply in a stage of a round."""

    def __init__(self, round: int, stage: str, folder: Path) -> None:
        self._when, self._folder = (round, stage, 1), folder

    def on_client_end(self, trainer: Any, round: int, stage: str, report: Any) -> None:
        if (round, stage, report.client) == self._when:
            shutil.copytree(self._folder, self._folder.with_name("killed"))
            raise Killed


def result(fit: Any, model: Any) -> Any:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Through the link in memory bfloat16 goes in NumPy's form, which is twice as wide.
    metrics = {name: value.item() for name, value in fit.callback_metrics.items() if not name.startswith("bytes/")}
    return weights, metrics


def run(engine: Any, folder: Path, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    fit, model = trainer(engine, folder, *callbacks, **options), module()
    fit.fit(model, ckpt_path=ckpt_path)
    return result(fit, model)


def killed(sites: Sites, folder: Path, round: int, stage: str, **options: Any) -> Path:
    """Runs a server that is killed in a round; gives the folder with the checkpoints that it leaves."""
    with pytest.raises(Killed):
        run(Linked(sites.link), folder / "server", Kill(round, stage, folder / "server"), **options)
    return folder / "killed"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run in one process gives that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    return {way: run("in_process", folder / way, **options) for way, options in WAYS.items()}


@pytest.mark.parametrize(("stage", "restarted"), [("train", (0, 1, 2)), ("evaluate", ())], ids=["train", "evaluate"])
@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_is_killed_in_a_round_goes_on_to_the_same_bits(tmp_path, sites_of, whole, way, stage, restarted):
    sites, options = sites_of(**WAYS[way]), WAYS[way]
    left = killed(sites, tmp_path, 3, stage, **options)
    for client in restarted:
        sites.restart(client)
    resumed = run(Linked(sites.link), left, ckpt_path="last", **options)
    torch.testing.assert_close(resumed, whole[way], rtol=0, atol=0)


@pytest.mark.parametrize("way", ["carry", "what callbacks keep"])
def test_a_server_that_goes_back_two_rounds_finds_what_sites_kept_then(tmp_path, sites_of, whole, way):
    sites, options = sites_of(**WAYS[way]), WAYS[way]
    left = killed(sites, tmp_path, 4, "train", **options)
    for rounds in (2, 1):  # what sites kept after the first time is in nobody's way
        resumed = run(Linked(sites.link), left, ckpt_path=left / f"epoch={rounds - 1}.ckpt", **options)
        torch.testing.assert_close(resumed, whole[way], rtol=0, atol=0)


@pytest.mark.parametrize("way", ["carry", "what callbacks keep"])
def test_a_site_that_has_lost_what_it_kept_then_is_an_error_that_says_what_is_missing(tmp_path, sites_of, way):
    sites, options = sites_of(**WAYS[way]), WAYS[way]
    left = killed(sites, tmp_path, 4, "train", **options)
    for path in sites.state_dir(1).glob("*-2-*.state"):
        path.unlink()
    said = rf"Round 3, train: client 1 has nothing of [0-9a-f]{{16}}-2-\w+ in {re.escape(str(sites.state_dir(1)))}"
    with pytest.raises(ClientError, match=said):
        run(Linked(sites.link), left, ckpt_path=left / "epoch=1.ckpt", **options)


def test_a_folder_that_vanishes_while_its_client_works_is_made_again_and_nothing_is_lost(
    tmp_path, sites_of, whole, monkeypatch
):
    save = StateFolder.save

    def lose_and_save(self: StateFolder, mark: str, state: Any) -> None:
        shutil.rmtree(self.folder)
        save(self, mark, state)

    monkeypatch.setattr(StateFolder, "save", lose_and_save)
    ended = run(Linked(sites_of(**WAYS["carry"]).link), tmp_path / "server", **WAYS["carry"])
    torch.testing.assert_close(ended, whole["carry"], rtol=0, atol=0)


class Loses(FederatedCallback):
    """Does something after round 1."""

    def __init__(self, do: Any) -> None:
        self._do = do

    def on_round_end(self, trainer: Any, round: int, metrics: Any) -> None:
        if round == 1:
            self._do()


def test_a_folder_that_is_lost_between_rounds_is_an_error_in_each_round_until_it_is_back(tmp_path, sites_of):
    """To go on with nothing would be another run, and nobody would know."""
    sites, errors = sites_of(**WAYS["carry"]), []
    folder, away = sites.state_dir(1), tmp_path / "away"

    def tolerate(error: ClientError) -> None:
        errors.append(error)
        if error.round == 3:
            shutil.move(away, folder)

    lose = Loses(lambda: shutil.move(folder, away))
    run(Linked(sites.link), tmp_path / "server", lose, FaultTolerance(on_error=tolerate), **WAYS["carry"])
    assert [(error.round, error.stage, error.client) for error in errors] == [
        (2, "train", 1),
        (2, "evaluate", 1),
        (3, "train", 1),
    ]
    for error in errors:
        assert re.search(rf"has nothing of [0-9a-f]{{16}}-1-\w+ in {re.escape(str(folder))}", str(error))


def test_a_folder_that_cannot_be_written_fails_the_works_that_change_what_is_kept(tmp_path, sites_of):
    sites, errors = sites_of(**WAYS["carry"]), []
    folder = sites.state_dir(1)
    folder.rmdir()
    folder.write_text("in the way")
    run(Linked(sites.link), tmp_path / "server", FaultTolerance(on_error=errors.append), **WAYS["carry"])
    assert [(error.round, error.stage) for error in errors] == [(round, "train") for round in range(1, ROUNDS + 1)]
    assert all(re.search(f"client 1 cannot keep in {re.escape(str(folder))}", str(error)) for error in errors)


@pytest.mark.parametrize("way", ["carry", "what callbacks keep"])
def test_a_site_with_the_folder_of_another_is_an_error_that_names_the_file(tmp_path, sites_of, way):
    sites, options = sites_of(**WAYS[way]), WAYS[way]
    left = killed(sites, tmp_path, 3, "train", **options)
    sites.restart(1, sites.state_dir(2))
    said = rf"Round 3, train: client 1 cannot take {re.escape(str(sites.state_dir(2)))}/.*-2-.*what client 2 kept"
    with pytest.raises(ClientError, match=said):
        run(Linked(sites.link), left, ckpt_path="last", **options)


def test_what_a_run_in_one_process_kept_is_in_its_checkpoint_and_not_for_sites(tmp_path, sites_of):
    run("in_process", tmp_path, client_state="carry")
    with pytest.raises(ConfigurationError, match=r"What client 0 keeps is in the checkpoint"):
        run(
            Linked(sites_of(client_state="carry").link),
            tmp_path,
            ckpt_path=tmp_path / "epoch=1.ckpt",
            client_state="carry",
        )


def test_only_what_changes_is_kept(sites_of, tmp_path):
    sites = sites_of(client_state="reset")
    run(Linked(sites.link), tmp_path / "server", client_state="reset")
    assert not list(tmp_path.rglob("*.state"))
    assert StateFolder(sites.state_dir(0), 0).load("") == {}

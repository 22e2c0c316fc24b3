"""Clients' own models in a folder: what comes back, bit for bit, and what is refused."""

from __future__ import annotations

import copy
import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_fed import ConfigurationError, FederatedTrainer, load_personal_module
from lightning_fed.callbacks import ClientData, Ditto, FedBN, FedPer, Personal
from lightning_fed.values.weights import Weights
from lightning_fed.wire.personal_folder import write_personal
from tests.callbacks.rounds import EPOCHS, SIZES, Chosen, loaders, momentum
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

METHODS: dict[str, Any] = {
    "Personal": lambda: Personal("*.bias", modules=nn.BatchNorm1d),
    "FedBN": FedBN,
    "FedPer": lambda: FedPer("net.3"),
    "Ditto": lambda: Ditto(lam=0.5),
}


def module() -> Classifier:
    """One that has other weights than any that was trained."""
    made = Classifier(network(torch.float64, batch_norm=True), momentum)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    return made


def fit(*callbacks: Any, rounds: int = 2, ckpt_path: Any = None, kind: Any = Classifier, **how: Any) -> Any:
    how = {**QUIET, "local_epochs": EPOCHS, **how}
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=[ClientData(loaders()), Chosen(), *callbacks], **how)
    trainer.fit(kind(network(torch.float64, batch_norm=True), momentum), ckpt_path=ckpt_path)
    return trainer


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == other.state_dict()[name].dtype
        assert torch.equal(tensor, other.state_dict()[name]), name


def saved(folder: Path, method: str = "FedPer", **how: Any) -> Any:
    """The trainer of a run that is saved in a folder."""
    trainer = fit(METHODS[method](), **how)
    trainer.save_personal_modules(folder)
    return trainer


@pytest.mark.parametrize(
    ("method", "how"),
    [
        *((method, {}) for method in METHODS),
        ("FedBN", {"engine": "processes", "num_workers": 2}),
        ("FedPer", {"vectorize_clients": "require"}),
        ("Ditto", {"client_storage": "folder"}),
    ],
)
def test_a_client_s_model_comes_back_bit_for_bit(method: str, how: Any, tmp_path: Path) -> None:
    how = {**how, **({"client_storage": tmp_path / "kept"} if "client_storage" in how else {})}
    trainer = saved(tmp_path / "saved", method, **how)
    for client in range(len(SIZES)):
        given = module()
        assert load_personal_module(given, tmp_path / "saved", client) is given
        assert_same(given, trainer.personal_module(client))
    assert_same(load_personal_module(module(), str(tmp_path / "saved"), None), trainer.lightning_module)


def test_a_client_that_has_not_trained_has_nothing_there(tmp_path: Path) -> None:
    trainer = saved(tmp_path, rounds=1)  # of which client 1 is not
    assert_same(load_personal_module(module(), tmp_path, 0), trainer.personal_module(0))
    with pytest.raises(ConfigurationError, match=r"nothing of client 1; it has clients 0, 2, 3. .* client=None gives"):
        load_personal_module(module(), tmp_path, 1)
    assert_same(load_personal_module(module(), tmp_path, None), trainer.personal_module(1))


def test_a_resumed_run_saves_the_same(tmp_path: Path) -> None:
    first = saved(tmp_path / "first")
    first.save_checkpoint(tmp_path / "run.ckpt")
    again = fit(METHODS["FedPer"](), ckpt_path=str(tmp_path / "run.ckpt"))
    again.save_personal_modules(tmp_path / "again")
    for client in (0, 3):
        assert_same(*(load_personal_module(module(), tmp_path / name, client) for name in ("first", "again")))


class Saves(FedPer):
    """Saves in the middle of the run."""

    def __init__(self, folder: Path) -> None:
        super().__init__("net.3")
        self.folder = folder

    def on_client_end(self, trainer: Any, round: int, stage: Any, report: Any) -> None:
        if round == 2:
            trainer.save_personal_modules(self.folder)


def test_in_the_middle_of_a_round_it_is_what_the_round_began_with(tmp_path: Path) -> None:
    fit(Saves(tmp_path))
    trainer = fit(METHODS["FedPer"](), rounds=1)
    for client in (0, 2, 3):
        assert_same(load_personal_module(module(), tmp_path, client), trainer.personal_module(client))


def test_only_the_client_s_own_tensors_are_in_its_file(tmp_path: Path) -> None:
    saved(tmp_path)
    (file,) = tmp_path.glob("clients-*/client-0.pt")
    held = torch.load(file, weights_only=True)
    assert sorted(held["own"]) == ["net.3.bias", "net.3.weight"]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held["own"].values())


def test_a_module_that_builds_its_layers_is_built(tmp_path: Path) -> None:
    class Builds(Classifier):
        def configure_model(self) -> None:
            if self.net is None:
                self.net = network(torch.float64, batch_norm=True)

    trainer = fit(METHODS["FedPer"](), kind=lambda net, optimizer: Builds(None, optimizer))
    trainer.save_personal_modules(tmp_path)
    assert_same(load_personal_module(Builds(None, momentum), tmp_path, 2), trainer.personal_module(2))


# ---------------------------------------------------------------------------------------------------- one save, or none


def test_another_run_s_save_replaces_all_of_it(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "mine.txt").write_text("stays")
    trainer = saved(tmp_path, "FedBN", rounds=1)
    assert sorted(path.name for path in tmp_path.glob("clients-*/*")) == ["client-0.pt", "client-2.pt", "client-3.pt"]
    assert_same(load_personal_module(module(), tmp_path, 2), trainer.personal_module(2))
    with pytest.raises(ConfigurationError, match="nothing of client 1"):
        load_personal_module(module(), tmp_path, 1)
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
def test_a_save_that_does_not_end_leaves_the_one_before(error: BaseException, tmp_path: Path) -> None:
    trainer = saved(tmp_path)

    def each() -> Iterator[tuple[int, Weights]]:
        yield 0, {"net.3.bias": torch.zeros(3)}
        assert len(list(tmp_path.glob("clients-*"))) == 2
        raise error

    with pytest.raises(ConfigurationError if isinstance(error, RuntimeError) else KeyboardInterrupt):
        write_personal(tmp_path, "Classifier", {}, each())
    assert_same(load_personal_module(module(), tmp_path, 0), trainer.personal_module(0))
    assert len(list(tmp_path.glob("clients-*"))) == 1


def test_clients_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
    asked = []

    def each() -> Iterator[tuple[int, Weights]]:
        for client in range(4):
            assert len(list(tmp_path.glob("clients-*/*.pt"))) == client
            asked.append(client)
            yield client, {"own": torch.zeros(2)}

    write_personal(tmp_path, "Net", {"own": torch.zeros(2)}, each())
    assert asked == [0, 1, 2, 3]


def test_a_client_s_file_of_another_save_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    saved(tmp_path / "two")
    (there,), (here,) = (list((tmp_path / name).glob("clients-*/client-0.pt")) for name in ("one", "two"))
    here.write_bytes(there.read_bytes())
    with pytest.raises(ConfigurationError, match=r"client-0.pt is of another save, or .* client. Save it again"):
        load_personal_module(module(), tmp_path / "two", 0)
    here.write_bytes(here.with_name("client-2.pt").read_bytes())
    with pytest.raises(ConfigurationError, match="of another client"):
        load_personal_module(module(), tmp_path / "two", 0)
    here.unlink()
    with pytest.raises(ConfigurationError, match=r"client-0.pt is not there, and .*personal_modules.pt names it"):
        load_personal_module(module(), tmp_path / "two", 0)


# -------------------------------------------------------------------------------------------------------------- errors


def with_a_bit_changed(data: bytes) -> bytes:
    """A file of torch's with another number in its first tensor."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at = data.index(archive.read(next(name for name in archive.namelist() if name.endswith("/data/0"))))
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def with_a_header_changed(place: str) -> Any:
    """A file whose first tensor has one other bit in what the archive says of it; torch reads rubbish."""

    def change(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            part = next(one for one in archive.infolist() if one.filename.endswith("/data/0"))
        index = data.rindex(part.filename.encode()) - 46
        at, bit = {
            "length of the name": (part.header_offset + 26, 6),
            "compression": (index + 10, 3),
            "is a folder": (index + 38, 4),
        }[place]
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    return change


@pytest.mark.parametrize("which", ["personal_modules.pt", "clients-*/client-0.pt"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[: len(data) // 2], "is truncated"),
        (lambda data: b"", r"is empty \(0 bytes\)"),
        (lambda data: b"hello", "is no file of torch's"),
        (lambda data: with_a_bit_changed(data), "is damaged"),
        *(
            (with_a_header_changed(place), "is damaged")
            for place in ("length of the name", "compression", "is a folder")
        ),
    ],
)
def test_a_damaged_file_is_named(which: str, damage: Any, said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (file,) = tmp_path.glob(which)
    file.write_bytes(damage(file.read_bytes()))
    before = module()
    given = copy.deepcopy(before)
    with pytest.raises(ConfigurationError, match=f"{file.name} ({said}).* Save it again"):
        load_personal_module(given, tmp_path, 0)
    assert_same(given, before)


def test_what_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"There is no folder .*nowhere: name one that"):
        load_personal_module(module(), tmp_path / "nowhere", 0)
    with pytest.raises(ConfigurationError, match=r"has no personal_modules.pt: it is no folder of trainer.save_pers"):
        load_personal_module(module(), tmp_path, 0)
    for foreign in ([1, 2], {"state_dict": {}}, {"kind": 1}):
        torch.save(foreign, tmp_path / "personal_modules.pt")
        with pytest.raises(ConfigurationError, match="holds something else than a client's model"):
            load_personal_module(module(), tmp_path, 0)
    index = {"kind": "lightning_fed.personal_modules", "module": "Net", "clients": [0], "shared": {}}
    for wrong in ({"kind": "another"}, {"save": "../../elsewhere"}):
        torch.save({**index, "save": "0" * 16, **wrong}, tmp_path / "personal_modules.pt")
        with pytest.raises(ConfigurationError, match="is no index"):
            load_personal_module(module(), tmp_path, 0)
    torch.save(nn.Linear(1, 1), tmp_path / "personal_modules.pt")
    with pytest.raises(ConfigurationError, match=r"personal_modules.pt cannot be read: UnpicklingError"):
        load_personal_module(module(), tmp_path, 0)


def test_another_module_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path)
    narrow, other = Classifier(network(torch.float32, batch_norm=True), momentum), Classifier(nn.Linear(6, 3), momentum)
    wide = module()
    wide.net[0] = nn.Linear(6, 9).double()
    with pytest.raises(ConfigurationError, match=r"module than this Classifier: 'net.0.weight' is torch.float64 there"):
        load_personal_module(narrow, tmp_path, 0)
    load_personal_module(narrow.double(), tmp_path, 0)  # which is what the error says
    with pytest.raises(ConfigurationError, match=r"it has no 'net.weight', 'net.bias'; it has 'net.0.weight', "):
        load_personal_module(other, tmp_path, 0)
    with pytest.raises(ConfigurationError, match=r"'net.0.weight' is \(7, 6\) there and \(9, 6\) here"):
        load_personal_module(wide, tmp_path, 0)
    with pytest.raises(ConfigurationError, match="its first argument is the LightningModule"):
        load_personal_module(nn.Linear(1, 1), tmp_path, 0)  # type: ignore[type-var]


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    class Extra(Classifier):
        def get_extra_state(self) -> Any:
            return {"scale": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(ConfigurationError, match=r"save_personal_modules\(.*\): there has been no fit"):
        FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).save_personal_modules(tmp_path)
    with pytest.raises(ConfigurationError, match=r"no client has tensors of its own.* trainer.save_checkpoint\(path\)"):
        fit().save_personal_modules(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match=r"'_extra_state' of the state dict is no tensor"):
        fit(METHODS["FedPer"](), kind=Extra).save_personal_modules(tmp_path)
    for nothing in ("", None):
        with pytest.raises(ConfigurationError, match=r"save_personal_modules\(.*\): name a folder of your own"):
            fit(METHODS["FedPer"]()).save_personal_modules(nothing)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"Name a folder of your own; is the disk full"):
        saved(tmp_path / "file")


def test_a_client_may_be_a_number_of_numpy_s(tmp_path: Path) -> None:
    trainer = saved(tmp_path)
    assert_same(load_personal_module(module(), tmp_path, np.int64(2)), trainer.personal_module(np.int64(2)))
    with pytest.raises(ConfigurationError, match="There is no client True"):
        trainer.personal_module(True)


def test_a_module_that_cannot_be_copied_is_built_anew_and_loaded(tmp_path: Path) -> None:
    class Locked(Classifier):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.lock = threading.Lock()

    trainer = fit(METHODS["FedPer"](), kind=Locked)
    with pytest.raises(
        ConfigurationError, match=r"personal_module\(1\): Locked cannot be copied.*lock.*load_personal_mod"
    ):
        trainer.personal_module(1)
    trainer.save_personal_modules(tmp_path)
    built = Locked(network(torch.float64, batch_norm=True), momentum)
    assert_same(load_personal_module(built, tmp_path, 1), fit(METHODS["FedPer"]()).personal_module(1))


def test_after_a_fit_that_did_not_begin_it_is_said_so(tmp_path: Path) -> None:
    trainer = fit(METHODS["FedPer"]())
    with pytest.raises(FileNotFoundError):
        trainer.fit(module(), ckpt_path=str(tmp_path / "none.ckpt"))
    with pytest.raises(ConfigurationError, match="its last fit ended before the first round"):
        trainer.personal_module(1)

"""What a client keeps on its site's disk: found by its mark, named when it is lost, never unpickled."""

import os
import shutil

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.site.states import KEPT, StateFolder
from lightning_fed.wire import messages, roll_call

RUN = "0123456789abcdef"


def test_states_are_found_by_mark_and_the_oldest_forgotten(tmp_path):
    states = StateFolder(tmp_path / "new" / "folder", 1)
    assert states.load("") == RecordDict()
    marks = [roll_call.mark_of(RUN, round, "train") for round in range(KEPT + 3)]
    for i, mark in enumerate(marks):
        states.save(mark, RecordDict({"fit": ConfigRecord({"bytes": b"%d" % i})}))
    assert bytes(StateFolder(tmp_path / "new" / "folder", 1).load(marks[-1])["fit"]["bytes"]) == b"%d" % (KEPT + 2)
    assert len(list((tmp_path / "new" / "folder").glob("*"))) == KEPT
    with pytest.raises(ClientError, match=f"has nothing of {marks[0]} in .*folder"):
        states.load(marks[0])


def state(value: bytes = b"1") -> RecordDict:
    return RecordDict({"fit": ConfigRecord({"bytes": value})})


def flipped(path):
    """One bit of what it holds is another: torch reads it all the same."""
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(64.0).numpy().tobytes())] ^= 1
    path.write_bytes(data)


def with_content(path, change):
    kept = torch.load(path, weights_only=True)
    change(kept)
    torch.save(kept, path)


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), r"which is empty \(0 bytes\)"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "which is truncated"),
    "a text": (lambda path: path.write_text("cut off"), "which is no file of torch's"),
    "a bit flipped": (flipped, "which is damaged"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "which is a folder"),
    "a pickle": (lambda path: torch.save(torch.nn.Linear(1, 1), path), "UnpicklingError"),
    "weights": (lambda path: torch.save({"w": torch.ones(1)}, path), "KeyError: 'client'"),
    "a list": (lambda path: torch.save([1], path), "TypeError"),
    "another's": (lambda path: with_content(path, lambda kept: kept.update(client=2)), "it holds what client 2 kept"),
    "another round's": (lambda path: with_content(path, lambda kept: kept.update(mark="x-2-train")), "of x-2-train"),
    "no record": (lambda path: with_content(path, lambda kept: kept.update(state=5)), "TypeError: it holds 5"),
    "an unknown kind": (lambda path: with_content(path, lambda kept: kept.update(state={"__os__": 5})), "TypeError"),
}


@pytest.mark.parametrize(("spoil", "said"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_not_what_the_client_kept_is_named_and_not_unpickled(tmp_path, spoil, said):
    mark, states = roll_call.mark_of(RUN, 1, "train"), StateFolder(tmp_path, 1)
    record = RecordDict({"tensors": messages.pack({"w": torch.arange(64.0)})})
    states.save(mark, record)
    torch.testing.assert_close(messages.unpack(states.load(mark)["tensors"]), messages.unpack(record["tensors"]))
    path = tmp_path / f"{mark}.state"
    spoil(path)
    with pytest.raises(ClientError, match=f"^cannot take {path}.*{said}.*Put back the folder as it was, or begin with"):
        states.load(mark)


def test_the_states_of_another_client_or_run_are_not_taken_under_their_names(tmp_path):
    mark, later = roll_call.mark_of(RUN, 1, "train"), roll_call.mark_of(RUN[::-1], 1, "train")
    StateFolder(tmp_path, 1).save(mark, state())
    with pytest.raises(ClientError, match=r"it holds what client 1 kept .* Has this site the folder of another?"):
        StateFolder(tmp_path, 2).load(mark)
    (tmp_path / f"{mark}.state").rename(tmp_path / f"{later}.state")
    with pytest.raises(ClientError, match=f"cannot take .*{later}.state: it holds what client 1 kept of {mark}"):
        StateFolder(tmp_path, 1).load(later)


def test_a_write_that_is_interrupted_leaves_what_was_there_before(tmp_path, monkeypatch):
    mark, states = roll_call.mark_of(RUN, 1, "train"), StateFolder(tmp_path, 1)
    states.save(mark, state(b"before"))

    def full(thing, file):
        file.write(b"PK half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ClientError, match=f"cannot keep in {tmp_path} .*counts as not done: .*No space left"):
        states.save(mark, state(b"after"))
    assert states.load(mark) == state(b"before")
    assert [path.name for path in tmp_path.iterdir()] == [f"{mark}.state"]
    (tmp_path / "killed.new").write_bytes(b"PK half of it")
    with states.locked():
        assert not list(tmp_path.glob("*.new"))
    assert states.load(mark) == state(b"before")


def test_a_folder_that_is_gone_is_made_again_and_one_that_cannot_be_is_named(tmp_path):
    mark, folder = roll_call.mark_of(RUN, 1, "train"), tmp_path / "a" / "b"
    states = StateFolder(folder, 1)
    shutil.rmtree(tmp_path / "a")
    states.save(mark, state())
    assert states.load(mark) == state()
    shutil.rmtree(tmp_path / "a")
    states.came(123)
    assert states.left_behind() == 123
    shutil.rmtree(tmp_path / "a")
    states.left()
    (tmp_path / "a").write_text("in the way")
    states.came(124)
    states.left()
    with pytest.raises(ClientError, match=f"cannot keep in {folder}"):
        states.save(mark, state())


def test_what_was_kept_last_is_not_forgotten_whatever_the_clock_says(tmp_path):
    states = StateFolder(tmp_path, 1)
    marks = [roll_call.mark_of(RUN, round, "train") for round in range(KEPT + 1)]
    for mark in marks[:-1]:
        states.save(mark, state())
        os.utime(tmp_path / f"{mark}.state", (2**33, 2**33))
    states.save(marks[-1], state(b"last"))
    assert states.load(marks[-1]) == state(b"last")
    assert len(list(tmp_path.glob("*.state"))) == KEPT


def test_a_folder_that_cannot_be_made_is_named_at_the_start(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match=rf"join\(state_dir='{folder}'\): it cannot be a folder"):
            StateFolder(folder, 1)


def test_a_folder_is_one_processs(tmp_path):
    first, second = StateFolder(tmp_path, 1), StateFolder(tmp_path, 1)
    with first.locked(), pytest.raises(ConfigurationError, match="this client is here already"), second.locked():
        pass
    with second.locked():
        pass


def test_an_address_left_behind_is_known_until_the_site_has_said_goodbye(tmp_path):
    states = StateFolder(tmp_path, 1)
    assert states.left_behind() == 0
    states.came(123)
    assert StateFolder(tmp_path, 1).left_behind() == 123
    (tmp_path / "node.json").write_text('{"host": "elsewhere", "node_id": 123}')
    assert states.left_behind() == 0
    states.left()
    assert states.left_behind() == 0

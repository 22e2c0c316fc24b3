"""What a client keeps on its site's disk: found by its mark, named when it is lost, never unpickled."""

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.site.states import KEPT, StateFolder
from lightning_fed.wire import roll_call

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


def test_a_state_that_is_no_state_is_named_and_not_unpickled(tmp_path):
    mark = roll_call.mark_of(RUN, 1, "train")
    (tmp_path / f"{mark}.state").write_bytes(b"cut off")
    with pytest.raises(ClientError, match=f"cannot read .*{mark}"):
        StateFolder(tmp_path, 1).load(mark)
    torch.save(torch.nn.Linear(1, 1), tmp_path / f"{mark}.state")
    with pytest.raises(ClientError, match=f"cannot read .*{mark}"):
        StateFolder(tmp_path, 1).load(mark)


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

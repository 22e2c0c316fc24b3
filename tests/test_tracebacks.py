"""What a user reads of an error: its words, her own frames, once."""

import re
import traceback

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.engines import InProcess, Processes
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.tracebacks import frames, shorten, words
from tests.helpers import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def caught(act) -> Exception:
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def bad_shape():
    return torch.nn.Linear(3, 2)(torch.zeros(1, 4))


def test_frames_of_libraries_are_folded_but_for_the_one_that_raised():
    text = frames(caught(bad_shape))
    assert "in bad_shape" in text
    assert "frames of torch" in text
    assert text.count('File "') == 3  # this test's helper, bad_shape, and torch's last
    assert "linear.py" in text.splitlines()[-3]


def test_error_of_a_library_alone_has_its_last_frames():
    error = caught(bad_shape)
    library = error.__traceback__.tb_next.tb_next
    deep = caught(lambda: torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 2)))(torch.zeros(1, 4)))
    text = frames(error.with_traceback(library))
    assert text.count('File "') == 3
    text = frames(deep.with_traceback(deep.__traceback__.tb_next.tb_next))
    assert text.count('File "') == 3
    assert "frames of torch" in text.splitlines()[0]


def test_causes_are_told_with_their_frames():
    def act():
        try:
            {}["a"]
        except KeyError as error:
            raise ValueError("outer") from error

    text = frames(caught(act))
    assert "KeyError: 'a'" in text
    assert "direct cause" in text
    assert text.endswith("ValueError: outer")


def test_words_of_an_error_are_those_of_python_with_its_notes():
    error = ValueError("two\nlines")
    error.add_note("and a note")
    assert words(error) == "ValueError: two\nlines\nand a note"


def test_batch_of_one_under_batch_norm_comes_with_the_way_out():
    error = caught(lambda: torch.nn.BatchNorm1d(4)(torch.zeros(1, 4)))
    assert "Expected more than 1 value per channel" in words(error)
    assert "drop_last=True" in words(error)


def test_full_tracebacks_on_request(monkeypatch):
    monkeypatch.setenv("LIGHTNING_FED_TRACEBACK", "full")
    error = caught(bad_shape)
    before = error.__traceback__
    assert "..." not in frames(error)
    assert shorten(error).__traceback__ is before


class Mine(ToyModule):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0][:, :3]).sum()  # of the wrong shape


@pytest.mark.parametrize("engine", [InProcess(), Processes(2, start_method="fork")], ids=lambda engine: engine.name)
def test_a_clients_error_is_one_screen_with_its_traceback_once(engine):
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, engine=engine, **QUIET)
    error = caught(lambda: trainer.fit(Mine(), DataLoader(toy_data(48), batch_size=8)))
    screen = "".join(traceback.format_exception(error))
    # From torch 2.15 on it begins with "addmm: ".
    assert re.search(r"Round 1, train: client 0 raised RuntimeError: (\w+: )?mat1 and mat2 shapes", screen)
    assert screen.count("self.net(batch[0][:, :3])") == 1
    assert "trainer.fit(Mine()" in screen
    assert len(screen.splitlines()) < 30

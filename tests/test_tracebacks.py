"""What a user reads of an error: its words, her own frames, once."""

import subprocess
import sys
import textwrap

import pytest
import torch

from lightning_fed.tracebacks import frames, shorten, words


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


def test_error_of_a_library_alone_has_all_its_frames():
    class Foreign(Exception):
        pass

    error = caught(bad_shape)
    own = error.__traceback__.tb_next.tb_next
    text = frames(error.with_traceback(own))
    assert "..." not in text
    assert text.count('File "') > 1


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


SCRIPT = """
import warnings
warnings.simplefilter("ignore")
from torch.utils.data import DataLoader
from lightning_fed import FederatedTrainer
from lightning_fed.testing import ToyModule, toy_data


class Mine(ToyModule):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0][:, :3]).sum()  # of the wrong shape


trainer = FederatedTrainer(max_rounds=1, num_clients=2, logger=False, enable_checkpointing=False, engine={engine!r})
trainer.fit(Mine(), DataLoader(toy_data(48), batch_size=8))
"""


@pytest.mark.parametrize("engine", ["in_process", "processes"])
def test_a_clients_error_is_one_screen_with_its_traceback_once(tmp_path, engine):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(engine=engine)))
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert run.returncode == 1
    error = run.stderr[run.stderr.index("Traceback (most recent call last)") :]
    assert "Round 1, train: client 0 raised RuntimeError: mat1 and mat2 shapes cannot be multiplied" in error
    assert error.count("self.net(batch[0][:, :3])") == 1
    assert "trainer.fit(Mine()" in error
    assert len(error.splitlines()) < 25

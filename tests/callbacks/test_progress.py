"""The bars show the round and the clients done of the cohort."""

import io
import itertools
import re

import pytest
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.callbacks.progress import rich_progress
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, Partition, RichRoundBar, RoundPrinter, TQDMRoundBar
from lightning_fed.callbacks import progress as progress_module
from lightning_fed.testing import ToyModule, toy_data


def loader(size: int = 48) -> DataLoader:
    return DataLoader(toy_data(size), batch_size=8)


def run(quiet, bar, *callbacks, module=None, **kwargs):
    arguments = {"max_rounds": 2, **quiet, "enable_progress_bar": True, **kwargs}
    callbacks = [Partition(3, val_fraction=0.25), bar, *callbacks]
    trainer = FederatedTrainer(callbacks=callbacks, **arguments)
    trainer.fit(module or ToyModule(), loader(), loader(16))
    return trainer


def shown(bar_class) -> list[tuple[str, int, int | None]]:
    """What a bar is told to draw."""
    calls = []

    class Recording(bar_class):
        def show(self, what, done, total=None):
            calls.append((what, done, total))
            super().show(what, done, total)

    Recording.calls = calls
    return Recording()


class Breaks(ToyModule):
    def on_train_start(self):
        if self.trainer.client_id == 1:
            raise ValueError("no")


# ------------------------------------------------------------------------------------------------- TQDM


def test_tqdm_bar_shows_the_round_the_clients_done_and_the_metrics(quiet, capsys):
    run(quiet, TQDMRoundBar())
    err = capsys.readouterr()
    frames = re.split(r"[\r\n]", err.out + err.err)
    for round in (1, 2):
        for stage in ("training", "evaluating"):
            counts = [m[1] for f in frames if (m := re.search(rf"Round {round}/2 {stage}.*?(\d)/3", f))]
            # One after the other. (Lightning resets the bar once more when its next epoch starts.)
            assert [c for c, _ in itertools.groupby(counts)][:4] == ["0", "1", "2", "3"]
    last = next(f for f in reversed(frames) if "Round 2/2" in f)
    assert "train_loss=" in last
    assert "clients/val_loss=" in last


def test_tqdm_bar_shows_the_servers_validation_on_its_own_bar(quiet, capsys):
    run(quiet, TQDMRoundBar())
    captured = capsys.readouterr()
    assert "Validation" in captured.out + captured.err


def test_switched_off_tqdm_bar_shows_nothing(quiet, capsys):
    run(quiet, TQDMRoundBar(refresh_rate=0))
    captured = capsys.readouterr()
    assert "Round" not in captured.out + captured.err


# ------------------------------------------------------------------------------------------------- Rich


@pytest.fixture
def console(monkeypatch):
    """A terminal that keeps what Rich draws."""
    output = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(file=output, force_terminal=True, width=150, color_system=None)
    monkeypatch.setattr(rich_progress, "get_console", lambda: terminal)
    monkeypatch.setattr(rich_progress, "reconfigure", lambda **kwargs: None)
    # Draws every change, not some a second; Lightning 2.5 always does.
    monkeypatch.setattr(rich_progress, "_IS_INTERACTIVE", True, raising=False)
    return output


def test_rich_bar_shows_the_round_the_clients_done_and_the_metrics(quiet, console):
    run(quiet, RichRoundBar(refresh_rate=1, leave=True))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.getvalue())
    for round in (1, 2):
        for stage in ("training", "evaluating"):
            counts = re.findall(rf"Round {round}/2 {stage}\s[^\d]*(\d)/3", text)
            assert [c for c, _ in itertools.groupby(counts)][:4] == ["0", "1", "2", "3"]
    assert "train_loss" in text
    assert "val_loss" in text


def test_rich_bar_is_the_default_in_a_terminal(quiet, monkeypatch):
    monkeypatch.setattr(progress_module, "get_console", lambda: Console(force_terminal=True))
    monkeypatch.setenv("TERM", "xterm")
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **{**quiet, "enable_progress_bar": True})
    assert isinstance(trainer.progress_bar_callback, RichRoundBar)
    assert len([c for c in trainer.callbacks if isinstance(c, RichProgressBar)]) == 1


def test_bar_that_the_user_brings_is_the_only_one(quiet):
    bar = TQDMRoundBar()
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, callbacks=[bar], **{**quiet, "enable_progress_bar": True})
    assert trainer.progress_bar_callback is bar
    assert not [c for c in trainer.callbacks if isinstance(c, RichProgressBar)]


# ------------------------------------------------------------------------------------------------- both


BOTH = pytest.mark.parametrize("bar_class", [TQDMRoundBar, RichRoundBar])


@BOTH
def test_bar_counts_the_cohort_up_in_each_stage(quiet, bar_class):
    bar = shown(bar_class)
    run(quiet, bar)
    assert bar.calls == [
        call
        for round in (1, 2)
        for stage in ("training", "evaluating")
        for call in (
            (f"Round {round}/2 {stage}", 0, 3),
            *((f"Round {round}/2 {stage}", done, None) for done in (1, 2, 3)),
        )
    ]


@BOTH
def test_failed_client_is_done_too(quiet, bar_class):
    bar = shown(bar_class)
    run(quiet, bar, FaultTolerance(on_error="ignore"), module=Breaks(), max_rounds=1)
    assert [done for what, done, _ in bar.calls if "training" in what] == [0, 1, 2, 3]


@BOTH
def test_client_without_data_to_evaluate_on_is_done_too(quiet, bar_class):
    bar = shown(bar_class)
    data = ClientData([(loader(16), loader(8)), loader(16), (loader(16), loader(8))])
    trainer = FederatedTrainer(max_rounds=1, callbacks=[data, bar], **{**quiet, "enable_progress_bar": True})
    trainer.fit(ToyModule())
    assert [done for what, done, _ in bar.calls if "evaluating" in what][-1] == 3


@BOTH
def test_run_without_a_last_round_does_not_name_one(quiet, bar_class):
    class StopAfterTwo(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_round >= 2

    bar = shown(bar_class)
    run(quiet, bar, StopAfterTwo(), max_rounds=-1, max_time="00:00:01:00")
    assert {what for what, _, _ in bar.calls} == {f"Round {r} {s}" for r in (1, 2) for s in ("training", "evaluating")}


def test_a_bar_of_ones_own_says_how_it_draws():
    with pytest.raises(NotImplementedError):
        progress_module.RoundProgress().show("Round 1/1 training", 0)


# ------------------------------------------------------------------------------------------------- a line a round


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Round")]


@pytest.mark.parametrize(
    ("console", "widgets", "drawn"),
    [
        ({"force_terminal": False}, True, False),
        ({"force_terminal": True}, False, True),
        ({"force_jupyter": True}, True, True),
        ({"force_jupyter": True}, False, False),  # Rich would draw nothing
    ],
)
def test_a_line_a_round_is_the_default_where_nothing_can_be_drawn(quiet, monkeypatch, console, widgets, drawn):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress_module, "find_spec", lambda name: object() if widgets else None)
    monkeypatch.setattr(progress_module, "get_console", lambda: Console(**console))
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **{**quiet, "enable_progress_bar": True})
    assert type(trainer.progress_bar_callback) is (RichRoundBar if drawn else RoundPrinter)
    assert FederatedTrainer(max_rounds=1, num_clients=2, **quiet).progress_bar_callback is None


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress_module, "get_console", lambda: Console(force_terminal=True))
    assert not progress_module.is_terminal()


def test_a_file_has_one_plain_line_a_round_with_its_clients_and_metrics(quiet, capsys):
    run(quiet, RoundPrinter())
    first, second = lines(capsys)
    assert re.fullmatch(
        r"Round 1/2: 3 of 3 trained, 3 of 3 evaluated  \d+\.\d s  train_loss 0\.\d+  clients/val_loss 0\.\d+ "
        r" clients/val_acc 0\.\d+  val_loss 0\.\d+  val_acc [01]\.?\d*",
        first,
    )
    assert second.startswith("Round 2/2: 3 of 3 trained")


def test_a_line_counts_clients_that_failed_out(quiet, capsys):
    run(quiet, RoundPrinter(), FaultTolerance(on_error="ignore"), module=Breaks(), max_rounds=1)
    assert lines(capsys)[0].startswith("Round 1/1: 2 of 3 trained, 3 of 3 evaluated")


def test_a_line_has_the_servers_validation_of_its_own_round_only(quiet, capsys):
    run(quiet, RoundPrinter(), check_val_every_n_epoch=2, max_rounds=3)
    assert [" val_loss" in line for line in lines(capsys)] == [False, True, False]


def test_a_line_shows_so_many_metrics(quiet, capsys):
    run(quiet, RoundPrinter(max_metrics=2), max_rounds=1)
    [line] = lines(capsys)
    assert line.endswith("3 more")
    assert "clients/val_acc" not in line


def test_a_printer_that_is_disabled_prints_nothing(quiet, capsys):
    printer = RoundPrinter()
    printer.disable()
    run(quiet, printer)
    assert not lines(capsys)
    printer.enable()
    run(quiet, printer)
    assert len(lines(capsys)) == 2

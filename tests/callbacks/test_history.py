"""The table of rounds: complete, right, saved with the checkpoint, written and drawn."""

import csv
import io
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, ClientMetrics, FederatedCallback, History, Partition
from lightning_fed.errors import ClientError
from lightning_fed.testing import ToyModule, toy_data


def train() -> DataLoader:
    return DataLoader(toy_data(48), batch_size=8)


def val() -> DataLoader:
    return DataLoader(toy_data(16, seed=1), batch_size=8)


def fit(quiet, *callbacks, rounds=3, module=None, **kwargs):
    callbacks = [Partition(2, val_fraction=0.25), *callbacks]
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=callbacks, **{**quiet, **kwargs})
    trainer.fit(module or ToyModule(), train(), val())
    return trainer


@pytest.fixture
def filled() -> History:
    history = History()
    rows = [
        {"round": 1, "train_loss": 0.75, "clients/val_loss": 0.5},
        {"round": 2, "train_loss": 0.25, "clients/val_loss": 0.5, "val_loss": 0.125, "val_acc": 1.0},
    ]
    history.load_state_dict({"rows": rows, "clients": [], "from_clients": ["clients/val_loss", "train_loss"]})
    return history


def test_row_has_the_clients_training_their_evaluation_and_the_servers_validation(quiet):
    history = History()
    trainer = fit(quiet, history)
    assert [row["round"] for row in history.rows] == [1, 2, 3]
    names = {"train_loss", "clients/val_loss", "clients/val_acc", "val_loss", "val_acc"}
    assert all(set(row) == {"round", *names} for row in history.rows)
    assert history.names == sorted(names)
    for name in names:
        assert history.rows[-1][name] == pytest.approx(float(trainer.callback_metrics[name]))


def test_values_are_those_of_their_own_round(quiet):
    class Watch(FederatedCallback):
        seen: list[float] = []

        def on_validation_end(self, trainer, pl_module):
            self.seen.append(float(trainer.callback_metrics["val_loss"]))

    history, watch = History(), Watch()
    fit(quiet, history, watch)
    assert history["val_loss"] == watch.seen
    assert len(set(watch.seen)) == 3


def test_round_without_validation_has_no_validation_values(quiet):
    history = History()
    fit(quiet, history, rounds=4, check_val_every_n_epoch=2)
    assert [row["round"] for row in history.rows if "val_loss" in row] == [2, 4]
    assert [row["round"] for row in history.rows if "clients/val_loss" in row] == [2, 4]
    assert len(history["train_loss"]) == 4
    assert len(history["val_loss"]) == 2


def test_name_that_clients_logged_in_an_earlier_round_is_not_repeated(quiet):
    class Early(ToyModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_round == 1:
                self.log("early", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    history = History()
    fit(quiet, history, module=Early())
    assert [row["round"] for row in history.rows if "early" in row] == [1]
    assert len(history["val_loss"]) == 3


class Same(ToyModule):
    """Logs one name in training and in validation."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("loss", (self.net(batch[0]) ** 2).mean() + 10)


def unequal(batch_size=8):
    return ClientData([DataLoader(toy_data(n, seed=n), batch_size=batch_size) for n in (5, 40, 11)])


def test_of_a_name_of_training_and_validation_the_later_value_counts_as_in_lightning(quiet):
    class Watch(FederatedCallback):
        def __init__(self):
            self.seen, self.trained = [], []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append(float(trainer.callback_metrics["loss"]))
            self.trained.append(trainer.round_metrics["loss"])

    history, watch = History(), Watch()
    trainer = FederatedTrainer(max_rounds=4, callbacks=[unequal(), history, watch], check_val_every_n_epoch=2, **quiet)
    trainer.fit(Same(), val_dataloaders=val())
    assert history["loss"] == pytest.approx(watch.seen)
    assert [value > 10 for value in history["loss"]] == [False, True, False, True]
    assert history["loss"][::2] == pytest.approx(watch.trained[::2])


def test_curve_of_a_name_of_training_and_validation_is_the_servers(quiet):
    history = History()
    FederatedTrainer(max_rounds=2, callbacks=[unequal(), history], **quiet).fit(Same(), val_dataloaders=val())
    labels = [line.get_label() for axes in history.plot(names=["loss"]).axes for line in axes.get_lines()]
    assert labels == ["loss (server)"]


class TakesColumns(ToyModule):
    """Logs the names of the table's own columns."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        columns = ("round", "client", "stage", "num_examples")
        self.log_dict(dict.fromkeys(columns, 7.0), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("round", 8.0)


def test_own_columns_are_not_overwritten_by_logged_names(quiet, tmp_path):
    def fit_to(rounds, history, **options):
        callbacks = [unequal(), history, ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)]
        trainer = FederatedTrainer(max_rounds=rounds, callbacks=callbacks, **{**quiet, "enable_checkpointing": True})
        trainer.fit(TakesColumns(), val_dataloaders=val(), **options)

    history, resumed = History(per_client=True), History(per_client=True)
    with pytest.warns(UserWarning, match="History does not show the logged 'round', 'stage', 'client', 'num_examples'"):
        fit_to(2, history)
    fit_to(3, resumed, ckpt_path=tmp_path / "last.ckpt")
    assert [row["round"] for row in resumed.rows] == [1, 2, 3]
    assert [(row["round"], row["client"]) for row in resumed.clients] == [(r, c) for r in (1, 2, 3) for c in range(3)]
    assert [row["num_examples"] for row in resumed.clients[:3]] == [5, 40, 11]
    assert {row["stage"] for row in resumed.clients} == {"train"}
    assert "round" not in resumed.names
    assert resumed["num_examples"] == [7.0, 7.0, 7.0]


def test_sanity_check_and_validation_outside_a_fit_add_nothing(quiet):
    history = History()
    trainer = fit(quiet, history, num_sanity_val_steps=2, rounds=2)
    rows = [dict(row) for row in history.rows]
    trainer.validate(ToyModule(), val(), verbose=False)
    assert history.rows == rows
    assert [row["round"] for row in rows] == [1, 2]


@pytest.mark.parametrize("order", ["before", "after"])
def test_what_other_callbacks_add_to_the_round_is_kept_wherever_they_stand(quiet, order):
    history = History()
    callbacks = [history, ClientMetrics()] if order == "before" else [ClientMetrics(), history]
    fit(quiet, *callbacks, rounds=2)
    assert all("train_loss/max" in row for row in history.rows)


def test_clients_own_reports_are_kept_on_request(quiet):
    history = History(per_client=True)
    fit(quiet, history, rounds=2)
    assert [(row["round"], row["stage"], row["client"]) for row in history.clients] == [
        (round, stage, client) for round in (1, 2) for stage in ("train", "evaluate") for client in (0, 1)
    ]
    assert [row["num_examples"] for row in history.clients[:4]] == [18, 18, 6, 6]
    weighted = sum(row["val_loss"] for row in history.clients[2:4]) / 2
    assert history["clients/val_loss"][0] == pytest.approx(weighted, abs=1e-6)
    without = History()
    fit(quiet, without, rounds=1)
    assert without.clients == []


def test_second_fit_of_another_trainer_starts_a_new_table(quiet):
    history = History(per_client=True)
    fit(quiet, history)
    fit(quiet, history, rounds=1)
    assert [row["round"] for row in history.rows] == [1]
    assert len(history.clients) == 4


def test_round_that_failed_leaves_no_rows_behind(quiet):
    class Once(ToyModule):
        def on_train_start(self):
            if self.trainer.current_round == 2 and self.trainer.client_id == 1:
                raise ValueError("once")

    history = History(per_client=True)
    with pytest.raises(ClientError):
        fit(quiet, history, module=Once())
    fit(quiet, history, rounds=1)
    assert [(row["round"], row["client"]) for row in history.clients if row["stage"] == "train"] == [(1, 0), (1, 1)]


def test_resumed_run_has_the_whole_table(quiet, tmp_path):
    def checkpoint():
        return ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    whole = History(per_client=True)
    torch.manual_seed(0)
    module = ToyModule()
    fit(quiet, whole, checkpoint(), module=module, rounds=4, enable_checkpointing=True)
    resumed = History(per_client=True)
    quiet["num_sanity_val_steps"] = 2  # it comes after the state is restored, and is of no round
    trainer = FederatedTrainer(max_rounds=4, callbacks=[Partition(2, val_fraction=0.25), resumed], **quiet)
    trainer.fit(ToyModule(), train(), val(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.rows == whole.rows
    assert resumed.clients == whole.clients


def test_state_is_plain_and_a_copy(filled):
    filled.clients = [{"round": 1, "stage": "train", "client": 0, "num_examples": 3.0}]
    buffer = io.BytesIO()
    torch.save(filled.state_dict(), buffer)
    buffer.seek(0)
    again = History()
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert (again.rows, again.clients) == (filled.rows, filled.clients)
    state = filled.state_dict()
    filled.rows[0]["train_loss"] = 9.0
    assert state["rows"][0]["train_loss"] == 0.75


def test_metric_is_read_by_its_name_over_the_rounds_that_have_it(filled):
    assert filled["train_loss"] == [0.75, 0.25]
    assert filled["val_loss"] == [0.125]
    with pytest.raises(KeyError, match=r"History has no 'acc'; it has \['clients/val_loss', 'train_loss', 'val_acc'"):
        filled["acc"]


def test_csv_has_a_line_a_round_and_gaps_where_nothing_was_logged(filled, tmp_path):
    filled.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["1", "2"]
    assert [row["val_loss"] for row in rows] == ["", "0.125"]
    assert float(rows[1]["train_loss"]) == 0.25


def test_text_is_an_aligned_table(filled):
    lines = str(filled).splitlines()
    assert lines[0].split() == ["round", "clients/val_loss", "train_loss", "val_acc", "val_loss"]
    assert lines[2].split() == ["2", "0.5000", "0.2500", "1", "0.1250"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_diverged_run_can_be_printed_written_and_drawn(value, tmp_path):
    history = History()
    history.rows = [{"round": 1, "train_loss": 1.0}, {"round": 2, "train_loss": value}]
    assert str(value) in str(history)
    history.to_csv(tmp_path / "h.csv")
    history.plot(tmp_path / "h.png")
    assert str(value) in (tmp_path / "h.csv").read_text()


def test_empty_history_can_be_printed_written_and_drawn(tmp_path):
    assert str(History()) == "round"
    History().to_csv(tmp_path / "h.csv")
    History().plot(tmp_path / "h.png")
    assert (tmp_path / "h.csv").read_text().strip() == "round"


def test_plot_has_a_panel_a_quantity_and_a_curve_a_metric(filled, tmp_path):
    path = tmp_path / "history.png"
    figure = filled.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert set(panels) == {"accuracy", "loss"}
    curves = {line.get_label(): line.get_xydata().tolist() for line in panels["loss"].get_lines()}
    assert curves == {
        "train_loss (over clients)": [[1, 0.75], [2, 0.25]],
        "clients/val_loss (over clients)": [[1, 0.5], [2, 0.5]],
        "val_loss (server)": [[2, 0.125]],
    }


@pytest.mark.parametrize("names", [["val_acc"], "val_acc"])
def test_plot_draws_the_names_that_are_asked_for(filled, names):
    figure = filled.plot(names=names)
    assert [line.get_label() for axes in figure.axes for line in axes.get_lines()] == ["val_acc (server)"]


def test_plot_refuses_a_name_that_there_is_not(filled):
    with pytest.raises(KeyError, match="History has no 'acc'"):
        filled.plot(names=["acc"])

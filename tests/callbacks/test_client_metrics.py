"""The spread of metrics over clients, logged like any other metric."""

import math
from itertools import permutations

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientMetrics, ClientReport, FaultTolerance, History, Partition
from lightning_fed.errors import ClientError
from lightning_fed.testing import ToyModule, toy_data


def told(callback: ClientMetrics, **stages: dict[int, float]) -> dict[str, float]:
    """What a round adds in which the clients report these losses."""
    for stage, losses in stages.items():
        for client, loss in losses.items():
            callback.on_client_end(None, 1, stage, ClientReport(client, 3, {"loss": loss}))
    metrics: dict[str, float] = {}
    callback.on_round_end(None, 1, metrics)
    return metrics


def test_least_and_greatest_of_each_stage_under_its_own_name():
    metrics = told(ClientMetrics(), train={0: 2.0, 3: 5.0, 1: -1.0}, evaluate={0: 7.0, 1: 6.0})
    assert metrics == {
        "loss/min": -1.0,
        "loss/max": 5.0,
        "clients/loss/min": 6.0,
        "clients/loss/max": 7.0,
    }


def test_every_clients_value_on_request_and_without_the_spread():
    metrics = told(ClientMetrics(spread=False, per_client=True), train={3: 5.0, 0: 2.0}, evaluate={0: 7.0})
    assert metrics == {"loss/client_0": 2.0, "loss/client_3": 5.0, "clients/loss/client_0": 7.0}


def test_round_knows_nothing_of_the_round_before():
    callback = ClientMetrics(per_client=True)
    told(callback, train={0: 2.0, 1: 3.0})
    assert told(callback, train={1: 4.0}) == {"loss/min": 4.0, "loss/max": 4.0, "loss/client_1": 4.0}


NAN = float("nan")


@pytest.mark.parametrize("order", list(permutations([(0, 2.0), (1, NAN), (2, 5.0)])))
def test_client_without_a_number_has_no_part_in_the_spread_whatever_the_order(order):
    metrics = told(ClientMetrics(per_client=True), train=dict(order))
    assert (metrics["loss/min"], metrics["loss/max"]) == (2.0, 5.0)
    assert math.isnan(metrics["loss/client_1"])


def test_spread_of_clients_that_all_have_no_number_is_none_either():
    metrics = told(ClientMetrics(), train={0: NAN, 1: NAN})
    assert all(math.isnan(metrics[name]) for name in ("loss/min", "loss/max"))


def loader() -> DataLoader:
    return DataLoader(toy_data(48), batch_size=8)


def test_spread_is_that_of_the_clients_and_can_be_monitored(quiet):
    history = History(per_client=True)
    stopping = EarlyStopping("clients/val_loss/max", patience=100, check_on_train_epoch_end=True)
    callbacks = [Partition(3, val_fraction=0.25), ClientMetrics(per_client=True), history, stopping]
    trainer = FederatedTrainer(max_rounds=2, callbacks=callbacks, **quiet)
    trainer.fit(ToyModule(), loader())
    losses = [row["val_loss"] for row in history.clients if (row["round"], row["stage"]) == (2, "evaluate")]
    assert float(trainer.callback_metrics["clients/val_loss/max"]) == pytest.approx(max(losses))
    assert float(trainer.callback_metrics["clients/val_loss/min"]) == pytest.approx(min(losses))
    assert [history[f"clients/val_loss/client_{k}"][1] for k in range(3)] == losses
    assert stopping.best_score.item() <= max(losses) + 1e-6


def test_fit_after_one_that_broke_off_in_a_round_does_not_see_its_clients(quiet):
    class Breaks(ToyModule):
        broken = True

        def on_train_start(self):
            if self.broken and self.trainer.client_id == 2:
                raise ValueError("no")

    module, history = Breaks(), History()
    metrics = ClientMetrics(spread=False, per_client=True)
    with pytest.raises(ClientError):
        FederatedTrainer(max_rounds=1, num_clients=3, callbacks=[metrics], **quiet).fit(module, loader())
    module.broken = False
    trainer = FederatedTrainer(max_rounds=1, num_clients=1, callbacks=[metrics, history], **quiet)
    trainer.fit(module, loader())
    assert [name for name in history.names if "client_" in name] == ["train_loss/client_0"]


def test_failed_client_has_no_value(quiet):
    class Breaks(ToyModule):
        def on_train_start(self):
            if self.trainer.client_id == 1:
                raise ValueError("no")

    history = History()
    callbacks = [ClientMetrics(per_client=True), history, FaultTolerance(on_error="ignore")]
    FederatedTrainer(max_rounds=1, num_clients=3, callbacks=callbacks, **quiet).fit(Breaks(), loader())
    assert [n for n in history.names if "client_" in n] == ["train_loss/client_0", "train_loss/client_2"]

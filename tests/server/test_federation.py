"""What a fit says of itself at its start."""

import pytest
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import Krum
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FedAdam, FederatedCallback, FedProx, FlowerStrategy, PartialParticipation, Partition
from lightning_fed.server.summary import where_results_go
from lightning_fed.testing import ToyModule, toy_data


class Clipping(FederatedCallback):
    def client_mods(self, stage):
        return [fixedclipping_mod] if stage == "never" else []


@pytest.mark.parametrize(
    ("callbacks", "max_rounds", "expected"),
    [
        (
            [Partition(4, val_fraction=0.25), PartialParticipation(fraction_train=0.5), FedProx(0.1), FedAdam()],
            2,
            "clients     4 with 9 / 9 / 9 training examples (min / median / max)\n"
            "  each round  2 train, 4 evaluate; rounds: 2\n"
            "  method      FedProx + FedAdam\n",
        ),
        (
            [Partition(4), FlowerStrategy(Krum(num_malicious_nodes=1)), Clipping()],
            1,
            "clients     4 with 12 / 12 / 12 training examples (min / median / max)\n"
            "  each round  4 train; rounds: 1\n"
            "  method      FlowerStrategy(Krum) + Clipping\n",
        ),
    ],
)
def test_summary_tells_who_takes_part_and_by_which_method(quiet, monkeypatch, callbacks, max_rounds, expected):
    said = []
    monkeypatch.setattr("lightning_fed.server.session.rank_zero_info", said.append)
    trainer = FederatedTrainer(max_rounds=max_rounds, callbacks=callbacks, seed=5, **quiet)
    trainer.fit(ToyModule(), DataLoader(toy_data(48), batch_size=8), DataLoader(toy_data(16), batch_size=8))
    assert said == [f"Federation\n  {expected}  engine      in_process on cpu, seed 5"]


def test_where_results_go_is_told_with_whole_paths(quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "desk")
    nothing = FederatedTrainer(max_rounds=1, num_clients=2, **quiet)
    assert where_results_go(nothing) == "Results on desk: none are saved, for there is no logger and no checkpoint."
    given = {**quiet, "logger": CSVLogger("runs"), "enable_checkpointing": True}
    callbacks = [
        ModelCheckpoint("kept"),
        ModelCheckpoint("kept", monitor="val_loss"),
        ModelCheckpoint("memory://kept", every_n_epochs=2),
    ]
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, callbacks=callbacks, **given)
    assert where_results_go(trainer) == (
        f"Results on desk: logs in {tmp_path}/runs/lightning_logs/version_0 and checkpoints in {tmp_path}/kept and"
        " checkpoints in memory://kept."
    )


def test_there_are_no_rounds_outside_of_a_fit(quiet):
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **quiet)
    trainer.fit(ToyModule(), DataLoader(toy_data(8)))
    with pytest.raises(RuntimeError, match=r"rounds run within FederatedTrainer\.fit"):
        trainer.run_round()
    with trainer.federation.saving("path"):
        assert trainer.federation.state_dict()["num_clients"] == 2

"""Sites whose scripts say otherwise than the server's: the server's word holds, or the site is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData
from lightning_fed.site.resident import Site
from tests.deployment.federation import CLIENTS, Net, data
from tests.engines.link import Link, Linked
from tests.helpers import QUIET


class Scheduled(Net):
    """A schedule over the whole run, of whose length a client knows by its trainer."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def module() -> Scheduled:
    torch.manual_seed(0)
    return Scheduled()


def trainer(engine: Any = "in_process", max_rounds: int = 3, callbacks: Any = (), **options: Any) -> FederatedTrainer:
    given = {"max_rounds": max_rounds, "seed": 3, **QUIET, **options}
    return FederatedTrainer(engine=engine, callbacks=[ClientData(data, num_clients=CLIENTS), *callbacks], **given)


def weights(engine: Any, **options: Any) -> dict[str, torch.Tensor]:
    model = module()
    trainer(engine, **options).fit(model)
    return dict(model.state_dict())


@pytest.fixture
def link_to(tmp_path, monkeypatch):
    """A SuperLink that sites of another script have joined."""

    def link_to(**options: Any) -> Link:
        sites: list[Site] = []
        monkeypatch.setattr(Site, "serve", lambda site: sites.append(site))
        for client in range(CLIENTS):
            where = {"insecure": True, "state_dir": Path(tmp_path) / str(client)}
            trainer(**options).join("127.0.0.1:1", module(), *data(client), client=client, **where)

        def at(client: int) -> Any:
            return lambda message: sites[client]._answers.to(message, 11 + client)

        return Link({11 + client: at(client) for client in range(CLIENTS)})

    return link_to


@pytest.mark.parametrize(
    "rounds", [{"max_rounds": 5}, {"max_rounds": 1}, {"max_rounds": -1, "max_time": "00:01:00:00"}]
)
def test_the_servers_number_of_rounds_holds_at_the_sites(link_to, rounds):
    torch.testing.assert_close(weights(Linked(link_to(**rounds))), weights("in_process"), rtol=0, atol=0)

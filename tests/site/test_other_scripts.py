"""Sites whose scripts say otherwise than the server's: the server's word holds, or the site is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import ClientData, FedAdam, FedProx, FlowerStrategy, History
from lightning_fed.site.resident import Site
from tests.deployment.federation import CLIENTS, Net, data
from tests.engines.link import Link, Linked
from tests.helpers import QUIET


def mod(message: Any, context: Any, call_next: Any) -> Any:
    return call_next(message, context)


class Noise(Callback):
    """A client callback."""

    def __init__(self, size: float = 0.1, path: str = ""):
        self.size, self._path = size, path


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


def even(round: int) -> int:
    return 2 - round % 2


# Argument -> what the server's script has, what the sites' have, what is said.
OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "local_epochs": ({}, {"local_epochs": 3}, "local_epochs is 1 at the server and 3 at the site"),
    "local_epochs, a list": (
        {"local_epochs": [1, 2, 2]},
        {"local_epochs": [1, 2, 1]},
        r"local_epochs is \[1, 2\] at the server and \[1, 2, 1\] at the site",
    ),
    "local_epochs, a function of more rounds than the site's script has": (
        {"local_epochs": even},
        {"local_epochs": even, "max_rounds": 2},
        r"local_epochs is \[1, 2, 1\] at the server and \[1, 2\] at the site",
    ),
    "local_steps": ({"local_steps": 2}, {"local_steps": 3}, "local_steps is 2 at the server and 3 at the site"),
    "client_state": ({}, {"client_state": "carry"}, "client_state is 'global' at the server and 'carry' at the site"),
    "local_validation": (
        {},
        {"local_validation": True},
        "local_validation is False at the server and True at the site",
    ),
    "gradient_clip_val": (
        {"gradient_clip_val": 1},
        {"gradient_clip_val": 0.5},
        r"gradient_clip_val is 1\.0 at the server and 0\.5 at the site",
    ),
    "gradient_clip_algorithm": (
        {"gradient_clip_val": 1.0},
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
        "gradient_clip_algorithm is 'norm' at the server and 'value' at the site",
    ),
    "accumulate_grad_batches": ({}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches is 1 .* and 2 at"),
    "limit_train_batches": ({}, {"limit_train_batches": 1}, r"limit_train_batches is 1\.0 at the server and 1 at"),
    "overfit_batches": ({}, {"overfit_batches": 1}, r"overfit_batches is 0\.0 at the server and 1 at the site"),
    "a client callback": (
        {},
        {"client_callbacks": Noise()},
        r"client_callbacks is \[\] at the server and \[Noise\(size=0\.1\)\] at",
    ),
    "a number of a client callback": (
        {"client_callbacks": Noise(0.2)},
        {"client_callbacks": Noise(0.1)},
        r"client_callbacks is \[Noise\(size=0\.2\)\] at the server and \[Noise\(size=0\.1\)\] at the site",
    ),
    "a method": (
        {"callbacks": [FedProx(0.1)]},
        {},
        r"callbacks with a part in local training is \[FedProx\(mu=0\.1\)\] at the server and \[\] at the site",
    ),
    "a method's strength": ({"callbacks": [FedProx(0.1)]}, {"callbacks": [FedProx(1)]}, r"mu=0\.1.* and .*mu=1\)"),
    "client mods": ({}, {"callbacks": [FlowerStrategy(FedAvg(), mods=[mod])]}, r"mods is \[\] .* and \[mod\] at"),
}


@pytest.mark.parametrize(("server", "site", "said"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_site_that_would_train_otherwise_is_refused_before_anything_is_trained(link_to, server, site, said):
    link = link_to(**site)
    with pytest.raises(ConfigurationError, match=rf"client 0 would train otherwise than the server's script.*{said}"):
        weights(Linked(link), **server)
    assert {message.metadata.message_type for message in link.sent} == {"query"}


ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "what changes nothing of local training": (
        {"callbacks": [FedAdam(), History()], "precision": "32-true", "timeout": 99.0},
        {"max_rounds": 7, "detect_anomaly": True, "max_examples": 1e6},
    ),
    "the same in other words": (
        {"local_epochs": [1, 1], "gradient_clip_val": 1, "overfit_batches": 0, "callbacks": [FedProx(1.0)]},
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm", "limit_train_batches": 1.0}
        | {"callbacks": [FedProx(1)]},
    ),
    "a function, over the server's rounds": ({"local_epochs": even}, {"local_epochs": even, "max_rounds": 5}),
    "a path of a callback": ({"client_callbacks": Noise(path="/a")}, {"client_callbacks": Noise(path="/b")}),
    "what there is no number of": (
        {"client_callbacks": GradientAccumulationScheduler({0: 2})},
        {"client_callbacks": GradientAccumulationScheduler({0: 2})},
    ),
}


@pytest.mark.parametrize(("server", "site"), ALIKE.values(), ids=ALIKE)
def test_a_site_that_trains_the_same_takes_part(link_to, server, site):
    ended = weights(Linked(link_to(**site)), **server)
    torch.testing.assert_close(ended, weights("in_process", **server), rtol=0, atol=0)

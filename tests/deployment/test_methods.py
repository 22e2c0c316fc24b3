"""Methods with tensors and memory over a SuperLink: what they keep is at the sites."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import APFL, ClientData, FedDyn, FederatedCallback, FedNova, Moon, Scaffold
from lightning_fed.engines import SuperLink
from tests.callbacks.rounds import EPOCHS, ROUNDS, SIZES, Chosen, assert_equal, encoded, loaders, momentum
from tests.deployment.processes import free_port
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier

pytestmark = [pytest.mark.landing, pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")]

METHODS: dict[str, Any] = {
    "Scaffold": Scaffold,
    "APFL": APFL,
    "Scaffold, option I": lambda: Scaffold(option="I"),
    "FedNova": FedNova,
    "FedDyn": FedDyn,
    "Moon": lambda: Moon(representation="net.encoder"),
}


def trainer(method: FederatedCallback, **how: Any) -> FederatedTrainer:
    callbacks = [ClientData(loaders()), Chosen(), method]
    return FederatedTrainer(max_rounds=ROUNDS, local_epochs=EPOCHS, callbacks=callbacks, **how, **QUIET)


def module() -> Classifier:
    return Classifier(encoded(batch_norm=True), momentum)


def site(name: str, client: int, port: int, root: str) -> None:
    here = trainer(METHODS[name](), default_root_dir=root)
    here.join(f"127.0.0.1:{port}", module(), client=client, insecure=True)


@pytest.fixture
def sites(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A method's name, and the port at which a site for each client looks for a SuperLink."""
    port, fork = free_port(), multiprocessing.get_context("fork")
    each = [
        fork.Process(target=site, args=(request.param, client, port, str(tmp_path / f"site-{client}")))
        for client in range(len(SIZES))
    ]
    for one in each:
        one.start()
    yield request.param, port
    for one in each:
        one.terminate()
    for one in each:
        one.join()


@pytest.mark.parametrize("sites", METHODS, indirect=True)
def test_over_a_superlink_it_is_the_same_bit_for_bit(sites: tuple[str, int]) -> None:
    name, port = sites
    far, near = module(), module()
    trainer(METHODS[name](), engine=SuperLink.local(port, connect_timeout=90)).fit(far)
    trainer(METHODS[name]()).fit(near)
    assert_equal(far.net.state_dict(), near.net.state_dict())
    assert all(torch.isfinite(tensor).all() for tensor in near.net.state_dict().values())

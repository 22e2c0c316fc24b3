"""A deadline over a SuperLink: who has not replied by then is late, and the round is the others'."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, Deadline, DeviceSpeed, FedBuff, History, OverSelection, Participation
from lightning_fed.engines import SuperLink
from lightning_fed.errors import ConfigurationError, RoundError
from tests.callbacks.rounds import EPOCHS, SIZES, assert_equal, encoded, loaders, momentum
from tests.deployment.processes import free_port
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier

pytestmark = [pytest.mark.landing, pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")]

SECONDS = 10  # more than any of these fits takes


class Sleeps(Classifier):
    """At client 2 in the first round, into the second."""

    def on_train_start(self) -> None:
        if (self.trainer.client_id, self.trainer.current_round) == (2, 1):
            time.sleep(SECONDS + 3)


def trainer(*callbacks: Any, rounds: int = 2, **how: Any) -> FederatedTrainer:
    arguments = {"local_epochs": EPOCHS, "client_state": "carry", "seed": 1, **QUIET, **how}
    return FederatedTrainer(max_rounds=rounds, callbacks=[ClientData(loaders()), *callbacks], **arguments)


def site(client: int, port: int, root: str) -> None:
    here = trainer(default_root_dir=root)  # which need not know of the deadline
    here.join(f"127.0.0.1:{port}", Sleeps(encoded(batch_norm=True), momentum), client=client, insecure=True)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where a site for each client looks for a SuperLink."""
    port, fork, folder = free_port(), multiprocessing.get_context("fork"), tmp_path_factory.mktemp("sites")
    each = [
        fork.Process(target=site, args=(client, port, str(folder / f"site-{client}"))) for client in range(len(SIZES))
    ]
    for one in each:
        one.start()
    yield port
    for one in each:
        one.terminate()
    for one in each:
        one.join()


def link(port: int) -> SuperLink:
    return SuperLink.local(port, connect_timeout=90)


@pytest.mark.parametrize(
    "method", [lambda: [DeviceSpeed(1.0), FedBuff(2, 2)], lambda: [DeviceSpeed(1.0), OverSelection(0.5)]]
)
def test_what_goes_by_a_virtual_clock_is_refused(port: int, method: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"goes by a virtual clock, and clients of a network.*Deadline\(sec"):
        trainer(*method(), Deadline(SECONDS), engine=link(port)).fit(Classifier(encoded(batch_norm=True), momentum))


def test_the_round_is_that_of_those_who_are_in_time(port: int, tmp_path: Path) -> None:
    far, near, history, deadline = (
        *(Classifier(encoded(batch_norm=True), momentum) for _ in "ab"),
        History(),
        Deadline(SECONDS),
    )
    begin = time.monotonic()
    trainer(deadline, history, engine=link(port)).fit(far)
    assert time.monotonic() - begin > SECONDS + 3
    # The site is late with the first round's work, and then does the second's, with what it kept before either.
    trainer(Participation(lambda round, clients, generator: [0, 1, 3] if round == 1 else clients)).fit(near)
    assert_equal(far.net.state_dict(), near.net.state_dict())
    assert history["late/clients"] == [1, 0]
    assert deadline.late == {}
    with pytest.raises(RoundError, match=r"Round 1: 3 of 4 clients replied within Deadline\(10\), and 4 have to"):
        trainer(Deadline(SECONDS, min_clients=4), engine=link(port)).fit(near)

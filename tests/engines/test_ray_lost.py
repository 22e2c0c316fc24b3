"""The Ray engine on a cluster of two machines, of which one is lost in a round."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_fed.engines import Ray
from tests.engines.clients import client_that, train_messages

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:.*starts that many processes")]


@pytest.fixture
def second_raylet(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A cluster whose machines are processes of this one; gives the second's."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    handler = signal.getsignal(signal.SIGTERM)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    signal.signal(signal.SIGTERM, handler)  # Ray's own would stay for all later tests
    yield second.all_processes["raylet"][0].process.pid
    ray.shutdown()
    cluster.shutdown()


def test_a_machine_that_is_lost_costs_the_client_that_it_worked_for(second_raylet: int) -> None:
    def act(client: int) -> None:
        time.sleep(0.2)
        if os.getppid() == second_raylet and client >= 2:
            os.kill(second_raylet, signal.SIGKILL)
            time.sleep(60)

    def main(grid: Any) -> Any:
        started = [reply.has_error() for reply in grid.send_and_receive(train_messages(grid, [1, 2]))]
        start = time.monotonic()
        replies = list(grid.send_and_receive(train_messages(grid)))
        return started, replies, time.monotonic() - start

    started, replies, seconds = Ray(num_workers=2).run(main, client_that(act), lambda: 10)
    assert started == [False, False]
    assert [reply.metadata.src_node_id for reply in replies] == list(range(1, 11))
    [lost] = [reply for reply in replies if reply.has_error()]
    assert "was lost: its Ray actor ended (ActorDiedError" in lost.error.reason
    assert seconds < 60  # Ray itself takes about 13 to notice

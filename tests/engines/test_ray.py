"""The Ray engine: the conformance cases, the runs of one process bit for bit, what happens when actors die."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, History
from lightning_fed.engines import Ray
from lightning_fed.testing import ENGINE_CASES, ToyModule, counting_client, toy_data
from tests.engines.clients import Deadly, KeywordOnly, Otherwise, Picky, client_that, die, fit, train_messages
from tests.helpers import QUIET
from tests.integration import modules
from tests.integration.callbacks.stateful import Freeze, Scales
from tests.integration.checkpointing.resume_script import run, stopped_run
from tests.integration.modules import MODULES, assert_same, trained

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:.*starts that many processes")]


def listening() -> set[str]:
    """The addresses that processes of this machine listen on, beyond loopback."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A" and "0100007F:" not in local and not local.startswith("00000000000000000000000001000000"):
                found.add(local)
    return found


@pytest.fixture(scope="module", autouse=True)
def first_its_own():
    """The first Ray is the engine's own, which nobody outside can reach."""
    handler, before = signal.getsignal(signal.SIGTERM), listening()
    assert Ray(num_workers=1).run(lambda grid: listening(), counting_client(), lambda: 1) == before
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.fixture(scope="module", autouse=True)
def then_one_for_all(first_its_own, one_ray):
    pass


def send(grid: Any) -> Any:
    return list(grid.send_and_receive(train_messages(grid)))


@pytest.mark.parametrize("case", ENGINE_CASES, ids=lambda case: case.__name__)
def test_engine_conforms(case):
    case(Ray(num_workers=1))


def test_an_actor_that_dies_takes_one_client_with_it_and_is_replaced():
    app = client_that(lambda client: die() if client == 1 else None)

    def main(grid: Any) -> Any:
        return [[r.has_error() for r in grid.send_and_receive(train_messages(grid))] for _ in range(2)]

    assert Ray(num_workers=2).run(main, app, lambda: 4) == [[False, True, False, False]] * 2


def test_replies_come_in_the_order_of_the_messages_and_late_ones_are_left_out():
    app = client_that(lambda client: time.sleep({0: 1, 1: 120}.get(client, 0)))

    def main(grid: Any) -> Any:
        def who(clients: list[int], timeout: float) -> list[int]:
            return [
                r.metadata.src_node_id for r in grid.send_and_receive(train_messages(grid, clients), timeout=timeout)
            ]

        return who([3, 1, 4], 60), who([3, 2, 4], 15), who([3, 1], 60)

    assert Ray(num_workers=2).run(main, app, lambda: 4) == ([3, 1, 4], [3, 4], [3, 1])


def test_a_client_that_hangs_does_not_take_those_behind_it_along(tmp_path):
    def act(client: int) -> None:
        (tmp_path / str(client)).touch()
        while client in (0, 2) and not all((tmp_path / other).exists() for other in "02"):
            time.sleep(0.05)
        time.sleep(120 if client == 1 else 0)

    def main(grid: Any) -> Any:
        list(grid.send_and_receive(train_messages(grid, [1, 3])))  # clients 0 and 2 wait for one another: two actors
        start = time.monotonic()
        who = [r.metadata.src_node_id for r in grid.send_and_receive(train_messages(grid), timeout=12)]
        return who, time.monotonic() - start

    who, seconds = Ray(num_workers=2).run(main, client_that(act), lambda: 20)
    assert who == [1, *range(3, 21)]
    assert 11.9 < seconds < 40


@pytest.mark.parametrize("error", [KeywordOnly, Otherwise])
def test_an_exception_that_does_not_survive_the_way_is_told_as_text(error):
    module = Picky()
    module.error = error
    said = rf"(?s)Round 2, train: client 1 raised \S*{error.__name__}: code 7\nThe client's traceback:.*on_train_start"
    with pytest.raises(ClientError, match=said) as caught:
        fit(module, engine="ray", num_workers=1)
    assert caught.value.__cause__ is None


def test_what_cannot_start_or_be_sent_or_has_no_room_is_an_error():
    lock = threading.Lock()
    with pytest.raises(ConfigurationError, match=r"engine='ray'.*cannot be pickled: TypeError: cannot pickle '_thread"):
        Ray(num_workers=1).run(send, client_that(lambda k: lock), lambda: 1)
    greedy = Ray(client_resources={"num_gpus": 1})
    with pytest.raises(
        ConfigurationError, match=r"asks Ray for \{'CPU': 1, 'GPU': 1\}, and the cluster has \{'CPU': 2"
    ):
        greedy.run(send, counting_client(), lambda: 1)
    with pytest.raises(ConfigurationError, match=r"Ray\(num_workers=0\) must be at least 1"):
        Ray(num_workers=0)


def test_a_user_s_exception_comes_with_its_traceback():
    class Raising(ToyModule):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError("in the user's code")

    with pytest.raises(ClientError, match=r"(?s)client 0 raised ZeroDivisionError: in the user's code.*training_step"):
        fit(Raising(), engine="ray", num_workers=1)


def test_a_dead_actor_is_a_failure_that_fault_tolerance_allows_for():
    history = History(per_client=True)
    with pytest.warns(UserWarning, match=r"client 2 was lost: its Ray actor ended \(ActorDiedError"):
        fit(Deadly(), FaultTolerance(min_results=3), history, engine="ray")
    who = [[row["client"] for row in history.clients if row["round"] == round] for round in (1, 2, 3)]
    assert who == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]


# Each run starts an actor, which imports Lightning.
FEW = ("GAN", "dropout", "bf16", "closure", "metric objects")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in MODULES])
def test_ray_trains_a_module_as_one_process_does(name):
    assert_same(trained(MODULES[name], engine=Ray(num_workers=1)), trained(MODULES[name]))


def test_client_callbacks_on_ray_hold_the_module_s_own_layers_and_keep_their_state():
    def trained_with_callbacks(engine: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = ToyModule()
        held = [Freeze(module.net[0]), Scales()]
        loaders = [DataLoader(toy_data(16), 8)] * 2
        options = {"max_rounds": 3, "callbacks": [ClientData(loaders)], "client_callbacks": held, "engine": engine}
        FederatedTrainer(**options, **QUIET).fit(module)
        return {name: value.clone() for name, value in module.state_dict().items()}

    expected = trained_with_callbacks("in_process")
    torch.testing.assert_close(trained_with_callbacks(Ray(num_workers=1)), expected, rtol=0, atol=0)


def test_the_same_run_on_another_number_of_actors_is_the_same():
    assert_same(*(trained(modules.Dropping, engine="ray", num_workers=n) for n in (1, 2)))


def test_a_run_on_ray_goes_on_as_if_never_interrupted(tmp_path):
    expected, expected_history, _ = run(tmp_path / "whole")
    stopped_run(tmp_path / "stopped", "client trained", engine=Ray(num_workers=2))
    module, history, _ = run(tmp_path / "stopped", ckpt_path="last", engine=Ray(num_workers=2))
    torch.testing.assert_close(dict(module.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    assert history.rows == expected_history.rows

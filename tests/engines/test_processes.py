"""The process engine: the conformance cases, what happens when workers die, nothing left behind."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer, RoundError
from lightning_fed.callbacks import FaultTolerance, FederatedCallback, History
from lightning_fed.engines import Processes, pool
from lightning_fed.engines.pool import start_method
from lightning_fed.testing import ENGINE_CASES, ToyModule, counting_client, send, toy_data
from lightning_fed.wire.messages import CLIENT
from tests.engines.clients import Deadly, KeywordOnly, Otherwise, Picky, client_that, die, fit, train_messages
from tests.helpers import QUIET, sweep

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*starts that many processes"),
]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left():
    before = descriptors()
    yield
    assert multiprocessing.active_children() == []
    # The first run on a forkserver keeps its two connections to it.
    assert descriptors() <= before + 2


def forked(workers=2):
    """An engine whose workers are there at once; from a process with threads, as a test runner's is, they would not."""
    return Processes(workers, start_method="fork")


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("case", ENGINE_CASES, ids=lambda case: case.__name__)
def test_engine_conforms(case, method):
    case(Processes(num_workers=2, start_method=method))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_worker_that_dies_takes_one_client_with_it_and_is_replaced(method):
    app = client_that(lambda client: die() if client == 1 else None)
    engine = Processes(num_workers=2, start_method=method)

    def main(grid):
        return [send(grid) for _ in range(3)]

    for replies in engine.run(main, app, lambda: 6):
        assert [reply.has_error() for reply in replies] == [False, True, False, False, False, False]
        assert "was lost: its worker process was ended by SIGKILL" in replies[1].error.reason


def test_who_does_not_reply_in_time_is_left_out_and_the_next_round_is_whole():
    app = client_that(lambda client: time.sleep(60 if client == 1 else 0))

    def main(grid):
        late = [r.metadata.src_node_id for r in grid.send_and_receive(train_messages(grid), timeout=2)]
        whole = [r.metadata.src_node_id for r in grid.send_and_receive(train_messages(grid, [1, 3]), timeout=10)]
        return late, whole

    assert forked().run(main, app, lambda: 3) == ([1, 3], [1, 3])


@pytest.mark.parametrize("workers", sweep([1, 2], [2]))
def test_a_client_that_hangs_does_not_take_those_behind_it_along(workers):
    app = client_that(lambda client: time.sleep(60 if client == 1 else 0))

    def main(grid):
        start = time.monotonic()
        who = [r.metadata.src_node_id for r in grid.send_and_receive(train_messages(grid), timeout=2)]
        return who, time.monotonic() - start

    who, seconds = forked(workers).run(main, app, lambda: 20)
    # With one worker, who sits behind it has no other to go to.
    assert who == ([1] if workers == 1 else [1, *range(3, 21)])
    assert 1.9 < seconds < 10


def test_the_round_after_one_in_which_all_hang_has_all_workers(tmp_path):
    hangs = tmp_path / "hangs"
    hangs.touch()

    def act(client):
        if hangs.exists():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        (tmp_path / f"at work {client}").touch()
        until = time.monotonic() + 20
        while len(list(tmp_path.glob("at work *"))) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)

    def main(grid):
        nobody = list(grid.send_and_receive(train_messages(grid), timeout=0.5))
        hangs.unlink()
        return nobody, [reply.has_error() for reply in grid.send_and_receive(train_messages(grid), timeout=30)]

    engine = Processes(num_workers=2, start_method="fork")
    assert engine.run(main, client_that(act), lambda: 2) == ([], [False, False])


def test_a_worker_that_was_stopped_does_not_stop_the_run(monkeypatch):
    """What it is sent is more than the connection holds."""
    monkeypatch.setattr(pool, "STANDSTILL", 0.5)

    def large(grid):
        for message in train_messages(grid):
            message.content["config"]["much"] = bytes(2**22)
            yield message

    def main(grid):
        list(grid.send_and_receive(train_messages(grid)))
        first = min(child.pid for child in multiprocessing.active_children())
        os.kill(first, signal.SIGSTOP)
        return [[reply.has_error() for reply in grid.send_and_receive(large(grid), timeout=30)] for _ in range(2)]

    engine = Processes(num_workers=2, start_method="fork")
    assert engine.run(main, counting_client(), lambda: 4) == [[False] * 4] * 2


def test_a_reply_that_cannot_be_read_is_that_clients_failure():
    app, counting = ClientApp(), counting_client()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = counting(message, context)
        if int(context.node_config[CLIENT]) == 1:
            reply.metadata.__dict__["bomb"] = Bomb()
        return reply

    replies = forked().run(send, app, lambda: 4)
    assert [reply.has_error() for reply in replies] == [False, True, False, False]
    assert "sent what cannot be read: RuntimeError: it does not come back" in replies[1].error.reason


class Bomb:
    def __reduce__(self):
        return _explode, ()


@pytest.mark.parametrize("timeout", sweep([None, float("inf")], [None]))
def test_a_timeout_without_end_waits_for_all(timeout):
    app = client_that(lambda client: time.sleep(0.3 if client == 0 else 0))

    def main(grid):
        return [r.metadata.src_node_id for r in grid.send_and_receive(train_messages(grid), timeout=timeout)]

    assert forked().run(main, app, lambda: 3) == [1, 2, 3]


def test_leaving_an_exchange_early_ends_the_work_on_it():
    app = client_that(lambda client: time.sleep(60 if client else 0))

    def main(grid):
        for reply in grid.send_and_receive(train_messages(grid)):
            return reply.metadata.src_node_id

    assert forked().run(main, app, lambda: 3) == 1


def test_workers_that_cannot_start_are_an_error_with_their_traceback():
    bomb = Bomb()
    app = client_that(lambda client: bomb)
    with pytest.raises(
        ConfigurationError, match=r"(?s)worker process cannot start:.*RuntimeError: it does not come back"
    ):
        Processes(start_method="forkserver").run(send, app, lambda: 2)


def _explode():
    raise RuntimeError("it does not come back")


def test_what_cannot_be_pickled_is_named_with_the_way_out():
    lock = threading.Lock()
    app = client_that(lambda client: lock)
    with pytest.raises(ConfigurationError, match=r"cannot be pickled: TypeError: cannot pickle '_thread.lock' object"):
        Processes(start_method="forkserver").run(send, app, lambda: 2)
    # A fork has it all.
    assert len(Processes(start_method="fork").run(send, app, lambda: 2)) == 2


def test_which_attribute_cannot_be_pickled_is_said():
    module = ToyModule()
    module.guard = threading.Lock()
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, engine=Processes(start_method="forkserver"), **QUIET)
    with pytest.raises(ConfigurationError, match=r"module.guard cannot be pickled: .*start_method='fork'"):
        trainer.fit(module, DataLoader(toy_data(16), 8))


def test_workers_are_forked_only_where_that_is_safe():
    assert start_method("forkserver", 1) == "forkserver"
    assert start_method(None, 2) == "forkserver"
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    try:
        assert start_method(None, 1) == "forkserver"
    finally:
        waiting.set()
        thread.join()


@pytest.mark.parametrize("arguments", [{"num_workers": 0}, {"threads": 0}])
def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(ConfigurationError, match=r"Processes\(\w+=0\) must be at least 1"):
        Processes(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": 2}, "num_workers=2 is for engine='processes' and engine='ray'"),
        ({"engine": "processes", "num_workers": 0}, "num_workers=0 must be at least 1"),
        ({"engine": Processes(), "clients_per_device": 2}, "clients_per_device=2 is for engine='processes'"),
        ({"engine": "threads"}, r"engine='threads' is unknown: write one of \['in_process', 'processes', 'ray'\]"),
    ],
)
def test_arguments_that_do_not_go_with_the_engine_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        FederatedTrainer(max_rounds=1, num_clients=2, **arguments)


# ------------------------------------------------------------------------------------------------------ whole fits


def test_loaders_may_have_worker_processes_of_their_own():
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, engine="processes", num_workers=2, **QUIET)
    trainer.fit(ToyModule(), DataLoader(toy_data(16), batch_size=8, num_workers=1))
    assert trainer.global_step == 1


def test_a_dead_worker_stops_the_run_with_the_client_and_the_round():
    with pytest.raises(
        ClientError, match=r"Round 2, train: client 2 was lost: its worker process was ended by SIGKILL"
    ):
        fit(Deadly())


def test_a_dead_worker_is_a_failure_that_fault_tolerance_allows_for():
    history = History(per_client=True)
    with pytest.warns(UserWarning, match="client 2 was lost"):
        fit(Deadly(), FaultTolerance(min_results=3), history)
    who = [[row["client"] for row in history.clients if row["round"] == round] for round in (1, 2, 3)]
    assert who == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]


def test_ctrl_c_ends_the_run_and_all_its_workers():
    class CtrlC(FederatedCallback):
        def on_client_end(self, trainer, round, stage, report):
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(ToyModule(), CtrlC())


def test_a_user_s_exception_comes_with_its_traceback():
    class Raising(ToyModule):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError("in the user's code")

    with pytest.raises(ClientError, match=r"(?s)client 0 raised ZeroDivisionError: in the user's code.*training_step"):
        fit(Raising())


@pytest.mark.parametrize("error", sweep([KeywordOnly, Otherwise], [KeywordOnly]))
def test_an_exception_that_does_not_survive_the_way_is_told_as_text(error):
    module = Picky()
    module.error = error
    said = rf"(?s)Round 2, train: client 1 raised \S*{error.__name__}: code 7\nThe client's traceback:.*on_train_start"
    with pytest.raises(ClientError, match=said) as caught:
        fit(module)
    assert caught.value.__cause__ is None
    history = History(per_client=True)
    with pytest.warns(UserWarning, match="code 7 "):
        fit(module, FaultTolerance(min_results=3), history)
    assert [row["client"] for row in history.clients if row["round"] == 2] == [0, 2, 3]


def test_an_exception_that_survives_the_way_is_the_cause():
    module = Picky()
    module.error = ZeroDivisionError
    with pytest.raises(ClientError, match="client 1 raised ZeroDivisionError: 7") as caught:
        fit(module)
    assert type(caught.value.__cause__) is ZeroDivisionError


def test_lines_of_a_users_script_are_in_a_traceback_from_a_worker_that_is_no_fork():
    code = "def act(client):\n    raise LookupError('no such thing')\n"
    names: dict = {}
    exec(compile(code, __file__, "exec"), names)
    engine = Processes(num_workers=1, start_method="forkserver")
    [reply] = engine.run(send, client_that(names["act"]), lambda: 1)
    assert f'File "{__file__}", line 2, in act' in reply.error.reason


def killed_run(rounds: int) -> tuple[FederatedTrainer, int]:
    """A run during which a random worker is killed now and then."""
    kills = []

    class Killer(FederatedCallback):
        def on_round_start(self, trainer, round, stage, cohort):
            children = multiprocessing.active_children()
            if children and round % 3 == 0:
                kills.append(round)
                os.kill(children[round % len(children)].pid, signal.SIGKILL)

    trainer = fit(ToyModule(), FaultTolerance(min_results=1), Killer(), rounds=rounds)
    return trainer, len(kills)


@pytest.mark.filterwarnings("ignore:.*was lost")
def test_a_worker_that_never_gets_ready_does_not_stop_the_others():
    class Killer(FederatedCallback):
        def on_round_start(self, trainer, round, stage, cohort):
            if children := multiprocessing.active_children():
                os.kill(max(child.pid for child in children), signal.SIGKILL)

    engine = Processes(num_workers=2, start_method="forkserver")
    trainer = fit(ToyModule(), FaultTolerance(min_results=1), Killer(), rounds=12, engine=engine)
    assert trainer.global_step == 12


@pytest.mark.filterwarnings("ignore:.*was lost")
@pytest.mark.parametrize("rounds", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_under_a_killer_comes_to_its_end(rounds):
    trainer, kills = killed_run(rounds)
    assert kills >= rounds // 3 - 1
    assert trainer.global_step == rounds


def test_a_fit_leaves_no_shared_memory_behind():
    before = set(Path("/dev/shm").iterdir())
    fit(ToyModule())
    assert set(Path("/dev/shm").iterdir()) == before


def test_evaluation_goes_to_the_workers_too():
    replies = forked().run(lambda grid: send(grid, MessageType.EVALUATE), counting_client(), lambda: 3)
    assert [reply.has_error() for reply in replies] == [False] * 3


def test_a_round_in_which_all_workers_die_is_an_error_and_no_hang():
    class Always(ToyModule):
        def on_train_start(self) -> None:
            die()

    with pytest.raises(RoundError, match="0 of 4 clients"), pytest.warns(UserWarning, match="was lost"):
        fit(Always(), FaultTolerance(min_results=1))


def test_workers_use_one_thread_each():
    def act(client):
        if torch.get_num_threads() != 1:
            raise RuntimeError(torch.get_num_threads())

    replies = forked().run(send, client_that(act), lambda: 2)
    assert not any(reply.has_error() for reply in replies)


def test_a_worker_that_takes_long_to_end_is_waited_for(monkeypatch):
    monkeypatch.setattr(ForkProcess, "join", _impatient(ForkProcess.join))
    module = ToyModule()
    FederatedTrainer(max_rounds=1, num_clients=2, engine=Processes(2, start_method="fork"), **QUIET).fit(
        module, DataLoader(toy_data(16), 8)
    )
    assert not multiprocessing.active_children()


def _impatient(join):
    """On a busy machine two seconds may be over before a process that was told to end has ended."""

    def join_later(process, timeout=None):
        if timeout is None or timeout > 10:
            join(process, timeout)

    return join_later

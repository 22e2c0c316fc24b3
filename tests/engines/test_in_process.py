"""The in-process engine: the conformance cases, clients run as they are read, nothing left behind."""

import weakref

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from lightning_fed.engines import Engine, InProcess
from lightning_fed.testing import ENGINE_CASES, counting_client, failing_client, send, toy_weights
from lightning_fed.wire import messages
from tests.engines.clients import train_messages


@pytest.mark.parametrize("case", ENGINE_CASES, ids=lambda case: case.__name__)
def test_engine_conforms(case):
    case(InProcess())


def identity() -> tuple[object, ...]:
    return tuple(getattr(TaskIdentity, name) for name in ("_task_id", "_run_id", "_node_id"))


def recording_client(ran: list[int]) -> ClientApp:
    app, counting = ClientApp(), counting_client()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        ran.append(int(context.node_config[messages.CLIENT]))
        return counting(message, context)

    return app


def test_clients_run_as_their_replies_are_read_in_the_order_of_the_messages():
    ran: list[int] = []

    def main(grid):
        replies = grid.send_and_receive(train_messages(grid, [3, 1, 2]))
        assert ran == []
        first = next(replies)
        assert ran == [2]
        assert first.metadata.src_node_id == 3
        rest = list(replies)
        assert [reply.metadata.src_node_id for reply in rest] == [1, 2]

    InProcess().run(main, recording_client(ran), lambda: 3)
    assert ran == [2, 0, 1]


def test_client_that_nobody_reads_does_not_run():
    ran: list[int] = []
    InProcess().run(lambda grid: next(grid.send_and_receive(train_messages(grid))), recording_client(ran), lambda: 3)
    assert ran == [0]


def test_flowers_process_wide_identity_is_set_for_main_and_put_back():
    before = identity()
    inside = InProcess().run(lambda grid: identity(), counting_client(), lambda: 1)
    assert inside != before
    assert None not in inside
    assert identity() == before


def test_flowers_process_wide_identity_is_put_back_when_main_raises():
    before = identity()

    def main(grid):
        raise LookupError

    with pytest.raises(LookupError):
        InProcess().run(main, counting_client(), lambda: 1)
    assert identity() == before


def test_run_within_a_run_has_its_own_identity_and_gives_the_outer_one_back():
    def outer(grid):
        before = identity()
        inner = InProcess().run(lambda grid: identity(), counting_client(), lambda: 1)
        return before, inner, identity()

    before, inner, after = InProcess().run(outer, counting_client(), lambda: 1)
    assert before == after
    assert before != inner


def test_clients_and_addresses_belong_to_each_other():
    def main(grid):
        nodes = list(grid.get_node_ids())
        assert [grid.client_of(node) for node in nodes] == [0, 1, 2]
        assert [grid.node_of(client) for client in range(3)] == nodes
        assert [node.node_id for node in grid.get_nodes()] == nodes
        return grid.num_clients

    assert InProcess().run(main, counting_client(), lambda: 3) == 3


def test_number_of_clients_is_asked_for_late():
    # The data may have to be opened for it.
    def count():
        raise AssertionError("asked")

    InProcess().run(lambda grid: None, counting_client(), count)


def test_client_is_told_its_number_and_how_many_there_are():
    seen = {}

    app = ClientApp()

    @app.train()
    def train(message, context):
        seen[context.node_id] = dict(context.node_config)
        return messages.train_reply(message, {}, 1, {})

    InProcess().run(lambda grid: list(grid.send_and_receive(train_messages(grid))), app, lambda: 2)
    assert seen == {
        1: {"partition-id": 0, "num-partitions": 2},
        2: {"partition-id": 1, "num-partitions": 2},
    }


def test_pushed_messages_are_pulled_once_each():
    def main(grid):
        ids = list(grid.push_messages(train_messages(grid)))
        assert len(set(ids)) == 3
        second = list(grid.pull_messages([ids[1]]))
        rest = list(grid.pull_messages(ids))
        again = list(grid.pull_messages(ids))
        return [r.metadata.src_node_id for r in second], sorted(r.metadata.src_node_id for r in rest), again

    assert InProcess().run(main, counting_client(), lambda: 3) == ([2], [1, 3], [])


def test_replies_answer_their_messages():
    def main(grid):
        sent = train_messages(grid)
        replies = list(grid.send_and_receive(sent))
        assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in sent]
        ids = {m.metadata.message_id for m in [*sent, *replies]}
        assert len(ids) == 6
        assert all(r.metadata.run_id == grid.run.run_id for r in replies)

    InProcess().run(main, counting_client(), lambda: 3)


def test_message_made_by_the_grid_is_one_it_delivers():
    def main(grid):
        content = RecordDict({"arrays": messages.pack({}), "config": ConfigRecord({})})
        return list(grid.send_and_receive([grid.create_message(content, MessageType.TRAIN, 2, "group")]))

    (reply,) = InProcess().run(main, counting_client(), lambda: 2)
    assert not reply.has_error()
    assert reply.metadata.group_id == "group"


def test_exception_of_a_client_comes_with_its_traceback_and_itself():
    replies = InProcess().run(send, failing_client(lambda client: client == 0), lambda: 2)
    assert replies[0].error.reason.startswith("ValueError: client 0 fails\nThe client's traceback:\n  ")
    assert isinstance(replies[0].error.__dict__["exception"], ValueError)
    assert not replies[1].has_error()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupt_in_a_client_is_no_failure_of_the_client(interrupt):
    app = ClientApp()

    @app.train()
    def train(message, context):
        raise interrupt

    with pytest.raises(interrupt):
        InProcess().run(send, app, lambda: 2)


def test_what_clients_keep_is_given_out_and_taken_back():
    states = {}

    def main(grid):
        list(grid.send_and_receive(train_messages(grid, [1])))
        states.update(grid.client_states())

    InProcess().run(main, counting_client(), lambda: 1000)
    assert set(states) == {0}  # those that keep nothing are left out

    def resumed(grid):
        grid.load_client_states(states)
        return [reply.content["metrics"]["calls"] for reply in grid.send_and_receive(train_messages(grid, [1, 2]))]

    assert InProcess().run(resumed, counting_client(), lambda: 2) == [2, 1]


def test_client_that_keeps_nothing_has_no_state():
    def main(grid):
        send(grid, MessageType.EVALUATE)
        return grid.client_states()

    assert InProcess().run(main, counting_client(), lambda: 3) == {}


def test_tensors_are_not_copied_on_the_way():
    weights, pointers = toy_weights(), []
    app = ClientApp()

    @app.train()
    def train(message, context):
        pointers.append(messages.unpack(message.content["arrays"])["matrix"].data_ptr())
        return messages.train_reply(message, {}, 1, {})

    InProcess().run(lambda grid: send(grid, weights=weights), app, lambda: 2)
    assert pointers == [weights["matrix"].data_ptr()] * 2


def test_grid_keeps_no_reply():
    alive: list[weakref.ref[torch.Tensor]] = []
    app = ClientApp()

    @app.train()
    def train(message, context):
        reply = messages.train_reply(message, {"w": torch.zeros(10)}, 1, {})
        alive.append(weakref.ref(messages.unpack(reply.content["arrays"])["w"]))
        return reply

    def main(grid):
        for reply in grid.send_and_receive(train_messages(grid)):
            assert [ref() is not None for ref in alive] == [False] * (len(alive) - 1) + [True]
            del reply
        assert all(ref() is None for ref in alive)

    InProcess().run(main, app, lambda: 4)
    assert len(alive) == 4


def test_it_is_an_engine_by_its_name():
    assert isinstance(InProcess(), Engine)
    assert InProcess().name == "in_process"

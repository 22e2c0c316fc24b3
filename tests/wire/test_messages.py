"""What travels: tensors without loss, and what strategies must not see beside what they see."""

import copy
import pickle

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, strategy_utils

from lightning_fed.values.metrics import MEAN, METRIC, MetricState
from lightning_fed.wire import extras, messages
from lightning_fed.wire.messages import pack, unpack
from tests.helpers import in_flower, over_the_wire
from tests.wire.tensors import TENSORS


def message(content: RecordDict | None = None, kind: str = MessageType.TRAIN) -> Message:
    return Message(content or RecordDict(), 1, kind)


# ------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_is_the_same_within_a_process(name):
    tensor = TENSORS[name]
    got = unpack(pack({name: tensor}))[name]
    assert got.dtype == tensor.dtype
    assert torch.equal(got.float() if name == "float8" else got, tensor.float() if name == "float8" else tensor)


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_has_the_same_values_over_the_wire(name):
    tensor = TENSORS[name]
    got = unpack(over_the_wire(RecordDict({"arrays": pack({name: tensor})}))["arrays"])[name]
    assert got.shape == tensor.shape
    if name in ("bfloat16", "float8"):  # NumPy lacks them; float32 holds them exactly
        assert got.dtype == torch.float32
    else:
        assert got.dtype == tensor.dtype
    back = got.to(tensor.dtype)
    assert torch.equal(back.float() if name == "float8" else back, tensor.float() if name == "float8" else tensor)


def test_nothing_is_serialised_or_copied_within_a_process():
    tensor = torch.zeros(3)
    assert unpack(pack({"w": tensor}))["w"].data_ptr() == tensor.data_ptr()


def test_numpy_gives_a_copy_that_may_be_written():
    tensor = torch.zeros(3)
    pack({"w": tensor})["w"].numpy()[...] = 7
    assert tensor.tolist() == [0, 0, 0]


def test_gradients_do_not_travel():
    assert not unpack(pack({"w": torch.zeros(2, requires_grad=True)}))["w"].requires_grad


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_array_survives_copy_and_pickle_as_flowers_own(duplicate):
    array = duplicate(pack({"w": TENSORS["bfloat16"]})["w"])
    assert type(array) is Array
    assert torch.equal(torch.from_numpy(array.numpy()), TENSORS["bfloat16"].float())


def test_bytes_written_into_an_array_are_what_it_then_holds():
    array = pack({"w": torch.zeros(2)})["w"]
    array.data = pack({"w": torch.ones(2)})["w"].data
    assert array.numpy().tolist() == [1, 1]
    assert unpack(ArrayRecord({"w": array}))["w"].tolist() == [1, 1]


def test_flowers_own_aggregation_reads_our_arrays():
    contents = [
        RecordDict({"arrays": pack({"w": torch.tensor([x])}), "metrics": MetricRecord({"num-examples": n})})
        for x, n in ((1.0, 1), (4.0, 2))
    ]
    aggregated = strategy_utils.aggregate_arrayrecords(contents, "num-examples")
    assert unpack(aggregated)["w"].tolist() == [3.0]


def test_flowers_state_dict_conversion_reads_our_arrays():
    state = pack({"w": TENSORS["float32"], "n": TENSORS["int64"]}).to_torch_state_dict()
    assert torch.equal(state["w"], TENSORS["float32"])
    assert torch.equal(state["n"], TENSORS["int64"])


# ------------------------------------------------------------------------------------------------- delivery


@pytest.mark.parametrize("wired", [False, True])
def test_writing_into_what_was_delivered_changes_nobody_else(wired):
    sent = RecordDict(
        {
            "arrays": pack({"w": torch.zeros(2)}),
            "config": ConfigRecord({"lr": 0.1, "layers": [1, 2]}),
            "metrics": MetricRecord({"m": 1.0, "l": [1.0]}),
        }
    )
    sent = over_the_wire(sent) if wired else sent
    delivered = messages.copy_for_delivery(sent)
    delivered["arrays"]["w"].data = pack({"w": torch.ones(2)})["w"].data
    delivered["arrays"]["new"] = delivered["arrays"].pop("w")
    delivered["config"]["layers"].append(3)
    delivered["metrics"]["l"].append(3.0)
    delivered["metrics"]["m"] = 2.0
    del delivered["config"]["lr"]
    assert unpack(sent["arrays"])["w"].tolist() == [0, 0]
    assert list(sent["arrays"]) == ["w"]
    assert sent["config"] == ConfigRecord({"lr": 0.1, "layers": [1, 2]})
    assert sent["metrics"] == MetricRecord({"m": 1.0, "l": [1.0]})


def test_delivery_copies_no_tensor():
    tensor = torch.zeros(3)
    delivered = messages.copy_for_delivery(RecordDict({"arrays": pack({"w": tensor})}))
    assert unpack(delivered["arrays"])["w"].data_ptr() == tensor.data_ptr()


# ------------------------------------------------------------------------------------------------- to the client


def test_client_reads_rounds_seed_and_weights_that_the_server_sent():
    content = RecordDict({"arrays": pack({"w": torch.ones(2)}), "config": messages.round_config(7, 2**31, 9)})
    instruction = in_flower(lambda: messages.read_instruction(message(content)))
    assert (instruction.round, instruction.seed, instruction.rounds) == (7, 2**31, 9)
    assert instruction.weights["w"].tolist() == [1, 1]


def test_client_understands_a_plain_flower_message_under_any_keys():
    content = RecordDict({"my-arrays": pack({"w": torch.ones(1)}), "my-config": ConfigRecord({"lr": 0.1})})
    instruction = in_flower(lambda: messages.read_instruction(message(content)))
    assert (instruction.round, instruction.seed, instruction.rounds) == (1, 0, None)
    assert list(instruction.weights) == ["w"]


def test_integer_tensors_travel_beside_what_mods_and_strategies_see():
    def main():
        shared = RecordDict({"arrays": pack({"w": torch.ones(1)})})  # one for all, as Flower's strategies do
        sent = [message(shared), message(shared)]
        extras.IntegerTensors({"n": torch.tensor(2**53 + 1)}).attach(sent)
        got = [Message(messages.copy_for_delivery(m.content), 1, MessageType.TRAIN) for m in sent]
        integers = [extras.detach_integers(m) for m in got]
        return integers, [set(m.content) for m in got]

    integers, seen = in_flower(main)
    assert [int(i["n"]) for i in integers] == [2**53 + 1] * 2
    assert seen == [{"arrays"}] * 2


def test_message_without_integers_has_none():
    def main():
        sent = message()
        extras.IntegerTensors({}).attach([sent])
        return set(sent.content), extras.detach_integers(sent)

    assert in_flower(main) == (set(), {})


# ------------------------------------------------------------------------------------------------- back to the server


def test_reply_carries_weights_examples_and_numbers_as_flowers_strategies_expect():
    def main():
        sent = message()
        replies = [
            messages.train_reply(sent, {"w": torch.tensor([x])}, n, {"loss": loss})
            for x, n, loss in ((0.0, 1, 0.5), (4.0, 3, 1.5))
        ]
        return FedAvg().aggregate_train(1, replies), replies

    (arrays, metrics), replies = in_flower(main)
    assert unpack(arrays)["w"].tolist() == [3.0]
    assert metrics["loss"] == pytest.approx(1.25)
    assert [messages.num_examples(reply) for reply in replies] == [1, 3]
    assert messages.reply_scalars(replies[1]) == {"loss": 1.5}


def test_evaluate_reply_carries_no_weights():
    reply = in_flower(lambda: messages.evaluate_reply(message(kind=MessageType.EVALUATE), 4, {"acc": 0.5}))
    assert not reply.content.array_records
    assert messages.num_examples(reply) == 4
    assert messages.reply_scalars(reply) == {"acc": 0.5}


def test_reply_without_a_count_of_examples_counts_none():
    def main():
        return [
            messages.num_examples(Message(RecordDict(content), reply_to=message()))
            for content in ({}, {"m": MetricRecord({"loss": 1.0})}, {"m": MetricRecord({"num-examples": [1, 2]})})
        ]

    assert in_flower(main) == [0, 0, 0]


def test_error_reply_carries_the_traceback_and_within_a_process_the_exception():
    try:
        raise ValueError("no")
    except ValueError as caught:
        error = caught
    reply = in_flower(lambda: messages.error_reply(message(), error))
    assert reply.has_error()
    assert reply.error.code == 2  # Flower's CLIENT_APP_RAISED_EXCEPTION
    said, exception = messages.raised(reply)
    assert said.startswith("ValueError: no\nThe client's traceback:\n")
    assert said.endswith('raise ValueError("no")')
    assert exception is error


def test_error_that_was_never_raised_has_no_traceback():
    reply = in_flower(lambda: messages.error_reply(message(), ValueError("no")))
    assert messages.raised(reply)[0] == "ValueError: no"


STATES = [
    MetricState("loss", MEAN, {"value": torch.tensor(3.0).double(), "weight": torch.tensor(7.0).double()}),
    MetricState("a/b/f1", METRIC, {"tp": torch.tensor([2**53 + 1]), "preds": torch.zeros(0)}, "val.f1", 3),
    MetricState("a/b/f1", METRIC, {"tp": torch.tensor([1])}, "other", 1),  # the same name twice
    MetricState("none", METRIC, {}, "odd", 0),
]


@pytest.mark.parametrize("wired", [False, True])
def test_metric_states_and_integers_travel_and_are_gone_before_a_strategy_sees_the_reply(wired):
    def main():
        reply = messages.train_reply(message(), {"w": torch.ones(1)}, 2, {})
        before = set(reply.content)
        extras.attach(reply, extras.Extras({"n": torch.tensor(5)}, STATES))
        if wired:
            reply.content = over_the_wire(reply.content)
        return before, extras.detach(reply), set(reply.content)

    before, got, after = in_flower(main)
    assert after == before
    assert got.integers["n"].item() == 5
    assert [(s.name, s.kind, s.attribute, s.updates) for s in got.states] == [
        (s.name, s.kind, s.attribute, s.updates) for s in STATES
    ]
    for state, sent in zip(got.states, STATES, strict=True):
        assert state.tensors.keys() == sent.tensors.keys()
        assert all(torch.equal(state.tensors[k], sent.tensors[k]) for k in sent.tensors)


def test_reply_of_a_client_that_is_not_ours_has_no_extras():
    got = in_flower(lambda: extras.detach(messages.evaluate_reply(message(), 1, {})))
    assert (got.integers, got.states) == ({}, [])


# ------------------------------------------------------------------------------------------------- a client's own state


def test_fit_state_is_kept_replaced_and_dropped():
    context = Context(1, 1, {}, RecordDict(), {})
    assert messages.get_fit_state(context) is None
    messages.set_fit_state(context, b"\0one")
    messages.set_fit_state(context, b"\0two")
    assert messages.get_fit_state(context) == b"\0two"
    messages.set_fit_state(context, None)
    messages.set_fit_state(context, None)
    assert messages.get_fit_state(context) is None
    assert not context.state


# ------------------------------------------------------------------------------------------------- beside the records


def test_what_mods_see_and_what_goes_beside_it_are_all_weights():
    weights = {"w": torch.ones(2), "n": torch.tensor(3), "on": torch.tensor([True])}
    seen, rest = extras.without_integers(weights), extras.Extras.of(weights, [], [])
    assert set(seen) == {"w"}
    assert extras.merge_integers(seen, rest.integers) == weights


def test_integers_have_a_mean_of_their_own_and_join_what_the_strategy_made():
    apart = extras.IntegerTensors({"w": torch.zeros(2), "n": torch.tensor(0)})
    assert set(apart.averaged) == {"w"}
    apart.add(extras.Extras(integers={"n": torch.tensor(2)}), 1.0)
    apart.add(extras.Extras(integers={"n": torch.tensor(6)}), 3.0)
    apart.add(extras.Extras(), 1.0)  # of a client that sent none
    merged = apart.merged({"w": torch.ones(2)})
    assert (merged["w"].tolist(), merged["n"].item(), merged["n"].dtype) == ([1.0, 1.0], 5, torch.int64)

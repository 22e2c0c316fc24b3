"""The weighted mean: McMahan's, in one pass, in plain Flower as well."""

import weakref

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from lightning_fed.strategies import WeightedMean
from lightning_fed.wire import messages
from tests.helpers import in_flower
from tests.references import run_rounds, weighted_mean
from tests.strategies.plain_flower import SIZES, clients, plain_client, start

X = {
    "layer.weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "layer.bias": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    "scale": torch.tensor(0.5),
}


def aggregate(strategy, *replies, round=1):
    """What a strategy makes of ``(weights, num_examples, scalars)``."""

    def main():
        made = [
            messages.train_reply(Message(RecordDict(), 1, MessageType.TRAIN), w, n, scalars)
            for w, n, scalars in replies
        ]
        arrays, metrics = strategy.aggregate_train(round, made)
        return None if arrays is None else messages.unpack(arrays), metrics

    return in_flower(main)


def test_three_rounds_of_plain_flower_are_the_papers():
    def take(x, mean, state):
        return mean, state

    expected = run_rounds(X, clients, take, rounds=3)
    after, _ = start(WeightedMean(), X)
    assert len(after) == 3
    for got, want in zip(after, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_uniform_gives_every_client_the_same_weight():
    updates = [w for _, w in clients(1, X)]
    after, _ = start(WeightedMean(uniform=True), X, rounds=1)
    torch.testing.assert_close(after[0], weighted_mean(updates, [1] * len(SIZES)), rtol=1e-6, atol=1e-7)


def test_it_agrees_with_flowers_own_fedavg():
    ours, _ = start(WeightedMean(), X)
    flowers, _ = start(FedAvg(), X)
    torch.testing.assert_close(ours, flowers, rtol=1e-5, atol=1e-6)


def test_metrics_are_the_example_weighted_means():
    _, result = start(WeightedMean(), X, rounds=1)
    expected = sum(n * k for k, n in enumerate(SIZES)) / sum(SIZES)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(expected)
    assert result.evaluate_metrics_clientapp[1]["acc"] == pytest.approx(0.1 * expected)


def test_one_client_is_enough_for_it():
    # Flower's own would wait for a second one for ever.
    def only_one(client, round, x):
        return {k: v + 1 for k, v in x.items()}

    from tests.helpers import SuperLinkLike

    grid = SuperLinkLike(plain_client(only_one), {5: {"partition-id": 0}})
    result = in_flower(lambda: WeightedMean().start(grid, ArrayRecord(X), num_rounds=1))
    assert torch.equal(result.arrays.to_torch_state_dict()["scale"], X["scale"] + 1)


def test_mean_of_one_client_is_that_client_bit_for_bit():
    w = {"w": torch.randn(100, generator=torch.Generator().manual_seed(0)) * 1e-3}
    assert torch.equal(aggregate(WeightedMean(), (w, 7, {}))[0]["w"], w["w"])


def test_integer_buffers_keep_their_dtype_in_plain_flower_too():
    # Flower's own FedAvg turns them into float64.
    replies = [({"n": torch.tensor(10), "w": torch.tensor([1.0])}, 1, {}), ({"n": torch.tensor(14)}, 1, {})]
    replies[1][0]["w"] = torch.tensor([2.0])
    new, _ = aggregate(WeightedMean(), *replies)
    assert (new["n"].item(), new["n"].dtype) == (12, torch.int64)


def test_bfloat16_stays_bfloat16_and_is_rounded_once():
    values = [torch.tensor([1.0, 256.0]), torch.tensor([1.0078125, 258.0]), torch.tensor([1.0078125, 258.0])]
    replies = [({"w": value.bfloat16()}, 1, {}) for value in values]
    new, _ = aggregate(WeightedMean(), *replies)
    assert new["w"].dtype == torch.bfloat16
    assert torch.equal(new["w"], torch.stack(values).double().mean(0).bfloat16())


def test_no_good_reply_gives_no_weights():
    failed = in_flower(
        lambda: WeightedMean().aggregate_train(
            1, [Message(Error(2, "no"), reply_to=Message(RecordDict(), 1, MessageType.TRAIN))]
        )
    )
    assert failed == (None, None)
    assert WeightedMean().aggregate_train(1, []) == (None, None)
    assert WeightedMean().aggregate_evaluate(1, []) is None


def test_failed_replies_are_left_out():
    def train(client, round, x):
        if client == 1:
            raise ValueError
        return {k: v + client for k, v in x.items()}

    after, _ = start(WeightedMean(), X, rounds=1, app=plain_client(train))
    expected = (0 * SIZES[0] + 2 * SIZES[2] + 3 * SIZES[3]) / (SIZES[0] + SIZES[2] + SIZES[3])
    torch.testing.assert_close(after[0]["scale"], X["scale"] + expected)


def test_keys_and_functions_that_flowers_fedavg_takes_are_heeded():
    def metrics_fn(contents, key):
        return MetricRecord({"clients": len(contents), "examples": sum(c["m"][key] for c in contents)})

    strategy = WeightedMean(weighted_by_key="n", arrayrecord_key="a", train_metrics_aggr_fn=metrics_fn)

    def main():
        replies = []
        for x, n in ((0.0, 1), (4.0, 3)):
            content = {"a": messages.pack({"w": torch.tensor([x])}), "m": MetricRecord({"n": n, "num-examples": 1})}
            replies.append(Message(RecordDict(content), reply_to=Message(RecordDict(), 1, MessageType.TRAIN)))
        arrays, metrics = strategy.aggregate_train(1, replies)
        return messages.unpack(arrays), metrics

    new, metrics = in_flower(main)
    assert new["w"].tolist() == [3.0]
    assert dict(metrics) == {"clients": 2, "examples": 4}


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_metric_that_only_some_report_is_averaged_over_those(stage):
    metrics = averaged(stage, (1, {"a": 1.0}), (3, {"a": 5.0, "b": 2.0}), (4, {}))
    assert dict(metrics) == {"a": 4.0, "b": 2.0}


def averaged(stage, *replies):
    """What the strategy makes of ``(num_examples, scalars)``."""

    def main():
        message, strategy = Message(RecordDict(), 1, MessageType.TRAIN), WeightedMean()
        if stage == "train":
            made = [messages.train_reply(message, {"w": torch.zeros(1)}, n, scalars) for n, scalars in replies]
            return strategy.aggregate_train(1, made)[1]
        return strategy.aggregate_evaluate(1, [messages.evaluate_reply(message, n, scalars) for n, scalars in replies])

    return in_flower(main)


def test_one_reply_is_held_at_a_time():
    """The memory of a round does not grow with the cohort."""
    alive: list[weakref.ref] = []
    most = 0

    def replies():
        nonlocal most
        for _ in range(5):
            message = Message(RecordDict(), 1, MessageType.TRAIN)
            reply = messages.train_reply(message, {"w": torch.zeros(10)}, 1, {})
            alive.append(weakref.ref(messages.unpack(reply.content["arrays"])["w"]))
            yield reply
            del reply
            most = max(most, sum(ref() is not None for ref in alive))

    in_flower(lambda: WeightedMean().aggregate_train(1, replies()))
    assert len(alive) == 5
    assert most == 0

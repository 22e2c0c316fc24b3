"""What an engine asks of a client app, of ours and of any other."""

from __future__ import annotations

from flwr.app import Context, Message, MessageType, RecordDict
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.engines.served import OneByOne, answer, served
from lightning_fed.testing import ToyModule, counting_client, toy_data, toy_weights
from lightning_fed.wire import messages
from tests.helpers import QUIET, in_flower


def received(client: int) -> tuple[Message, Context]:
    content = RecordDict({messages.ARRAYS: messages.pack(toy_weights()), messages.CONFIG: messages.round_config(1, 0)})
    context = Context(1, client + 1, {messages.CLIENT: client}, RecordDict(), {})
    return Message(content, client + 1, MessageType.TRAIN), context


def test_our_own_app_is_served_as_it_is() -> None:
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **QUIET)
    app = trainer.client_app(ToyModule(), DataLoader(toy_data(8)))
    assert served(app) is app
    assert set(served(app).roots()) >= {"module", "options", "train"}


def test_any_other_app_gets_one_message_at_a_time() -> None:
    app = served(counting_client())
    assert app.max_messages("train") == 1
    replies = in_flower(lambda: app.serve([received(0), received(2)]))
    assert [messages.num_examples(reply) for reply in replies] == [1, 3]


def test_nothing_of_any_other_app_changes() -> None:
    app = served(counting_client())
    app.change(b"")
    assert (app.changes(), app.roots()) == (None, {})


def test_what_an_app_raises_is_its_reply() -> None:
    def fail(message: Message, context: Context) -> Message:
        raise ValueError("no")

    [reply] = in_flower(lambda: answer(OneByOne(fail), [received(0)]))
    assert messages.raised(reply)[0].startswith("ValueError: no")

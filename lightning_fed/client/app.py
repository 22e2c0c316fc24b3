"""The Flower ClientApp: it knows Flower and not the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from lightning_fed.client.changes import Changes, apply
from lightning_fed.client.local.fit import local_evaluate
from lightning_fed.client.local.isolation import weights_of
from lightning_fed.client.local.run import LocalResult
from lightning_fed.client.local.work import LocalTask
from lightning_fed.client.side import ClientSide, own_in
from lightning_fed.errors import ClientError
from lightning_fed.seeding import random_states_kept
from lightning_fed.state.snapshot import DataSnapshot, Snapshot
from lightning_fed.values.weights import Weights, check_update
from lightning_fed.views import move_to_class
from lightning_fed.wire import extras, messages
from lightning_fed.wire.served_app import ServedApp


@dataclass
class _Call:
    """A message to a client, and what was detached from it, where mods do not see it."""

    message: Message
    context: Context
    integers: Weights
    methods: Weights

    @classmethod
    def of(cls, message: Message, context: Context) -> _Call:
        return cls(message, context, extras.detach_integers(message), extras.detach_methods(message))

    def task(self, side: ClientSide, stage: str, message: Message | None = None) -> LocalTask:
        """Return what the client is to do, as its mods left the message."""
        context, instruction = self.context, messages.read_instruction(message or self.message)
        memory, weights = messages.get_memory(context), extras.merge_integers(instruction.weights, self.integers)
        return LocalTask(
            client=int(context.node_config[messages.CLIENT]),
            round=instruction.round,
            seed=instruction.seed,
            weights={**weights, **own_in(memory, side.options)} if stage == "evaluate" else weights,
            state=messages.get_fit_state(context) if stage == "train" else None,
            callback_states=messages.get_callback_states(context),
            received=self.methods,
            memory=memory,
            rounds=instruction.rounds,
        )


class LocalClientApp(ClientApp, ServedApp):
    """A ClientApp that can serve several clients at once where they are vectorized."""

    def __init__(self, side: ClientSide) -> None:
        super().__init__()
        self._side = side
        self._changes: Changes | None = None

    def roots(self) -> dict[str, Any]:
        """Return all that clients work with, by name."""
        return {**self._side.roots(), **self._side.data_roots()}

    def changes(self) -> bytes | None:
        """Return what has changed at the server since the last call, for ``change`` of the copies in other processes.

        Raises:
            ConfigurationError: If it cannot be sent.
        """
        side = self._side
        for instance in (side.module, side.datamodule):
            move_to_class(instance)
        if self._changes is None:
            weights = partial(weights_of, side.module)
            self._changes = Changes(Snapshot(side.roots(), weights), DataSnapshot(side.data_roots()))
            return None
        return self._changes.take()

    def change(self, changes: bytes) -> None:
        """Make the changes that another process' ``changes`` gave; where that fails, so does all work from then on."""
        try:
            apply(changes, self.roots())
        except Exception as error:
            self._side.is_stale = f"{type(error).__name__}: {error}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_changes": None}

    def max_messages(self, stage: str) -> int:
        """Return how many messages of a type to give to ``serve``."""
        dispatcher = self._side.dispatcher
        return 1 if dispatcher is None else dispatcher.size(stage)

    def serve(self, received: Sequence[tuple[Message, Context]]) -> list[Message]:
        """Return the replies to messages of one type, in their order."""
        side, stage = self._side, received[0][0].metadata.message_type
        calls = [_Call.of(message, context) for message, context in received]
        results: Sequence[LocalResult | None] = [None] * len(calls)
        if len(calls) > 1 and side.dispatcher is not None and not side.is_stale:
            tasks = [call.task(side, stage) for call in calls]
            results = side.dispatcher.run(stage, tasks, side.work)
        return [
            _serve(side, stage, calls[i]) if result is None else _ended(side, stage, calls[i], tasks[i], result)
            for i, result in enumerate(results)
        ]


def build_client_app(side: ClientSide) -> LocalClientApp:
    """Build a ClientApp with a train and an evaluate function, and a query function that tells which client it is."""
    app = LocalClientApp(side)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return app.serve([(message, context)])[0]

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return app.serve([(message, context)])[0]

    @app.query()
    def query(message: Message, context: Context) -> Message:
        client = context.node_config[messages.CLIENT]
        return Message(RecordDict({messages.CONFIG: ConfigRecord({messages.CLIENT: client})}), reply_to=message)

    return app


def _serve(side: ClientSide, stage: str, call: _Call) -> Message:
    """Message -> client mods -> local run -> reply; what mods must not see goes around them."""
    results: list[LocalResult] = []

    def run(message: Message, context: Context) -> Message:
        results[:] = [_run(side, stage, message, context, call)]
        return _reply(stage, message, results[0])

    try:
        reply = _with_mods(run, side.mods.get(stage, ()))(call.message, call.context)
    except Exception as exception:
        return messages.error_reply(call.message, exception)
    return _with_extras(reply, *results)


def _ended(side: ClientSide, stage: str, call: _Call, task: LocalTask, result: LocalResult) -> Message:
    """Return the reply of one of several that worked together, without mods and with no state but methods' memory."""
    if stage == "train":
        try:
            _remember(side, call.context, task, result)
        except ClientError as error:
            return messages.error_reply(call.message, error)
    return _with_extras(_reply(stage, call.message, result), result)


def _with_mods(run: ClientAppCallable, mods: Sequence[Mod]) -> ClientAppCallable:
    for mod in reversed(mods):
        run = _wrap(run, mod)
    return run


def _wrap(inner: ClientAppCallable, mod: Mod) -> ClientAppCallable:
    return lambda message, context: mod(message, context, inner)


def _run(side: ClientSide, stage: str, message: Message, context: Context, call: _Call) -> LocalResult:
    task = replace(call, context=context).task(side, stage, message)
    if side.is_stale:
        raise ClientError(
            "was not trained: what the server changed between rounds could not be changed in its process"
            f" ({side.is_stale}). Write engine='in_process', or change it in a hook of the local fit."
        )
    with random_states_kept():
        work = side.work(task)
        side.set_up(work)
        result = side.train(work) if stage == "train" else local_evaluate(work)
    if stage == "train":
        messages.set_fit_state(context, result.state)
        messages.set_callback_states(context, result.callback_states)
        _remember(side, context, task, result)
    return result


def _remember(side: ClientSide, context: Context, task: LocalTask, result: LocalResult) -> None:
    """Keep what stays with the client; of a reply that is refused the server lets it keep what it kept before.

    Raises:
        ClientError: If the client's own tensors, which the server does not see, cannot be used.
    """
    weights = result.weights
    own = {name: task.weights[name] for name in side.options.staying.personal}
    try:
        check_update({name: weights[name] for name in own}, own)
        check_update(result.own, task.weights if result.own else {})
    except ClientError as error:
        raise ClientError(f"has its own tensors that cannot be used: it {error}", tensor=error.tensor) from None
    messages.set_memory(context, side.keep(result))


def _reply(stage: str, message: Message, result: LocalResult) -> Message:
    if stage == "train":
        return messages.train_reply(
            message, extras.without_integers(result.weights), result.num_examples, result.numbers
        )
    return messages.evaluate_reply(message, result.num_examples, result.numbers)


def _with_extras(reply: Message, *results: LocalResult) -> Message:
    """Return a reply that mods have done with, and what they must not see."""
    if not reply.has_error():
        for result in results:
            extras.attach(reply, extras.Extras.of(result.weights, result.metrics, result.notes, result.sent))
    return reply

"""The Flower ClientApp: it knows Flower and not the Trainer."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_fed import messages
from lightning_fed.client.local_fit import LocalOptions, LocalResult, local_evaluate, local_fit, set_up
from lightning_fed.client.local_trainer import LocalTask
from lightning_fed.data import ClientLoaders
from lightning_fed.weights import Weights, split


@dataclass
class ClientSide:
    """All that a client app needs to serve any client.

    Attributes:
        module: The module, which server and clients share within one process.
        options: What all local fits have in common.
        data: ``data(client, round)`` gives a client's loaders.
        datamodule: The server's datamodule, or ``None``.
        mods: Flower client mods by stage, outermost first.
        is_set_up: Whether the module has been set up in this process.
    """

    module: LightningModule
    options: LocalOptions
    data: Callable[[int, int], ClientLoaders]
    datamodule: LightningDataModule | None = None
    mods: dict[str, Sequence[Mod]] = field(default_factory=dict)
    is_set_up: bool = False


def build_client_app(side: ClientSide) -> ClientApp:
    """A ClientApp with a train and an evaluate function, and a query function that tells which client this is."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _serve(side, "train", message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _serve(side, "evaluate", message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        client = context.node_config[messages.CLIENT]
        return Message(RecordDict({messages.CONFIG: ConfigRecord({messages.CLIENT: client})}), reply_to=message)

    return app


def _serve(side: ClientSide, stage: str, message: Message, context: Context) -> Message:
    """Message -> client mods -> local run -> reply; what mods must not see goes around them."""
    integers = messages.detach_integers(message)
    extras = messages.Extras()

    def run(message: Message, context: Context) -> Message:
        result = _run(side, stage, message, context, integers)
        extras.states = result.metrics
        averaged, extras.integers = split(result.weights)
        if stage == "train":
            return messages.train_reply(message, averaged, result.num_examples, result.scalars)
        return messages.evaluate_reply(message, result.num_examples, result.scalars)

    try:
        reply = _with_mods(run, side.mods.get(stage, ()))(message, context)
    except Exception as exception:
        return messages.error_reply(message, exception, traceback.format_exc())
    if not reply.has_error():
        messages.attach_extras(reply, extras)
    return reply


def _with_mods(run: ClientAppCallable, mods: Sequence[Mod]) -> ClientAppCallable:
    for mod in reversed(mods):
        run = _wrap(run, mod)
    return run


def _wrap(inner: ClientAppCallable, mod: Mod) -> ClientAppCallable:
    return lambda message, context: mod(message, context, inner)


def _run(side: ClientSide, stage: str, message: Message, context: Context, integers: Weights) -> LocalResult:
    instruction = messages.read_instruction(message)
    client = int(context.node_config[messages.CLIENT])
    task = LocalTask(
        client=client,
        round=instruction.round,
        seed=instruction.seed,
        weights={**instruction.weights, **integers},
        state=messages.get_fit_state(context) if stage == "train" else None,
        set_up=False,
    )
    work = (side.module, side.datamodule, side.data(client, task.round), task, side.options)
    if not side.is_set_up:
        set_up(*work)
        side.is_set_up = True
    result = local_fit(*work) if stage == "train" else local_evaluate(*work)
    if stage == "train":
        messages.set_fit_state(context, result.state)
    return result

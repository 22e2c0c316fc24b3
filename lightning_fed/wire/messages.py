"""Flower's records as its own strategies and mods expect them.

One ArrayRecord ``arrays`` with all floating tensors, one ConfigRecord ``config`` to the client, one MetricRecord
``metrics`` with ``num-examples`` back. What they must not see travels beside these (``wire/extras.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from lightning_fed._compat.flower import filled
from lightning_fed.tracebacks import frames, plain, words
from lightning_fed.values.weights import Weights
from lightning_fed.wire.tensor_array import TensorArray, decoded

Kind = TypeVar("Kind", ArrayRecord, MetricRecord, ConfigRecord)

Made = dict[int, tuple[bytes, Tensor]]

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
NUM_EXAMPLES, ROUND, SEED, ROUNDS = "num-examples", "server-round", "run-seed", "run-rounds"
CLIENT = "partition-id"
_FIT_STATE, _CALLBACK_STATES = "lightning-fed.fit-state", "lightning-fed.callback-states"
_MEMORY = "lightning-fed.memory"
TRACEBACK = "\nThe client's traceback:\n"  # between the two parts of what an error reply says
CLIENT_RAISED = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def pack(weights: Mapping[str, Tensor]) -> ArrayRecord:
    """Return an ArrayRecord that holds the tensors themselves; the caller must not write into them afterwards."""
    return filled(ArrayRecord(), {name: TensorArray(tensor) for name, tensor in weights.items()})


def unpack(record: ArrayRecord, made: Made | None = None) -> Weights:
    """Return the tensors of a record, to be read and not written: within a process they are the sender's own.

    Args:
        record: A record.
        made: As for ``tensor_of``.
    """
    # The bytes that came once may stand under many names: they take memory once.
    made = {} if made is None else made
    return {name: tensor_of(array, made) for name, array in record.items()}


def tensor_of(array: Array, made: Made | None = None) -> Tensor:
    """Return an array's tensor, to be read and not written.

    Args:
        array: An array.
        made: Tensors by the ``id`` of their bytes, and these; takes in what is made here.

    Raises:
        ValueError: If its bytes are not what its header says.
    """
    tensor = array.__dict__.get("tensor")
    if tensor is None:
        made, data = {} if made is None else made, array.data
        if id(data) not in made:
            made[id(data)] = data, decoded(array)
        tensor = made[id(data)][1]
    return tensor


def first(content: RecordDict, kind: type[Kind]) -> Kind | None:
    """Return the first record of a kind, or ``None``.

    Flower's own ``content.array_records`` makes a reference cycle, which keeps a reply's weights in memory until the
    next garbage collection.
    """
    return next((record for record in content.values() if isinstance(record, kind)), None)


def copy_for_delivery(content: RecordDict) -> RecordDict:
    """Return the same records in containers of their own: who writes into a copy changes nobody else's."""
    return filled(RecordDict(), {key: _copied(record) for key, record in content.items()})


def _copied(record: Any) -> Any:
    if isinstance(record, ArrayRecord):
        return filled(ArrayRecord(), {name: _copy(array) for name, array in record.items()})
    return filled(type(record)(), {key: list(v) if isinstance(v, list) else v for key, v in record.items()})


def _copy(array: Array) -> Array:
    tensor = array.__dict__.get("tensor")
    if tensor is None:
        return Array(array.dtype, tuple(array.shape), array.stype, array.data)
    return TensorArray(tensor)


# ---------------------------------------------------------------------------------------------- server to client


def round_config(round: int, seed: int, rounds: int = -1) -> ConfigRecord:
    """Return the config that goes with every message of a round."""
    return ConfigRecord({ROUND: round, SEED: seed, ROUNDS: rounds})


@dataclass
class Told:
    """What every message tells a client.

    Attributes:
        round: The round, from 1; 0 for a question.
        seed: The run's seed.
        rounds: The rounds of the run, -1 for no limit; ``None`` if a strategy or a mod has left it out.
    """

    round: int
    seed: int
    rounds: int | None


@dataclass
class Instruction(Told):
    """What a client is told for its work: also the weights that strategies average."""

    weights: Weights


def read_told(message: Message) -> Told:
    """Read what any message of a round, or a question, has."""
    config = first(message.content, ConfigRecord) or ConfigRecord()
    rounds = config.get(ROUNDS)
    return Told(_int(config.get(ROUND, 1)), _int(config.get(SEED, 0)), None if rounds is None else _int(rounds))


def read_instruction(message: Message) -> Instruction:
    """Read a train or evaluate message as the client's mods left it."""
    arrays = first(message.content, ArrayRecord)
    assert arrays is not None
    return Instruction(**vars(read_told(message)), weights=unpack(arrays))


def _int(value: Any) -> int:
    return int(value)


# ---------------------------------------------------------------------------------------------- client to server


def train_reply(message: Message, weights: Weights, num_examples: int, scalars: Mapping[str, float]) -> Message:
    """Return the reply to a train message, as strategies and mods expect it."""
    content = {ARRAYS: pack(weights), METRICS: _metrics({**scalars, NUM_EXAMPLES: num_examples})}
    return Message(filled(RecordDict(), content), reply_to=message)


def evaluate_reply(message: Message, num_examples: int, scalars: Mapping[str, float]) -> Message:
    """Return the reply to an evaluate message; ``num_examples`` 0 says that the client has nothing to evaluate on."""
    content = {METRICS: _metrics({**scalars, NUM_EXAMPLES: num_examples})}
    return Message(filled(RecordDict(), content), reply_to=message)


def _metrics(numbers: dict[str, float]) -> MetricRecord:
    """Return the record of numbers, which Flower need not check where they are plain ones."""
    are_plain = all(type(name) is str and type(number) in (int, float) for name, number in numbers.items())
    return filled(MetricRecord(), numbers) if are_plain else MetricRecord({**numbers})


def error_reply(message: Message, exception: BaseException) -> Message:
    """Return the reply of a client that raised: what it says, as text; within a process also the exception itself."""
    trace = frames(exception)
    error = Error(CLIENT_RAISED, TRACEBACK.join([words(exception), *([trace] if trace else [])]))
    error.__dict__["exception"] = exception
    return Message(error, reply_to=message)


def raised(reply: Message) -> tuple[str, BaseException | None]:
    """Return what an error reply says, and the exception itself where it is at hand."""
    return plain(reply.error.reason or "unknown error", 20_000).strip(), reply.error.__dict__.get("exception")


def unreadable(error: Exception) -> str:
    """Return what is wrong with a client that sent what cannot be read, of the error that reading it raised."""
    return f"sent what cannot be read: {plain(words(error), 1000)}"


def num_examples(reply: Message, key: str = NUM_EXAMPLES) -> float:
    """Return the averaging coefficient that a reply carries; 0 if it carries none."""
    record = first(reply.content, MetricRecord)
    value = 0 if record is None else record.get(key, 0)
    return 0.0 if isinstance(value, list) else float(value)


def scalars(record: MetricRecord | None, key: str = NUM_EXAMPLES) -> dict[str, float]:
    """Return the single numbers of a MetricRecord without the averaging coefficient."""
    items = {} if record is None else record
    return {k: float(v) for k, v in items.items() if k != key and not isinstance(v, list)}


def reply_scalars(reply: Message, key: str = NUM_EXAMPLES) -> dict[str, float]:
    """Return the single numbers that a client reports."""
    return scalars(first(reply.content, MetricRecord), key)


# ---------------------------------------------------------------------------------------------- a client's own state


def get_fit_state(context: Context) -> bytes | None:
    """Return what the client keeps of its last fit: optimizers and schedulers with ``client_state="carry"``."""
    return _get(context.state, _FIT_STATE)


def set_fit_state(context: Context, state: bytes | None) -> None:
    """Keep a fit's state with the client, where Flower keeps it from round to round."""
    _set(context, _FIT_STATE, state)


def get_callback_states(context: Context) -> bytes | None:
    """Return what the client's callbacks keep, whatever ``client_state`` is."""
    return callback_states_in(context.state)


def callback_states_in(state: RecordDict) -> bytes | None:
    """Return the same of a client's state."""
    return _get(state, _CALLBACK_STATES)


def set_callback_states(context: Context, states: bytes | None) -> None:
    """Keep the callbacks' states with the client."""
    _set(context, _CALLBACK_STATES, states)


def get_memory(context: Context) -> Weights:
    """Return what the client's methods keep, by ``"method/name"``; to be read and not written."""
    return memory_in(context.state)


def memory_in(state: RecordDict) -> Weights:
    """Return the same of a client's state."""
    record = state.get(_MEMORY)
    return unpack(record) if isinstance(record, ArrayRecord) else {}


def set_memory(context: Context, memory: Weights) -> None:
    """Keep what methods have with the client."""
    if memory:
        context.state[_MEMORY] = pack(memory)
    else:
        context.state.pop(_MEMORY, None)


def _get(state: RecordDict, key: str) -> bytes | None:
    record = state.get(key)
    return cast(bytes, record["bytes"]) if isinstance(record, ConfigRecord) else None


def _set(context: Context, key: str, kept: bytes | None) -> None:
    if kept is None:
        context.state.pop(key, None)
    else:
        context.state[key] = ConfigRecord({"bytes": kept})

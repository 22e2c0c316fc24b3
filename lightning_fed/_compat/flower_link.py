"""What Flower keeps private of the way to a SuperLink: how it is reached, and how messages go up and down.

Flower's objects are named by their content: what the SuperLink has already, another message's weights, is not sent
again.
"""

from __future__ import annotations

import json
import math
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)

from lightning_fed._compat.flower_address import Address, LinkLost, LinkRefuses, LinkUntrusted, PartsGone
from lightning_fed.tracebacks import one_line


def client_at(address: Address, kind: Callable[..., Any], *interceptors: Any) -> Any:
    """Return a client of one of Flower's APIs."""
    try:
        return kind.from_server_address(  # type: ignore[attr-defined]
            address.server, address.insecure, address.root_certificates, interceptors=list(interceptors)
        )
    except ssl.SSLError as error:
        raise LinkUntrusted(f"root_certificates is no list of certificates in PEM form ({error})") from error


def speaks_tls(server: str) -> bool:
    """Return whether somebody answers there with TLS, whoever it is."""
    host, _, port = server.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 3) as plain, context.wrap_socket(plain):
            return True
    except (OSError, ValueError):
        return False


def say_goodbye(say: Callable[[], object], seconds: float) -> None:
    """Say something that the SuperLink had better hear, and wait no longer than that: it may hang."""

    def quietly() -> None:
        with suppress(Exception):
            say()

    thread = threading.Thread(target=quietly, name="superlink-goodbye", daemon=True)
    thread.start()
    thread.join(seconds)


# Besides all that are the SuperLink's own faults, or a proxy's: a time that is over, too early, too many requests.
_LATER = (408, 425, 429)


def _passes(status: int) -> bool:
    return status >= 500 or status in _LATER


@contextmanager
def talking(address: Address) -> Iterator[None]:
    """In the block, what goes wrong on the way is one of this file's errors."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        status, said = error.response.status_code, FlowerError.from_json(error.response.text)
        answer = f"{address.server} answers {status}: {one_line(error.response.text)}".removesuffix(": ")
        if _passes(status):
            raise LinkLost(answer) from error
        what = answer if said is None else f"[code: {said.code}] {said.message}"
        raise LinkRefuses(what, status, None if said is None else said.code) from error
    except httpx.TransportError as error:
        if not address.insecure and any(word in str(error).lower() for word in ("certificate", "ssl", "tls")):
            raise LinkUntrusted(str(error)) from error
        if address.insecure and not isinstance(error, httpx.ConnectError) and speaks_tls(address.server):
            raise LinkUntrusted(f"{address.server} speaks TLS, and insecure=True does not") from error
        raise LinkLost(f"{type(error).__name__}: {error}") from error
    except ObjectPushError as error:
        raise LinkLost(str(error)) from error
    except ObjectPullError as error:
        raise PartsGone(str(error)) from error


# Seconds between two questions for a part that is not there yet, and for how many none may come: Flower itself lets the
# sender begin anew after 180.
_SOONEST, _LATEST, STALLED = 0.05, 1.0, 300.0
_AT_ONCE = 8  # parts that are asked for before it is looked whether one is missing
_TURN = 1.0  # seconds after which others have their turn, however many parts are here


@dataclass
class Traffic:
    """Bytes of messages that went over the wire."""

    received: int = 0
    sent: int = 0


class Arriving:
    """A message on its way: its parts are fetched as its sender sends them, and nobody waits for them in between.

    Args:
        client: A client of the Runtime or the Fleet API.
        node: Whose message it is.
        run_id: The run's number.
        tree: The names of all parts.
        traffic: Counts what comes.
        most: How many bytes it may have.

    Attributes:
        name: The message's.
        parts: What is here; ``assembled`` makes the message of them once that is all.
    """

    def __init__(
        self, client: Any, node: Node, run_id: int, tree: ObjectTree, traffic: Traffic, most: float = math.inf
    ) -> None:
        self._pull = make_pull_object_fn_protobuf(client.PullObject, node, run_id)
        self._missing = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        self._traffic, self._pause, self._due, self._came = traffic, _SOONEST, 0.0, time.monotonic()
        self.name, self.parts, self.most = tree.object_id, dict[str, bytes](), most
        self._size = 0

    def fetch(self) -> bool:
        """Fetch what is there, in the order in which it is sent, for a second or so; return whether that is all.

        Raises:
            ObjectPullError: If the SuperLink has forgotten a part, or none has come for too long.
            ValueError: If there are more bytes than it may have.
        """
        if (now := time.monotonic()) < self._due:
            return False
        came = False
        while self._missing and time.monotonic() < now + _TURN:
            names = self._missing[:_AT_ONCE]
            got = {name: part for name, part in pull_objects(names, self._part).items() if part}
            self._missing = [name for name in names if name not in got] + self._missing[_AT_ONCE:]
            self.parts.update(got)
            size = sum(map(len, got.values()))
            self._traffic.received += size
            self._size += size
            if self._size > self.most:
                raise ValueError(f"{self._size:,} bytes and more; at most {self.most:,.0f} are taken")
            came = came or bool(got)
            if len(got) < len(names):
                break
        self._came = now if came else self._came
        if self._missing and now > self._came + STALLED:
            raise ObjectPullError(self._missing[0], f"nothing of the message has come for {STALLED:g} s.")
        self._pause = _SOONEST if came else min(2 * self._pause, _LATEST)
        self._due = now + self._pause
        return not self._missing

    def _part(self, name: str) -> bytes:
        try:
            return self._pull(name)
        except ObjectUnavailableError:
            return b""


def assembled(name: str, parts: dict[str, bytes], most: float = math.inf) -> Message:
    """Make a message of its parts, which are used up.

    Args:
        name: The message's name.
        parts: Its parts by name.
        most: How many bytes its arrays may have; a part may stand in several.

    Raises:
        Exception: Of any kind, if the parts are no message.
    """
    if math.isfinite(most) and (size := sum(map(_size, parts.values(), repeat(parts)))) > most:
        raise ValueError(f"arrays of {size:,} bytes; at most {most:,.0f} are taken")
    message = inflate_object_from_contents(name, parts)
    if not isinstance(message, Message):
        raise TypeError(f"a {type(message).__name__} and no message")
    message.metadata.__dict__["_message_id"] = name
    return message


def _size(part: bytes, parts: Mapping[str, bytes]) -> int:
    """Return how many bytes an array will have; 0 for a part that is none."""
    kind, names, length = get_object_head_values_from_object_content(part)
    if kind != "Array":
        return 0
    times = Counter(json.loads(part[len(part) - length :])["arraychunk_ids"])
    return sum(len(parts[names[index]]) * count for index, count in times.items())


def upload(
    messages: Sequence[Message],
    announce: Callable[[list[Any], list[ObjectTree]], Any],
    client: Any,
    node: Node,
    run_id: int,
    traffic: Traffic,
) -> list[str]:
    """Send messages and those of their parts that are not there yet; return the messages' names.

    Args:
        messages: All from this node.
        announce: Tells the SuperLink of messages and of the names of their parts, and gives its response.
        client: A client of the Runtime or the Fleet API.
        node: Who sends.
        run_id: The run's number.
        traffic: Counts what goes.
    """
    with no_object_id_recompute():
        parts: dict[str, Any] = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            parts.update(get_all_nested_objects(message))
        trees = [get_object_tree(message) for message in messages]
        bare = [message_to_proto(remove_content_from_message(m) if m.has_content() else m) for m in messages]
        response = announce(bare, trees)
        push = make_push_object_fn_protobuf(client.PushObject, node, run_id, response.session_id)

        over = threading.Event()

        def counted(name: str, content: bytes) -> None:
            in_session(lambda: push(name, content), over)
            traffic.sent += len(content)

        try:
            push_objects(parts, counted, object_ids_to_push=set(response.objects_to_push))
        finally:
            over.set()
            for message in messages:
                _forget_bytes(message)
    return [message.metadata.message_id for message in messages]


# Seconds for which a part is sent again: announced anew, the message would not be asked for it for 180 s.
_INSIST = 10.0


def in_session(push: Callable[[], object], over: threading.Event) -> None:
    """Send a part, again where that may work in a while, until the sender has left."""
    until = time.monotonic() + _INSIST
    while True:
        try:
            push()
            return
        except (httpx.HTTPStatusError, httpx.TransportError) as error:
            refused = isinstance(error, httpx.HTTPStatusError) and not _passes(error.response.status_code)
            if refused or time.monotonic() > until or over.wait(1.0):
                raise


def _forget_bytes(message: Message) -> None:
    """Flower keeps the bytes of an array beside it."""
    for record in message.content.values() if message.has_content() else ():
        for value in record.values():
            getattr(value, "__dict__", {}).pop("_chunks", None)


def readdress(message: Message, *, sender: int, group: str) -> Message:
    """Return the same message, from another address and of another group."""
    message.metadata.__dict__.update(_src_node_id=sender, _group_id=group)
    return message

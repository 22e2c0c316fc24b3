"""What Flower keeps private of a node's side of a SuperLink: a plain script that is a SuperNode."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from flwr.app import Message
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from lightning_fed._compat.flower_address import Address, LinkLost, LinkRefuses, LinkStuck
from lightning_fed._compat.flower_link import Arriving, Traffic, assembled, client_at, say_goodbye, talking, upload

Key = ec.EllipticCurvePrivateKey
NO_STRANGERS = ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED
NOT_ACTIVATED = ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
# Seconds that a node's clock may be ahead of the SuperLink's, and behind: each request is signed with its time.
AHEAD, BEHIND = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
RUN_OVER = ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
# A node counts as gone twice this time after its last sign of life; Flower allows for no less.
INTERVAL = 10.0
_PULSE = 4.0  # seconds between signs of life
_GOODBYE = 2.0  # seconds for a goodbye


def read_key(content: bytes) -> Key:
    """Read a node's private key, in OpenSSH's or PEM form.

    Raises:
        ValueError: If it is none of an elliptic curve.
    """
    load: Callable[..., Any] = load_ssh_private_key if b"OPENSSH" in content else load_pem_private_key
    try:
        key = load(content, None)
    except TypeError as error:  # of a key with a passphrase
        raise ValueError(f"{error} A site starts by itself: write a key without, `ssh-keygen -N ''`") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{type(key).__name__}: it must be a key of an elliptic curve (`ssh-keygen -t ecdsa -b 384`)")
    return key


def new_key() -> Key:
    """Return a key of which nobody knows yet."""
    return generate_key_pairs()[0]


@dataclass
class Received:
    """A message whose parts are still at the SuperLink.

    Attributes:
        run_id: The run's number.
        group: The message's ``group_id``.
        tree: The names of its parts.
        bare: The message without its content, to be answered where that cannot be read.
    """

    run_id: int
    group: str
    tree: ObjectTree
    bare: Message


class NodeConnection:
    """A node's connection to a SuperLink, kept alive by a thread.

    Args:
        address: The SuperLink.
        key: Who the node is.

    Attributes:
        node_id: Flower's address of the node, once it is activated.
        is_lost: Whether the SuperLink does not know the node any more.
        traffic: The bytes of its messages.
    """

    def __init__(self, address: Address, key: Key) -> None:
        public = key.public_key()
        signs = NodeAuthHttpInterceptor(key, public)
        self._address, self._public = address, public_key_to_bytes(public)
        self._client = client_at(
            address, FleetHttpClient, RuntimeVersionHttpInterceptor(component_name="SuperNode"), signs
        )
        self.node_id, self.is_lost, self.traffic = 0, False, Traffic()
        self._over = threading.Event()

    @property
    def _node(self) -> Node:
        return Node(node_id=self.node_id)

    def register(self) -> None:
        """Make a new key known, where the SuperLink takes in anybody."""
        with talking(self._address):
            self._client.RegisterNode(RegisterNodeFleetRequest(public_key=self._public))

    def activate(self, left_behind: int = 0) -> None:
        """Be here from now on.

        Args:
            left_behind: The address under which an earlier process was here that is known to have ended.
        """
        if left_behind:
            with suppress(LinkRefuses), talking(self._address):
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=left_behind))
        with talking(self._address):
            request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=INTERVAL)
            self.node_id = self._client.ActivateNode(request).node_id
        threading.Thread(target=self._live, name="superlink-heartbeat", daemon=True).start()

    def _live(self) -> None:
        alive = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=INTERVAL)
        while not self._over.wait(_PULSE):
            try:
                with talking(self._address):
                    self.is_lost = not self._client.SendNodeHeartbeat(alive).success
            except LinkRefuses:
                self.is_lost = True
            except (ConnectionError, RuntimeError):  # the next one may get through; or the client is closed
                pass

    def next(self) -> Received | None:
        """Return a message for this node, if there is one; each is given once."""
        with talking(self._address):
            response = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        bare = message_from_proto(response.messages_list[0])
        return Received(bare.metadata.run_id, bare.metadata.group_id, response.message_object_trees[0], bare)

    def fetch(self, received: Received) -> Message:
        """Wait for all parts of a message, and return it."""
        arriving = Arriving(self._client, self._node, received.run_id, received.tree, self.traffic)
        with talking(self._address):
            while not arriving.fetch():
                time.sleep(0.05)
        done = ConfirmMessageReceivedRequest(node=self._node, run_id=received.run_id, message_object_id=arriving.name)
        with suppress(ConnectionError), talking(self._address):  # it is here, whether that is heard or not
            self._client.ConfirmMessageReceived(done)
        return assembled(arriving.name, arriving.parts)

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply.

        Args:
            reply: To a message that ``fetch`` gave.
            seconds: How long it took to make.

        Raises:
            LinkStuck: If only a part of it went.
        """
        begun = False

        def announce(bare: list[Any], trees: list[ObjectTree]) -> Any:
            nonlocal begun
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node, messages_list=bare, message_object_trees=trees, clientapp_runtime_list=[seconds]
                )
            )
            begun = True
            return response

        with _stuck_if(lambda: begun), talking(self._address):
            upload([reply], announce, self._client, self._node, reply.metadata.run_id, self.traffic)

    def close(self, *, forget: bool) -> None:
        """Be here no longer.

        Args:
            forget: Whether the SuperLink shall forget its key.
        """
        self._over.set()
        if self.node_id and not self.is_lost:
            say_goodbye(lambda: self._leave(forget), _GOODBYE)
        self._client.close()

    def _leave(self, forget: bool) -> None:
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))
        if forget:
            self._client.UnregisterNode(UnregisterNodeFleetRequest(node_id=self.node_id))


@contextmanager
def _stuck_if(begun: Callable[[], bool]) -> Iterator[None]:
    try:
        yield
    except LinkLost as error:
        if begun():
            raise LinkStuck(str(error)) from error
        raise


def admits_strangers(address: Address) -> bool:
    """Return whether a SuperLink takes in nodes whose keys nobody has registered there: one tries, and leaves."""
    stranger = NodeConnection(address, new_key())
    try:
        stranger.register()
        stranger.activate()
    except LinkRefuses as error:
        return error.code != NO_STRANGERS
    finally:
        stranger.close(forget=True)
    return True

"""What Flower keeps private of the server's side of a SuperLink: a run that a plain script serves."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

from flwr.app import Message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID, Status, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient

from lightning_fed._compat.flower import server_identity
from lightning_fed._compat.flower_address import Address, LinkLost, LinkRefuses, LinkUntrusted, PartsGone
from lightning_fed._compat.flower_link import Arriving, Traffic, assembled, client_at, say_goodbye, talking, upload
from lightning_fed._compat.flower_node import admits_strangers

# What the SuperLink says of a run that was stopped, or that it has forgotten.
RUN_GONE = frozenset({ApiErrorCode.RUNTIME_AUTHENTICATION_FAILED, ApiErrorCode.RUN_ID_NOT_FOUND})
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_PULSE = 10.0  # seconds between signs of life
# Flower wants an app to start a run with. Nobody runs this one, and nothing else is sent.
_APP = {
    "pyproject.toml": b"""[project]
name = "lightning-fed"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "lightning-fed"
[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
[tool.flwr.app.config]
server-host = ""
server-pid = 0
server-since = ""
""",
    "nothing.py": b"app = None\n",
}


def unfinished_runs(address: Address) -> dict[int, dict[str, Any]]:
    """Return the runs of a SuperLink that are waiting or running: what each was started with."""
    with _control(address) as control:
        listed = control.ListRuns(ListRunsRequest())
    runs = {run_id: run_from_proto(run) for run_id, run in listed.run_dict.items()}
    return {key: dict(run.override_config) for key, run in runs.items() if run.status.status != Status.FINISHED}


def stop_run(address: Address, run_id: int) -> None:
    """End a run; its messages are forgotten."""
    with suppress(LinkRefuses), _control(address) as control:  # somebody was faster
        control.StopRun(StopRunRequest(run_id=run_id))


@contextmanager
def _control(address: Address) -> Iterator[Any]:
    client = client_at(address, ControlHttpClient, RuntimeVersionHttpInterceptor(component_name="flwr CLI"))
    try:
        with talking(address):
            yield client
    finally:
        client.close()


@contextmanager
def served_run(address: Address, secret: bytes | None, config: Mapping[str, str | int]) -> Iterator[ServedRun]:
    """Start a run and serve it: in the block this process is the run's ServerApp.

    Args:
        address: The SuperLink.
        secret: What ``--superexec-auth-secret-file`` holds, or ``None``.
        config: What others see of the run.

    Raises:
        LinkLost: If the SuperLink does not answer, or hands the run's task to somebody else.
        LinkRefuses: If it refuses.
        LinkUntrusted: If there is no TLS connection that can be trusted.
    """
    content, _ = build_fab_from_files(_APP)
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    with _control(address) as control:
        started = control.StartRun(StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(config))))
    try:
        token = _claim(address, secret, started.run_id)
    except BaseException:
        with suppress(Exception):
            stop_run(address, started.run_id)
        raise
    run = ServedRun(address, token)
    try:
        with server_identity(run.run.run_id):
            yield run
    except BaseException as error:
        run.close(SubStatus.FAILED, f"{type(error).__name__}: {error}"[:500], 2.0)
        raise
    run.close(SubStatus.COMPLETED, "", 30.0)


def _claim(address: Address, secret: bytes | None, run_id: int) -> str:
    """Return the token of the run's task, which the SuperLink hands to whoever asks first."""
    signs = (
        [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))] if secret else []
    )
    client = client_at(address, RuntimeHttpClient, RuntimeVersionHttpInterceptor(component_name="SuperExec"), *signs)
    until = time.monotonic() + 10
    try:
        while time.monotonic() < until:
            with talking(address):
                got = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if got.HasField("task") and got.token and got.task.run_id == run_id:
                return str(got.token)
            time.sleep(0.1)
    finally:
        client.close()
    raise LinkLost(
        "somebody else has taken the run: was the SuperLink started with `flower-superlink --isolation process`, and"
        " does no other server use it?"
    )


class ReplyUnderWay:
    """A reply on its way.

    Args:
        arriving: Its parts.
        group: The ``group_id`` that its sender gave it.
        confirm: Is told its name when all of them are here.
        address: The SuperLink.
    """

    def __init__(self, arriving: Arriving, group: str, confirm: Callable[[str], None], address: Address) -> None:
        self.group, self._arriving, self._confirm, self._address = group, arriving, confirm, address

    def take(self) -> Message | Exception | None:
        """Return the reply once all of it is here, and ``None`` until then.

        One whose parts do not come any more is a ``PartsGone``, one that is no message whatever reading it raised.

        Raises:
            LinkLost: If the SuperLink does not answer; what has come of the reply stays.
        """
        arriving = self._arriving
        try:
            with talking(self._address):
                if not arriving.fetch():
                    return None
        except (PartsGone, LinkRefuses, LinkUntrusted, ValueError) as error:
            return error
        self._confirm(arriving.name)
        try:
            return assembled(arriving.name, arriving.parts, arriving.most)
        except Exception as error:
            return error


class ServedRun:
    """A run whose ServerApp this process is.

    Args:
        address: The SuperLink.
        token: Of the run's task.

    Attributes:
        run: Flower's description of it.
        traffic: The bytes of its messages.
    """

    def __init__(self, address: Address, token: str) -> None:
        self._address = address
        self._client = client_at(
            address,
            RuntimeHttpClient,
            RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
            RuntimeTokenHttpInterceptor(token=token),
        )
        with talking(address):
            given = self._client.PullTaskInput(PullTaskInputRequest())
        self.run: Run = run_from_proto(given.run)
        self.traffic = Traffic()
        self._context = context_from_proto(given.context)
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._over = threading.Event()
        self._stopped = False
        threading.Thread(target=self._live, name="superlink-heartbeat", daemon=True).start()

    def _live(self) -> None:
        while not self._over.wait(_PULSE):
            try:
                with talking(self._address):
                    self._stopped = not self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
            except LinkRefuses:
                self._stopped = True
            except (ConnectionError, RuntimeError):  # the next one may get through; or the client is closed
                pass

    @property
    def is_stopped(self) -> bool:
        """Whether somebody has ended the run at the SuperLink."""
        return self._stopped

    def nodes(self) -> list[NodeInfo]:
        """Return the nodes that are there now."""
        with talking(self._address):
            return list(self._client.GetNodes(GetNodesRequest()).nodes)

    @cached_property
    def admits_strangers(self) -> bool:
        """Whether the SuperLink takes in nodes whose keys nobody has registered: then a key tells not who one is."""
        return admits_strangers(self._address)

    def push(self, messages: Sequence[Message]) -> list[str]:
        """Send messages; return the name of each, empty for one that the SuperLink does not take: its node has gone."""
        taken: list[str] = []

        def announce(bare: list[Any], trees: list[ObjectTree]) -> Any:
            request = PushAppMessagesRequest(messages_list=bare, message_object_trees=trees)
            response = self._client.PushMessages(request)
            taken[:] = response.message_ids
            return response

        with talking(self._address):
            upload(messages, announce, self._client, self._node, self.run.run_id, self.traffic)
        return taken

    def pull(self, names: Sequence[str], most: float) -> Iterator[tuple[str, ReplyUnderWay]]:
        """Give the replies that have begun to come to messages of these names, each once, with what it answers.

        Args:
            names: Names of messages.
            most: How many bytes a reply may have.
        """
        with talking(self._address):
            response = self._client.PullMessages(PullAppMessagesRequest(message_ids=names))
        for bare, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            arriving = Arriving(self._client, self._node, self.run.run_id, tree, self.traffic, most)
            under_way = ReplyUnderWay(arriving, bare.metadata.group_id, self._confirm, self._address)
            yield bare.metadata.reply_to_message_id, under_way

    def _confirm(self, name: str) -> None:
        received = ConfirmMessageReceivedRequest(node=self._node, run_id=self.run.run_id, message_object_id=name)
        with suppress(ConnectionError), talking(self._address):  # it is here, whether that is heard or not
            self._client.ConfirmMessageReceived(received)

    def close(self, status: str, details: str, seconds: float) -> None:
        """End the run; wait for a SuperLink that does not answer for no longer than that."""
        self._over.set()
        output = PushTaskOutputRequest(context=context_to_proto(self._context), sub_status=status, details=details)
        say_goodbye(lambda: self._client.PushTaskOutput(output), seconds)
        self._client.close()

"""The network engine: the server is the user's script, clients are sites that joined a Flower SuperLink.

::

    flower-superlink --isolation process ...        Flower's own program, where both sides can reach it
    trainer.fit(model)                              the server: starts a run there and serves it
    trainer.join("host:8000", model, client=2)      a site: its own module, code and data

Nothing but weights and numbers goes over the network, and nothing is unpickled on either side.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_fed._compat.flower_address import Address, LinkLost, LinkRefuses, LinkUntrusted
from lightning_fed.checks import is_number
from lightning_fed.engines.base import Engine
from lightning_fed.engines.local_link import local_link
from lightning_fed.errors import ConfigurationError
from lightning_fed.wire.address import Where, read_file, untrusted

T = TypeVar("T")


class SuperLink(Engine):
    """Runs clients at sites that joined a Flower SuperLink.

    The SuperLink has to run with ``--isolation process``, and serves one server at a time. A site that is lost in a
    round and comes back gets its work again; one that does not is a client that failed.

    Args:
        address: ``"host:port"``.
        root_certificates: A file with the certificates to trust, PEM; by default the machine's own list.
        secret_file: The file that the SuperLink has as ``--superexec-auth-secret-file``.
        insecure: Do without TLS: whoever is on the network between can read and change everything.
        min_clients: How many clients have to be here when the run begins; by default all.
        connect_timeout: Seconds to wait for them, and in a run for a SuperLink that does not answer.
        return_timeout: Seconds that a site that is lost in a round has to come back.
        max_reply_bytes: How many bytes a reply may have; by default twice the weights and 128 MiB for metrics.

    Raises:
        ConfigurationError: If an argument makes no sense, or a file cannot be read.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, engine=SuperLink("127.0.0.1:8000", insecure=True))
    """

    name = "superlink"
    can_vectorize = False

    def __init__(
        self,
        address: str,
        *,
        root_certificates: str | os.PathLike[str] | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        min_clients: int | None = None,
        connect_timeout: float = 600.0,
        return_timeout: float = 30.0,
        max_reply_bytes: int | None = None,
    ) -> None:
        # The files are the server's: a site may build the same trainer, and not have them.
        self.where = Where("SuperLink", address, insecure, root_certificates)
        self._secret_file = secret_file
        for name, value in {"connect_timeout": connect_timeout, "return_timeout": return_timeout}.items():
            if not (is_number(value) and value >= 0):
                raise ConfigurationError(f"SuperLink({name}={value!r}): write a number of seconds, at least 0.")
        for name, count in {"min_clients": min_clients, "max_reply_bytes": max_reply_bytes}.items():
            if count is not None and not (is_number(count, whole=True) and count >= 1):
                raise ConfigurationError(f"SuperLink({name}={count!r}): write a whole number, at least 1.")
        self._min_clients, self._connect, self._back = min_clients, connect_timeout, return_timeout
        self._max_reply_bytes = max_reply_bytes
        self._link: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    def local(
        cls,
        port: int = 8000,
        *,
        min_clients: int | None = None,
        connect_timeout: float = 600.0,
        return_timeout: float = 30.0,
        max_reply_bytes: int | None = None,
    ) -> SuperLink:
        """Start a SuperLink on this machine with each run, and end it with the run.

        It listens on the loopback interface, without TLS: for a try on one machine.

        Args:
            port: Where it listens.
            min_clients, connect_timeout, return_timeout, max_reply_bytes: As for a SuperLink elsewhere.
        """
        engine = cls(
            f"127.0.0.1:{port}",
            insecure=True,
            min_clients=min_clients,
            connect_timeout=connect_timeout,
            return_timeout=return_timeout,
            max_reply_bytes=max_reply_bytes,
        )
        engine._link = lambda: local_link(port)
        return engine

    def run(self, main: Callable[[Grid], T], client_app: ClientApp, num_clients: Callable[[], int]) -> T:
        """See ``Engine``; ``client_app`` is not run here, for the sites have their own.

        Raises:
            ConfigurationError: If there is no SuperLink that takes this server.
        """
        from lightning_fed._compat.flower_server import served_run
        from lightning_fed.engines.superlink_grid import Patience, SuperLinkGrid

        address = self.where.address()
        secret = None if self._secret_file is None else read_file("SuperLink", "secret_file", self._secret_file)
        with self._link():
            began = False
            try:
                self._end_what_is_left(address)
                with served_run(address, secret, _about_this_process()) as run:
                    began = True
                    patience = Patience(self._connect, self._back)
                    return main(SuperLinkGrid(run, num_clients, self._min_clients, patience, self._max_reply_bytes))
            except (LinkLost, LinkRefuses, LinkUntrusted) as error:
                if began:
                    raise
                raise ConfigurationError(self._explain(error)) from error

    def _end_what_is_left(self, address: Address) -> None:
        """End the runs of servers that have ended without: sites would work on for them."""
        from lightning_fed._compat.flower_server import stop_run, unfinished_runs

        for run_id, about in self._unfinished(lambda: unfinished_runs(address)).items():
            host, pid = about.get("server-host"), about.get("server-pid")
            if host is None:
                raise ConfigurationError(
                    f"The SuperLink at {address.server} has a run of somebody else ({run_id}, see `flwr list`): it"
                    " serves one at a time. Wait for its end, or start another SuperLink."
                )
            if host == socket.gethostname() and isinstance(pid, int) and pid != os.getpid() and _is_alive(pid):
                raise ConfigurationError(
                    f"Another server (process {pid} on this machine) uses the SuperLink at {address.server}: it"
                    " serves one at a time. Wait for its end, or start another SuperLink."
                )
            rank_zero_warn(
                f"Ends run {run_id}, which a server left behind (process {pid} on {host}, since"
                f" {about.get('server-since')})."
            )
            stop_run(address, run_id)

    def _unfinished(self, ask: Callable[[], dict[int, dict[str, object]]]) -> dict[int, dict[str, object]]:
        """Return the runs there; wait for a SuperLink that is just starting."""
        until, said = time.monotonic() + min(self._connect, 30.0), False
        while True:
            try:
                return ask()
            except LinkLost:
                if time.monotonic() > until:
                    raise
            if not said:
                rank_zero_info(f"Waiting for a SuperLink at {self.where.server}")
                said = True
            time.sleep(0.2)

    def _explain(self, error: Exception) -> str:
        where = self.where.server
        if isinstance(error, LinkUntrusted):
            return f"SuperLink({where!r}): {untrusted(error)}"
        if isinstance(error, LinkRefuses) and error.status in (401, 403):
            given = "secret_file is not the one that it has" if self._secret_file else "it wants a secret_file="
            return f"The SuperLink at {where} does not take this server ({error}): {given}."
        if isinstance(error, LinkRefuses):
            return f"The SuperLink at {where} does not take this server: {error}"
        return (
            f"No SuperLink serves this script at {where}: {error}. Start one, `flower-superlink --isolation process`"
            " with TLS or --insecure, or write SuperLink.local()."
        )


def _about_this_process() -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"server-host": socket.gethostname(), "server-pid": os.getpid(), "server-since": since}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True

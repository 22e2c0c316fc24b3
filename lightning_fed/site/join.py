"""Joining a federation: from what a user writes to a site that works."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

from lightning_fed._compat.flower_node import Key, read_key
from lightning_fed.client.app import build_client_app
from lightning_fed.client.side import ClientSide
from lightning_fed.errors import ConfigurationError
from lightning_fed.site.likeness import Likeness
from lightning_fed.site.resident import Membership, Site
from lightning_fed.site.states import StateFolder
from lightning_fed.wire.address import Where, read_file

File = str | os.PathLike[str]


class Joining(TypedDict, total=False):
    """How a site joins; all of it may be left out.

    Attributes:
        root_certificates: A file with the certificates to trust, PEM; by default the machine's own list.
        private_key: A file with the site's key, of which the SuperLink knows the public half.
        insecure: Do without TLS: whoever is on the network between can read and change everything.
        state_dir: The folder for what the client keeps from round to round, which must outlive the process; by default
            ``client-<k>`` in the trainer's ``default_root_dir``.
        lease: Seconds to wait at the start for a place that a process which is gone still has; 65 by default.
    """

    root_certificates: File | None
    private_key: File | None
    insecure: bool
    state_dir: File | None
    lease: float


def join(
    address: str,
    side: ClientSide,
    client: int,
    *,
    root_certificates: File | None = None,
    private_key: File | None = None,
    insecure: bool = False,
    state_dir: File | None = None,
    lease: float = 65.0,
) -> None:
    """Work as a client until Ctrl-C or SIGTERM; arguments as ``FederatedTrainer.join``, and all that its work needs.

    Raises:
        ConfigurationError: If there is no such client or key, or the SuperLink does not let it join.
    """
    where = Where("join", address, insecure, root_certificates).address()
    if not isinstance(client, int) or client < 0:
        raise ConfigurationError(f"join(client={client!r}): write this client's number, from 0.")

    folder = Path(state_dir or Path(side.options.trainer["default_root_dir"]) / f"client-{client}")
    member = Membership(where, client, None if private_key is None else _key(private_key), lease)
    Site(build_client_app(side), Likeness(side, client).require, member, StateFolder(folder, client)).serve()


def _key(path: File) -> Key:
    try:
        return read_key(read_file("join", "private_key", path))
    except ValueError as error:
        raise ConfigurationError(f"join(private_key={os.fspath(path)!r}): {error}.") from error

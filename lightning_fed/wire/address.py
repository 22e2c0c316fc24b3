"""Where a SuperLink is, as a user writes it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lightning_fed._compat.flower_address import Address
from lightning_fed.errors import ConfigurationError

WAYS_TO_TRUST = (
    "Write root_certificates= with the certificate that signed the SuperLink's, and the name in the address as it is in"
    " that certificate; insecure=True only for a SuperLink that was started with --insecure."
)


@dataclass(frozen=True)
class Where:
    """An address and whom to trust, as they were given to somebody.

    Attributes:
        owner: Whom they were given to.
        server: ``host:port``.
        insecure: Whether to do without TLS.
        root_certificates: A file with the certificates to trust, PEM.

    Raises:
        ConfigurationError: If it is no address, or contradicts itself.
    """

    owner: str
    server: str
    insecure: bool = False
    root_certificates: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        host, _, port = str(self.server).rpartition(":")
        if not isinstance(self.server, str) or not host or not port.isdigit() or "/" in self.server:
            raise ConfigurationError(
                f"{self.owner}({self.server!r}): write 'host:port', such as 'fl.example.org:8000'."
            )
        if self.insecure and self.root_certificates is not None:
            raise ConfigurationError(
                f"{self.owner}(insecure=True, root_certificates=...): there are no certificates without TLS. Leave one"
                " out."
            )

    def address(self) -> Address:
        """Return the address, with the certificates read.

        Raises:
            ConfigurationError: If they cannot be.
        """
        roots = self.root_certificates
        content = None if roots is None else read_file(self.owner, "root_certificates", roots)
        return Address(self.server, self.insecure, content)


def read_file(owner: str, name: str, path: str | os.PathLike[str]) -> bytes:
    """Read a file that a user named.

    Raises:
        ConfigurationError: If it cannot be read.
    """
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{owner}({name}={os.fspath(path)!r}): it cannot be read: {error}") from error

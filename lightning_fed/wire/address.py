"""Where a SuperLink is, as a user writes it."""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from lightning_fed._compat.flower_address import Address, LinkUntrusted
from lightning_fed.errors import ConfigurationError

_WAYS_TO_TRUST = (
    "Write root_certificates= with the certificate that signed the SuperLink's, and the name in the address as it is in"
    " that certificate; insecure=True only for a SuperLink that was started with --insecure."
)


_SERVER = re.compile(r"(?:[^\s/:\[\]]+|\[[0-9A-Fa-f:.%\w]+\]):([0-9]{1,5})")


def untrusted(error: LinkUntrusted) -> str:
    """Return a sentence on why there is no trusted connection, and the way out."""
    for found, said in {"has expired": "has expired", "not yet valid": "is not valid yet"}.items():
        if found in str(error):
            return f"the SuperLink's certificate {said}, or this machine's clock is wrong ({error})."
    return f"there is no trusted connection: {error}. {_WAYS_TO_TRUST}"


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
        found = _SERVER.fullmatch(self.server) if isinstance(self.server, str) else None
        if found is None or not 1 <= int(found[1]) <= 65535:
            raise ConfigurationError(
                f"{self.owner}({self.server!r}): write 'host:port', such as 'fl.example.org:8000' or '[::1]:8000', with"
                " a port from 1 to 65535."
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
        if roots is not None and content is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode())
            except (ValueError, ssl.SSLError) as error:
                raise ConfigurationError(
                    f"{self.owner}(root_certificates={os.fspath(roots)!r}): there are no certificates in PEM form:"
                    f" {error}"
                ) from error
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

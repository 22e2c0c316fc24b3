"""Where a SuperLink is, and what can go wrong on the way there. Costs nothing to import, unlike the way itself."""

from __future__ import annotations

from dataclasses import dataclass


class LinkLost(ConnectionError):
    """The SuperLink does not answer, or lost what it was sent; the same again may work."""


class PartsGone(LinkLost):
    """The SuperLink has forgotten the message; it does not come again."""


class LinkStuck(LinkLost):
    """The SuperLink has a part of a message, and asks for the rest no more: what was to be sent has to go anew."""


class LinkRefuses(ConnectionError):
    """The SuperLink answers, and refuses.

    Attributes:
        status: The HTTP status.
        code: Flower's number of the reason, or ``None``.
    """

    def __init__(self, what: str, status: int, code: int | None = None) -> None:
        super().__init__(what)
        self.status, self.code = status, code


class LinkUntrusted(ConnectionError):
    """The two sides do not agree on TLS, or the SuperLink's certificate is not signed by whom we trust."""


@dataclass(frozen=True)
class Address:
    """Where a SuperLink is.

    Attributes:
        server: ``host:port``.
        insecure: Whether to do without TLS.
        root_certificates: Whom to trust, PEM; ``None`` for the machine's own list.
    """

    server: str
    insecure: bool = False
    root_certificates: bytes | None = None

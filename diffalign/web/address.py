"""Where a server listens, who may speak to it, and by which names."""

import ipaddress
import re
import secrets
import socket
from dataclasses import dataclass, field

from diffalign.errors import DiffalignError

TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")
"""The form of a token: it can stand in an address as it is, and is too long to guess."""
LOCAL_NAMES = ("localhost", "ip6-localhost")


def new_token() -> str:
    """Return a random token of 32 characters."""
    return secrets.token_urlsafe(24)


def is_ip(host: str) -> bool:
    """Return whether a host is written as an IP address."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine can reach a server bound to this host."""
    return host in LOCAL_NAMES or (is_ip(host) and ipaddress.ip_address(host.partition("%")[0]).is_loopback)


@dataclass(frozen=True)
class Address:
    """A host and a port to listen on; port 0 is any free one.

    token: what each request must carry, None for nothing. A host that other machines reach always has one: without yours,
    a random one is made (`made_token`). names: host names by which the server may be addressed besides localhost, `host`,
    the machine's own name and IP addresses. A request to another name is refused: a web site could have its name point here.

    Raises DiffalignError for a port or a token that cannot be used.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    names: tuple[str, ...] = ()
    made_token: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise DiffalignError(f"port {self.port}: use one from 1 to 65535, or 0 for any free one")
        if self.token is None and not is_loopback(self.host):
            object.__setattr__(self, "token", new_token())
            object.__setattr__(self, "made_token", True)
        if self.token is not None and not TOKEN.fullmatch(self.token):
            raise DiffalignError("the token must have 16 to 256 characters: letters, digits and . _ ~ -")

    def allows(self, host: str) -> bool:
        """Return whether a request may name this host, without its port: an IP address, or one of the known names.

        A name that somebody else controls can be made to point to this machine (DNS rebinding); an IP address cannot.
        """
        host = host.lower().rstrip(".")
        known = {*LOCAL_NAMES, self.host, socket.gethostname(), *self.names}
        return is_ip(host) or host.endswith(".localhost") or host in {name.lower().rstrip(".") for name in known}

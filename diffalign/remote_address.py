"""Read the address of a served reward: `http://host:8000/hpsv2`."""

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from diffalign.errors import DiffalignError
from diffalign.redaction import redact

TOKEN_KEY = "DIFFALIGN_TOKEN"
"""Environment variable with the token of a server, for both sides."""


@dataclass(frozen=True)
class RemoteAddress:
    """root: scheme, host and port. label: of a reward there, None for the only one. loopback: it is this machine."""

    root: str
    label: str | None
    token: str | None = field(repr=False)
    loopback: bool


def remote_address(url: str, token: str | None = None) -> RemoteAddress:
    """Return the parts of an address. The token may also stand in it, as `diffalign serve` prints it.

    Raises DiffalignError for what is no address of a server.
    """
    shown = redact(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise DiffalignError(f"reward remote: url {shown}: {error}") from None
    label = parts.path.strip("/") or None
    if parts.username or parts.password:
        raise DiffalignError(
            f"reward remote: url {shown}: leave the token out of the address; put it into DIFFALIGN_TOKEN, or set token"
        )
    if parts.scheme not in ("http", "https") or not host or parts.fragment or set(query) - {"token"}:
        raise DiffalignError(f"reward remote: url {shown}: write http://host:port/reward or https://host:port/reward")
    token = token or query.get("token", [None])[0]
    if token is not None and not (token.isascii() and token.isprintable()):
        raise DiffalignError("reward remote: the token may hold letters, digits and . _ ~ - alone")
    named = f"[{host}]" if ":" in host else host
    return RemoteAddress(f"{parts.scheme}://{named}{f':{port}' if port else ''}", label, token, _is_loopback(host))


def remote_label(url: object) -> str:
    """Return what the columns of the reward at an address are called: the label in it, or `remote`."""
    return (remote_address(url).label if isinstance(url, str) else None) or "remote"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")

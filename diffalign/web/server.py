"""Run an app on a host and a port until a signal asks it to stop, or in a thread."""

import errno
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from diffalign.errors import DiffalignError, brief
from diffalign.progress import say
from diffalign.web.address import Address

BACKLOG = 1024
EVERY_HOST = ("0.0.0.0", "::")
"""Hosts that stand for all addresses of the machine."""


@dataclass(frozen=True)
class Listener:
    """A socket that is bound to an address and its port."""

    address: Address
    socket: socket.socket

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    @property
    def root(self) -> str:
        """Return the address of the server, without a token: `http://127.0.0.1:8000`."""
        return self._root(socket.gethostname() if self.address.host in EVERY_HOST else self.address.host)

    @property
    def url(self) -> str:
        """Return what to open in a browser: the root, with the token if there is one."""
        return self._with_token(self.root)

    @property
    def urls(self) -> list[str]:
        """Return `url`, and the same by IP address where the server listens on all: phones seldom know a machine's name."""
        number = own_ip() if self.address.host in EVERY_HOST else None
        return [self.url, *([self._with_token(self._root(number))] if number else [])]

    def _root(self, host: str) -> str:
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def _with_token(self, root: str) -> str:
        return f"{root}/" + (f"?token={self.address.token}" if self.address.token else "")


def own_ip() -> str | None:
    """Return the IP address by which the network reaches this machine; None without a network. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for examples: a datagram socket only asks for the route
        except OSError:
            return None
        return str(probe.getsockname()[0])


def show_address(listener: Listener, what: str) -> None:
    """Print what lies at the address, and the address to open.

    The token stands in it on a terminal, and wherever the token was made here, since nobody else knows it.
    """
    whole = listener.address.made_token or sys.stdout.isatty()
    for place, url in enumerate(listener.urls):
        line = f"{'or' if place else what}: {url}"
        if whole:
            print(line, flush=True)  # not say, which hides tokens
        else:
            say(line)


@contextmanager
def listen(address: Address) -> Iterator[Listener]:
    """Bind a socket to an address and close it at the end. Raises DiffalignError if that is not possible."""
    where = f"{address.host}:{address.port}"
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        # So that a server can be started again at once on the port of one that has just ended.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        bound.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise DiffalignError(f"{where}: another program listens there; choose another --port") from None
        raise DiffalignError(f"{where}: cannot listen there: {brief(error)}; choose another --host or --port") from None
    with bound:
        yield Listener(address, bound)


class _Server(uvicorn.Server):
    """uvicorn, but a signal ends it as an orderly stop: uvicorn would raise the signal a second time at the end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(app: ASGIApp, listener: Listener, drain: int = 30) -> None:
    """Serve until SIGTERM or Ctrl-C: take no new requests, answer those that are running within `drain` seconds, return.

    A second Ctrl-C returns at once. Must be called in the main thread.
    """
    _server(app, drain).run(sockets=[listener.socket])


@contextmanager
def running(app: ASGIApp, listener: Listener, drain: int = 30) -> Iterator[str]:
    """Serve in a thread while the block runs; yield the root address. Ends as `serve` does."""
    server = _server(app, drain)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.socket]}, name="web", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield listener.root
    finally:
        server.should_exit = True
        thread.join()


def _server(app: ASGIApp, drain: int) -> _Server:
    # It logs every byte that it does not expect in a form; the sender gets an error.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    return _Server(
        uvicorn.Config(
            app,
            log_config=None,  # what is logged goes where the program's own lines go
            log_level="warning",
            access_log=False,  # an address may hold a token
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=drain,
        )
    )

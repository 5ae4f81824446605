"""The local server that pages and services share: who may speak to it, how much, and how it ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffalign import web
from diffalign.errors import DiffalignError
from helpers.processes import environment

TOKEN = "0123456789abcdef"
LIMITS = web.Limits(body=1000, bodies=3000)


async def echo(request: Request) -> Response:
    return JSONResponse({"bytes": len(await request.body())})


async def show(request: Request) -> Response:
    return web.page(lambda nonce: f'<script nonce="{nonce}">1</script>')


async def mistake(request: Request) -> Response:
    raise DiffalignError("the folder\nis not there")


async def bug(request: Request) -> Response:
    raise KeyError("secret detail")


ROUTES = [
    Route("/", show),
    Route("/echo", echo, methods=["POST"]),
    Route("/mistake", mistake),
    Route("/bug", bug),
    Route("/health", show),
]


@contextlib.contextmanager
def served(address: web.Address, limits: web.Limits = LIMITS) -> Iterator[httpx.Client]:
    app = web.build_app(ROUTES, address, limits, open_paths=("/health",))
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(web.running(app, stack.enter_context(web.listen(address))))
        yield stack.enter_context(httpx.Client(base_url=root, timeout=30))


@pytest.fixture(scope="module")
def local() -> Iterator[httpx.Client]:
    with served(web.Address(port=0)) as client:
        yield client


@pytest.fixture(scope="module")
def with_token() -> Iterator[httpx.Client]:
    with served(web.Address(port=0, token=TOKEN, names=("Gpu1.example",))) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "status", "line"),
    [
        ("/mistake", 400, "the folder is not there"),
        ("/bug", 500, "the server failed (KeyError); its log says where"),
        ("/nothing", 404, "Not Found"),
        ("/echo", 405, "Method Not Allowed"),
    ],
)
def test_an_error_is_json_of_one_line(local: httpx.Client, path: str, status: int, line: str) -> None:
    answer = local.get(path)
    assert (answer.status_code, answer.json()) == (status, {"error": line})
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:99", 200),
        ("[::1]:99", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_a_strange_name_for_this_machine_is_refused(local: httpx.Client, host: str, status: int) -> None:
    assert local.get("/", headers={"Host": host}).status_code == status


def test_a_page_of_another_origin_may_not_send(local: httpx.Client) -> None:
    root = str(local.base_url).rstrip("/")
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403), (root, 200)):
        assert local.post("/echo", content=b"x", headers={"Origin": origin}).status_code == status, origin


def test_a_page_runs_its_own_scripts_alone(local: httpx.Client) -> None:
    first, second = local.get("/"), local.get("/")
    policies = [answer.headers["content-security-policy"] for answer in (first, second)]
    assert (
        policies[0] != policies[1] and "default-src 'none'" in policies[0] and "frame-ancestors 'none'" in policies[0]
    )
    nonce = policies[0].split("'nonce-")[1].split("'")[0]
    assert f'nonce="{nonce}"' in first.text


def test_a_token_is_asked_for(with_token: httpx.Client) -> None:
    wrong = ["", "Bearer wrong", f"Bearer {TOKEN}x", TOKEN, "Basic !!", f"Basic {TOKEN}", "Basic eDp5"]
    for header in wrong:
        answer = with_token.get("/", headers={"Authorization": header, "Cookie": "a=b"})
        assert answer.status_code == 401 and "token" in answer.json()["error"] and TOKEN not in answer.text
    assert with_token.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert with_token.get("/", auth=("anybody", TOKEN)).status_code == 200
    assert with_token.post(f"/echo?token={TOKEN}", content=b"x").json() == {"bytes": 1}
    assert with_token.get("/health").status_code == 200
    assert with_token.get("/health", headers={"Host": "gpu1.EXAMPLE:80"}).status_code == 200


def test_a_browser_keeps_the_token_as_a_cookie(with_token: httpx.Client) -> None:
    with httpx.Client(base_url=with_token.base_url, headers={"Accept": "text/html"}) as browser:
        answer = browser.get(f"/?token={TOKEN}&next=1")
        assert (answer.status_code, answer.headers["location"]) == (303, "/?next=1")
        assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=lax" in answer.headers["set-cookie"]
        assert browser.get("/").status_code == 200
        assert (
            browser.get(f"{str(with_token.base_url).rstrip('/')}//evil.example/?token={TOKEN}").headers["location"]
            == "/evil.example/"
        )


def test_a_body_above_the_limit_is_refused(local: httpx.Client) -> None:
    pieces = (b"x" * 400 for _ in range(3))
    assert local.post("/echo", content=b"x" * 1000).json() == {"bytes": 1000}
    for body in (b"x" * 1001, pieces):  # with its length said before, and without
        answer = local.post("/echo", content=body)
        assert answer.status_code == 413 and "more than 1000 bytes" in answer.json()["error"]


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(served(web.Address(port=0), web.Limits(seconds=0.3)))
        slow = stack.enter_context(socket.create_connection(("127.0.0.1", client.base_url.port or 0)))
        slow.sendall(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc")
        slow.settimeout(30)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_bodies_are_bounded_together(local: httpx.Client) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", local.base_url.port or 0)))
            slow.sendall(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" + b"x" * 999)
        until = time.monotonic() + 30
        while (answer := local.post("/echo", content=b"x" * 500)).status_code == 200:
            assert time.monotonic() < until  # the slow bodies arrive when the server comes to them
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    while local.post("/echo", content=b"x" * 500).status_code != 200:
        assert time.monotonic() < until


def test_another_host_has_a_token() -> None:
    assert web.Address().token is None and web.Address("::1").token is None
    made = web.Address("0.0.0.0")
    assert made.token and len(made.token) == 32 and made.token not in repr(made)
    given = web.Address("0.0.0.0", token=TOKEN)
    assert given.token == TOKEN and made.made_token and not given.made_token
    for wrong in ("short", "with blanks in the token"):
        with pytest.raises(DiffalignError, match="16 to 256"):
            web.Address(token=wrong)


def test_a_token_is_printed_where_nobody_else_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    for address in (web.Address("0.0.0.0", port=0), web.Address(port=0, token=TOKEN)):
        with web.listen(address) as listener:
            web.show_address(listener, "the page")
            shown = capsys.readouterr().out
            assert shown.startswith(f"the page: {listener.root}/?token=")
        assert (str(address.token) in shown) == address.made_token


def test_a_terminal_shows_the_token_and_phones_get_an_ip(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("diffalign.web.server.own_ip", lambda: "192.0.2.7")
    with web.listen(web.Address("0.0.0.0", port=0, token=TOKEN)) as listener:
        web.show_address(listener, "the page")
        port = listener.port
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"the page: http://{socket.gethostname()}:{port}/?token={TOKEN}"
    assert second == f"or: http://192.0.2.7:{port}/?token={TOKEN}"


def test_a_port_in_use_is_named() -> None:
    stack = contextlib.ExitStack()
    taken = "another program listens there; choose another --port"
    with web.listen(web.Address(port=0)) as first, pytest.raises(DiffalignError, match=f"{first.port}: {taken}"):
        stack.enter_context(web.listen(web.Address(port=first.port)))
    with pytest.raises(DiffalignError, match="cannot listen there"):
        stack.enter_context(web.listen(web.Address("host.invalid")))


PROGRAM = """
import asyncio, sys
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from diffalign import web

async def slow(request):
    print("busy", flush=True)
    await asyncio.sleep(0.5)
    return PlainTextResponse("answered")

address = web.Address(port=0)
with web.listen(address) as listener:
    print(listener.port, flush=True)
    web.serve(web.build_app([Route("/", slow)], address), listener)
print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_running_requests(number: signal.Signals) -> None:
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment(), stdout=subprocess.PIPE, text=True)
    assert child.stdout
    port = int(child.stdout.readline())
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert child.stdout.readline() == "busy\n"
        child.send_signal(number)
        client.settimeout(30)
        answer = b""
        while piece := client.recv(1000):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"answered")
    assert child.stdout.read() == "ended\n"
    assert child.wait(30) == 0


def test_without_the_packages_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['uvicorn'] = None\nimport diffalign.web"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert "NotInstalled: a local server: uvicorn is not installed; pip install 'diffalign[serve]'" in done.stderr

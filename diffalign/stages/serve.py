"""`diffalign serve`: put rewards behind an address until a signal ends it."""

import os
import sys
import warnings
from dataclasses import dataclass, field

from PIL import Image

from diffalign import web
from diffalign.errors import DiffalignError
from diffalign.progress import say
from diffalign.remote_address import TOKEN_KEY
from diffalign.scoring.allocator import keep_freed_memory
from diffalign.scoring.spec import parse_all
from diffalign.serving.app import reward_app
from diffalign.serving.service import Service, Settings
from diffalign.stages.resolve_rewards import build_reward, resolve_device
from diffalign.terminal import counted

MEBIBYTE = 2**20


@dataclass(frozen=True)
class ServeRequest:
    """The options of `diffalign serve` as the user gave them. body: MiB of one request. drain: seconds of the last ones."""

    rewards: list[str]
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    names: tuple[str, ...] = ()
    device: str = "auto"
    settings: Settings = field(default_factory=Settings)
    body: int = 64
    drain: int = 30


def decoding_threads() -> int:
    """Return how many threads decode where the user does not say: one a core, up to 8."""
    return min(8, os.cpu_count() or 1)


def serve(request: ServeRequest) -> None:
    """Serve rewards until SIGTERM or Ctrl-C. Raises DiffalignError for what cannot be served, before anybody connects."""
    specs = parse_all(request.rewards)
    if any(spec.name == "remote" for spec in specs):
        raise DiffalignError(
            "--reward remote: a server of another server's rewards; give its own address to the clients"
        )
    address = web.Address(request.host, request.port, request.token or os.environ.get(TOKEN_KEY), request.names)
    limits = web.Limits(body=request.body * MEBIBYTE, bodies=max(512, 4 * request.body) * MEBIBYTE)
    keep_freed_memory()
    # A model's thread asks for the interpreter after every operation, and must not wait 5 ms for one that reads a request.
    sys.setswitchinterval(0.0005)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # images.py has its own limit
    device = resolve_device(request.device)
    with web.listen(address) as listener:
        rewards = {spec.label: build_reward(spec.name, spec.options, device) for spec in specs}
        service = Service(rewards, request.settings, limits.body)
        say(f"loading {', '.join(rewards)} on {device}")
        service.warm_up()
        with service:
            for label in rewards:
                say(f"serving {label}: reward {{name: remote, url: {listener.root}/{label}}}")
            if address.token:
                say(f"each request needs the token; diffalign's clients read it from {TOKEN_KEY}")
            web.show_address(listener, "what is served, with a form to try it")
            web.serve(reward_app(service, address, limits), listener, request.drain)
    requests, answers = service.metrics.requests, int(service.metrics.total("diffalign_images_total"))
    say(f"stopped after {counted(requests, 'request')} with {counted(answers, 'answer')}")

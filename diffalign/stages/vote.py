"""`diffalign vote`: serve the page on which people choose between images, and keep their votes."""

import os
import shlex
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path

from diffalign.errors import DiffalignError
from diffalign.files.lock import writing_file
from diffalign.files.paths import plain_name
from diffalign.progress import say, say_aside
from diffalign.stages.vote_scores import Asking, sampler_of, scores_by
from diffalign.terminal import counted
from diffalign.vote_page.app import LONGEST_BODY, VotePage
from diffalign.vote_page.gallery import Gallery, open_gallery
from diffalign.vote_page.session import Sessions
from diffalign.voting.log import DEFAULT_RATER, VoteLog, check_rater
from diffalign.web import Address, Limits, Listener, build_app, listen, serve, show_address


@dataclass(frozen=True)
class VoteRequest:
    """The options of `diffalign vote` as the user gave them."""

    sources: list[Path]
    rater: str = DEFAULT_RATER
    images: int = 2
    most: int | None = None
    minutes: float | None = None
    rubric: tuple[str, ...] = ()
    votes: Path | None = None
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8017
    token: str | None = None
    allowed: tuple[str, ...] = ()
    browser: bool = True
    ask: Asking = "balanced"
    reward: str | None = None
    repeats: float = 0.0


def vote(request: VoteRequest) -> None:
    """Serve the page until Ctrl-C: `diffalign vote`. The same command resumes."""
    gallery = open_gallery(request.sources, request.votes)
    check_rater(request.rater, gallery.taken)
    for name in request.rubric:
        plain_name(name, "--rubric")
    if request.images > 2 and any(group.pairs is not None for group in gallery.groups):
        raise DiffalignError("--images: two folders are compared in pairs; leave it out")
    scores = scores_by(gallery, request.reward)[1] if request.reward is not None else None
    sampler = sampler_of(request.ask, request.repeats, scores)
    address = Address(request.host, request.port, request.token, request.allowed)
    with writing_file(gallery.log, "--votes"), VoteLog(gallery.log) as log, listen(address) as listener:
        sessions = Sessions(
            gallery,
            log,
            sampler,
            size=request.images,
            seed=request.seed,
            most=request.most,
            minutes=request.minutes,
            rubric=request.rubric,
        )
        before = len(sessions.votes)
        _announce(gallery, before, listener)
        page = VotePage(sessions, request.rater, _next_steps(gallery, request))
        if request.browser:
            _open_browser(listener.url)
        serve(build_app(page.routes(), address, Limits(body=LONGEST_BODY)), listener, drain=2)
        say(f"{counted(len(sessions.votes) - before, 'new vote')}, {len(sessions.votes)} in all: {gallery.log}")


def _announce(gallery: Gallery, before: int, listener: Listener) -> None:
    say(gallery.about)
    say(f"votes: {gallery.log}" + (f" ({counted(before, 'vote')} so far)" if before else ""))
    show_address(listener, "open in a browser")
    say("Ctrl-C ends; every vote is kept")


def _next_steps(gallery: Gallery, request: VoteRequest) -> list[str]:
    """Return the commands that make training data of the votes."""
    if gallery.dataset is not None:
        folder = shlex.quote(str(gallery.dataset))
        return [
            f"diffalign rank {folder}",
            f"diffalign train RECIPE data.path={folder}",
        ]
    sources = shlex.join(str(source) for source in request.sources)
    return [f"diffalign vote-export {sources} --out votes/votes.csv", "diffalign pairs votes/votes.csv --out data/mine"]


def _open_browser(url: str) -> None:
    """Open the page where there is a screen. A browser of the terminal would take it from this command."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    try:
        webbrowser.open(url)
    except webbrowser.Error as error:
        say_aside(f"no browser could be opened ({error})")

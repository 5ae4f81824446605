"""A reward that another machine computes: the client of `diffalign serve`."""

from __future__ import annotations

import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from diffalign.errors import DiffalignError, brief
from diffalign.files.images import encoded
from diffalign.files.parse import valid_unicode
from diffalign.progress import say_aside
from diffalign.remote_address import TOKEN_KEY, RemoteAddress, remote_address
from diffalign.rewards.base import LABEL, TAKEN_NAMES, Metadata, Prepared, PreparedReward, by_column
from diffalign.rewards.remote_protocol import (
    BUSY,
    CATALOGUE,
    PROTOCOL,
    SCORE,
    Answer,
    Catalogue,
    ScoreAnswer,
    ServedReward,
    first_fault,
)

if TYPE_CHECKING:
    import httpx

CONNECT = 10.0
"""Seconds for a connection to be made."""
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0
"""Seconds before the first and before a late retry; each wait is twice the one before, less up to half at random."""
COLUMN = re.compile(r"[\w@.+-]{1,64}", re.ASCII)
"""The form of a column's name, which becomes one of our tables'."""
GONE = (502, 504)
"""Statuses of a proxy whose server does not answer."""
SILENCE = 5.0
"""Seconds of retries after which a busy server is reported; one that does not answer is reported at once."""
ENCODINGS = ("auto", "png", "ppm")


class RemoteFailed(Exception):
    """The served reward failed on an image; another try may succeed."""


class Remote(PreparedReward):
    """The scores of a reward that `diffalign serve` runs elsewhere: the same columns, and the same identity.

    url: `http://host:8000/hpsv2`, the server's address and the label of a reward; without the label where one alone is
    served. token: what the server asks for; default: the environment's DIFFALIGN_TOKEN. timeout: seconds for an answer.
    patience: seconds for which a lost connection or a busy server is tried again. batch_size: images of one request.
    encoding: png, ppm (no compression), or auto: ppm to a server of this machine. Both are lossless.
    """

    name = "remote"
    columns: tuple[str, ...] = ("remote",)
    range = (-math.inf, math.inf)
    usual = "as the served reward"
    licence = "that of the served reward"
    weights = "those of the served reward"
    source = "docs/serve.md"

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        timeout: float = 300.0,
        patience: float = 120.0,
        batch_size: int = 32,
        encoding: str = "auto",
    ) -> None:
        if not url:
            raise DiffalignError("reward remote: give the server's address, as in url: http://host:8000/hpsv2")
        if encoding not in ENCODINGS:
            raise DiffalignError(f"reward remote: encoding {encoding!r}; one of {', '.join(ENCODINGS)}")
        if not (timeout > 0 and patience >= 0 and batch_size > 0):
            raise DiffalignError("reward remote: timeout and batch_size must be above 0, and patience 0 or more")
        self.address: RemoteAddress = remote_address(str(url), token or os.environ.get(TOKEN_KEY))
        self.timeout, self.patience, self.batch_size = float(timeout), float(patience), int(batch_size)
        self.png = encoding == "png" or (encoding == "auto" and not self.address.loopback)
        self.reasons = []
        self._lock = threading.Lock()
        self._clients: dict[int, httpx.Client] = {}
        self.catalogue = self._read_catalogue()
        self.label, self.served = self._choose()
        # As `remote_label` says: the columns and files of two served rewards must not have one name.
        self.name = self.address.label or self.name
        self.columns = tuple(self.served.columns)

    def _read_catalogue(self) -> Catalogue:
        """Return what is served. Raises DiffalignError if nothing answers there, or something else."""
        text = self._ask("GET", CATALOGUE)
        try:
            protocol = json.loads(text).get("protocol")
            if protocol != PROTOCOL:
                raise DiffalignError(
                    f"reward remote: {self.address.root} speaks version {protocol} of the protocol and this client {PROTOCOL}; "
                    "install the same diffalign on both sides"
                )
            return Catalogue.model_validate_json(text)
        except ValidationError as error:
            raise self._misread(first_fault(error)) from error
        except (ValueError, AttributeError, RecursionError) as error:
            raise self._misread(brief(error)) from error

    def _choose(self) -> tuple[str, ServedReward]:
        """Return the reward that the address names, or the only one. Raises DiffalignError if that is none."""
        served = self.catalogue.rewards
        names = ", ".join(sorted(served))
        label = self.address.label or (next(iter(served)) if len(served) == 1 else None)
        if label is None:
            raise DiffalignError(
                f"reward remote: {self.address.root} serves {names}; name one: {self.address.root}/NAME"
            )
        if label not in served:
            raise DiffalignError(f"reward remote: {self.address.root} serves no {label[:80]!r}, but {names}")
        columns = served[label].columns
        if not LABEL.fullmatch(label) or label in TAKEN_NAMES or not columns or not all(map(COLUMN.fullmatch, columns)):
            raise self._misread(f"the name of {label[:80]!r} or of its columns has another form")
        return label, served[label]

    def reason_not_scorable(self, prompt: str | None, metadata: Metadata) -> str:
        return "no prompt" if "prompt" in self.served.reads and not (prompt or "").strip() else ""

    def weights_id(self) -> str:
        return self.served.weights

    def licence_id(self) -> str:
        return self.served.licence

    def identity(self) -> dict[str, Any]:
        """Return the identity of the served reward: its scores are the same, wherever it runs."""
        return self.served.identity

    def provenance(self) -> dict[str, Any]:
        return self.served.provenance

    def prepare(self, image: Image.Image) -> Tensor:
        """Return the bytes of the image file that is sent, uint8 [N]."""
        file = encoded(image.convert("RGB"), "PNG" if self.png else "PPM", compress_level=1)
        return torch.frombuffer(bytearray(file), dtype=torch.uint8)

    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        """Return every column of prepared images. Raises DiffalignError if no answer comes within `patience`."""
        files = [item.numpy().tobytes() for item in items if isinstance(item, Tensor)]
        answers: list[Answer] = []
        for part in self._parts(files):
            facts = [_plain(one) for one in metadata[part]] if metadata else None
            answers += self._score(files[part], prompts[part], facts)
        failed = next((answer.error for answer in answers if answer.failed), None)
        if failed is not None:
            raise RemoteFailed(failed)
        self.reasons = [answer.error or "" for answer in answers]
        nothing = dict.fromkeys(self.columns)
        rows = [[(a.columns or nothing).get(name) for name in self.columns] for a in answers]
        return by_column(self.columns, [tuple(math.nan if v is None else v for v in row) for row in rows])

    def _parts(self, files: list[bytes]) -> Iterator[slice]:
        """Yield the images of each request: within `batch_size` and the server's limits."""
        limits = self.catalogue.limits
        most, start, size = min(self.batch_size, limits.images), 0, 0
        for n, file in enumerate(files):
            if n > start and (n - start == most or size + len(file) > 0.9 * limits.body):  # the rest is prompts
                yield slice(start, n)
                start, size = n, 0
            size += len(file)
        if files:
            yield slice(start, len(files))

    def _score(self, files: list[bytes], prompts: list[str], metadata: list[Metadata] | None) -> list[Answer]:
        """Return the answers of one request."""
        request: dict[str, Any] = {"prompts": [valid_unicode(p) for p in prompts], "rewards": [self.label]}
        request |= {} if metadata is None else {"metadata": metadata}
        kind = "image/png" if self.png else "image/x-portable-pixmap"
        parts = [("images", (str(n), file, kind)) for n, file in enumerate(files)]
        text = self._ask("POST", SCORE, data={"request": json.dumps(request)}, files=parts)
        try:
            answer = ScoreAnswer.model_validate_json(text)
            digest, found = answer.rewards[self.label].digest, [one[self.label] for one in answer.results]
        except ValidationError as error:
            raise self._misread(first_fault(error)) from error
        except KeyError as error:
            raise self._misread(f"no {error}") from error
        if digest != self.served.digest:
            raise DiffalignError(
                f"reward remote: {self.address.root} now serves another {self.label} than at the start of this command; "
                "run it again with one of them"
            )
        if len(found) != len(files) or any((a.error is None) == (a.columns is None) for a in found):
            raise self._misread(f"{len(found)} answers for {len(files)} images, or one without a score and an error")
        return found

    def _ask(self, method: str, path: str, **content: Any) -> bytes:
        """Return the body of an answer; a lost connection or a busy server is tried again for `patience` seconds.

        A wait is reported once. Raises DiffalignError for a refusal, and when `patience` ends.
        """
        import httpx

        until, wait, tries = math.inf, FIRST_WAIT, 0
        reported = False
        while True:
            tries += 1
            after = 0.0
            try:
                answer = self._client().request(method, self.address.root + path, **content)
                if answer.status_code == 200:
                    return answer.content
                problem = f"{answer.status_code} {_error_in(answer)}"
                if answer.status_code == 401:
                    problem = "401 a token is needed, or another one: put it into DIFFALIGN_TOKEN, or set token"
                if answer.status_code not in (*BUSY, *GONE):
                    raise DiffalignError(f"reward remote: {self.address.root}: {problem}")
                after = _seconds(answer.headers.get("retry-after"))
                lost = answer.status_code in GONE
            except httpx.TransportError as error:
                problem, lost = brief(error), True
            except httpx.HTTPError as error:
                raise self._misread(brief(error)) from error
            until = min(until, time.monotonic() + self.patience)
            # At random, so that clients that were cut off together do not return together.
            pause = max(after, wait * random.SystemRandom().uniform(0.5, 1.0))
            if time.monotonic() + pause > until:
                asked = "1 try" if tries == 1 else f"{tries} tries"
                raise DiffalignError(
                    f"reward remote: no answer from {self.address.root} in {asked} over {self.patience:g} s: {problem}; "
                    "see that the server runs, or set patience higher"
                )
            left = until - time.monotonic()
            if not reported and (lost or left < self.patience - SILENCE):
                reported = True
                say_aside(
                    f"reward remote: no answer from {self.address.root} ({problem}); trying for {left:.0f} s more"
                )
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)

    def _client(self) -> httpx.Client:
        """Return the connections of this process: a forked one must not use its parent's."""
        import httpx

        with self._lock:
            if os.getpid() not in self._clients:
                headers = {"Authorization": f"Bearer {self.address.token}"} if self.address.token else {}
                # A proxy of the environment does not lead to this machine.
                self._clients[os.getpid()] = httpx.Client(
                    headers=headers,
                    timeout=httpx.Timeout(self.timeout, connect=CONNECT),
                    trust_env=not self.address.loopback,
                    verify=self.address.root.startswith("https:"),  # else certificates would be loaded for nothing
                )
            return self._clients[os.getpid()]

    def _misread(self, why: str) -> DiffalignError:
        return DiffalignError(f"reward remote: {self.address.root} does not answer as `diffalign serve` does: {why}")


def _error_in(answer: httpx.Response) -> str:
    """Return the line of an error, or what the status means if the answer is of another form."""
    try:
        return brief(ValueError(str(answer.json()["error"])))
    except (ValueError, KeyError, TypeError, RecursionError):
        return answer.reason_phrase


def _seconds(retry_after: str | None) -> float:
    """Return the seconds that a server asks to wait, 0 if it does not say so in seconds."""
    return min(float(retry_after), LONGEST_WAIT) if retry_after and retry_after.isdecimal() else 0.0


def _plain(metadata: Metadata) -> Metadata:
    """Return metadata as JSON holds it."""
    return {str(key): json.loads(json.dumps(value, default=str)) for key, value in metadata.items() if key != "prompt"}

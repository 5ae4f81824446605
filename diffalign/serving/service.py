"""The rewards that a server holds, and what it does with a request: admit, decode, queue, answer."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from starlette.exceptions import HTTPException

from diffalign.files.images import Unreadable, area, decode
from diffalign.redaction import without_folders
from diffalign.rewards import Reward
from diffalign.rewards.base import Metadata, Prepared
from diffalign.rewards.batches import Measured, reason_of
from diffalign.rewards.remote_protocol import PROTOCOL, Catalogue, ServedReward, ServerLimits, identity_digest
from diffalign.serving.batching import Lane, Unit, Worker
from diffalign.serving.metrics import Metrics
from diffalign.serving.requests import Asked
from diffalign.version import __version__

PIXELS_HELD = 128_000_000
"""Pixels of the images that are decoded and not answered yet: about 0.5 GB. One image may have more."""
GREY = (128, 128, 128)
AnswerDict = dict[str, object]
"""An `Answer` of the protocol, as it is written."""


@dataclass(frozen=True)
class Settings:
    """How a server works.

    batch_size: images of a batch. wait: seconds for which a batch that is not full waits for images on their way. resident:
    `all` models in memory, or `one` at a time. turn: seconds until another model's images come first, where it is one.
    queue: images of accepted requests; more are refused as busy. images, pixels: bounds of one request and of one image.
    workers: threads that decode.
    """

    batch_size: int = 32
    wait: float = 0.02
    resident: Literal["all", "one"] = "all"
    turn: float = 10.0
    queue: int = 4096
    images: int = 1024
    pixels: int = 50_000_000
    workers: int = 4


class PixelBudget:
    """Pixels that may be held at once; threads wait for what others give back."""

    def __init__(self, total: int) -> None:
        self.total = self.left = total
        self._changed = threading.Condition()

    def take(self, pixels: int) -> int:
        """Wait for so many pixels, or all there are; return how many were taken."""
        taken = min(pixels, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self.left >= taken)
            self.left -= taken
        return taken

    def give(self, pixels: int) -> None:
        with self._changed:
            self.left += pixels
            self._changed.notify_all()


@dataclass(frozen=True)
class Ready:
    """A decoded image. taken: pixels to give back. prepared: for each reward, or why that failed."""

    taken: int
    prepared: dict[str, Prepared | Exception]


class Service:
    """Rewards by label, behind one queue each. `with service:` runs its threads."""

    def __init__(self, rewards: Mapping[str, Reward], settings: Settings, body: int) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.started = time.time()
        self.waiting = 0
        self.lanes = {label: Lane(label, reward) for label, reward in rewards.items()}
        groups = [[lane] for lane in self.lanes.values()]
        if settings.resident == "one":
            groups = [list(self.lanes.values())]
        self._workers = [
            Worker(group, self.metrics, settings.batch_size, settings.wait, settings.turn) for group in groups
        ]
        self._worker = {lane.label: worker for worker in self._workers for lane in worker.lanes}
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="decode")
        self._budget = PixelBudget(PIXELS_HELD)
        self.catalogue = self._describe(body)

    def _describe(self, body: int) -> Catalogue:
        """Return what is served. Raises DiffalignError where weights are missing: before anybody asks for them."""
        served = {}
        for label, lane in self.lanes.items():
            reward, identity = lane.reward, lane.reward.identity()
            served[label] = ServedReward(
                columns=list(reward.columns),
                digest=identity_digest(identity),
                name=reward.name,
                about=" ".join((type(reward).__doc__ or "").partition("\n\n")[0].split()),
                range=(_finite(reward.range[0]), _finite(reward.range[1])),
                usual=reward.usual,
                licence=reward.licence_id(),
                weights=str(without_folders(reward.weights_id())),
                reads=list(reward.reads),
                identity=identity,
                provenance=reward.provenance(),
            )
        limits = ServerLimits(images=self.settings.images, body=body, pixels=self.settings.pixels)
        return Catalogue(protocol=PROTOCOL, version=__version__, limits=limits, rewards=served)

    def warm_up(self) -> None:
        """Load the models that stay in memory, by scoring a grey image. Raises what a reward raises."""
        for lane in [worker.lanes[0] for worker in self._workers]:
            reward, grey = lane.reward, Image.new("RGB", (64, 64), GREY)
            if not reward.reason_not_scorable("grey", {}):
                reward.measure_prepared([reward.prepare(grey)], ["grey"], [{"prompt": "grey"}])

    def __enter__(self) -> Service:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.join(timeout=5)  # a daemon: a batch that takes longer does not keep the process

    @property
    def broken(self) -> str:
        """Why a model will not answer again, "" if all do."""
        return next(
            (w.broken or f"{w.name}: its thread has ended" for w in self._workers if w.broken or not w.is_alive()), ""
        )

    def check_room(self, images: int = 1) -> None:
        """Raise HTTPException if so many more images would not fit into the queue; an empty queue takes any request."""
        if self.broken:
            raise HTTPException(500, self.broken)
        if self.waiting and self.waiting + images > self.settings.queue:
            why = f"{self.waiting} images wait already, and the queue holds {self.settings.queue}; try again"
            raise HTTPException(429, why, {"Retry-After": "1"})

    def chosen(self, labels: Sequence[str] | None) -> list[Lane]:
        """Return the lanes of these rewards, or of all. Raises HTTPException for one that is not served."""
        for label in labels or ():
            if label not in self.lanes:
                raise HTTPException(404, f"no reward {label[:80]!r} is served here, but {', '.join(self.lanes)}")
        return [self.lanes[label] for label in dict.fromkeys(labels or self.lanes)]

    async def score(self, asked: Asked) -> list[dict[str, AnswerDict]]:
        """Return the answers of a request: for each image by label. Raises what a reward raises for the whole of it."""
        lanes = self.chosen(asked.rewards)
        count = len(asked.images) * len(lanes)
        self.check_room(count)
        self.waiting += count
        for lane in lanes:
            self._worker[lane.label].expect(lane, len(asked.images))
        request = object()
        try:
            rows = zip(asked.images, asked.prompts, asked.metadata, strict=True)
            found = await asyncio.gather(
                *(self._image(request, lanes, image, prompt, facts) for image, prompt, facts in rows),
                return_exceptions=True,
            )
        finally:
            self.waiting -= count
        answers: list[dict[str, AnswerDict]] = []
        for one in found:
            if isinstance(one, BaseException):
                raise one
            answers.append(one)
        return answers

    async def _image(
        self, request: object, lanes: list[Lane], image: bytes | str, prompt: str | None, metadata: Metadata
    ) -> dict[str, AnswerDict]:
        """Return the answers for one image."""
        coming = {lane.label for lane in lanes}
        answers: dict[str, AnswerDict] = {}
        decoding: Future[Ready] | None = None
        units: dict[str, Unit] = {}
        try:
            reasons = {
                lane.label: image if isinstance(image, str) else _reason(lane, prompt, metadata) for lane in lanes
            }
            wanted = [lane for lane in lanes if not reasons[lane.label]]
            if wanted and isinstance(image, bytes):
                decoding = self._pool.submit(self._decode, image, wanted)
                try:
                    ready = await asyncio.wrap_future(decoding)
                except Unreadable as error:
                    ready, reasons = Ready(0, {}), dict.fromkeys(reasons, str(error))
                for lane in wanted:
                    prepared = ready.prepared.get(lane.label)
                    if isinstance(prepared, Exception):
                        answers[lane.label] = {"error": reason_of(prepared), "failed": True}
                    elif prepared is not None:
                        answer = asyncio.get_running_loop().create_future()
                        units[lane.label] = Unit(prepared, prompt or "", metadata, request, answer)
                        coming.discard(lane.label)
                        self._worker[lane.label].submit(lane, units[lane.label])
            answers |= {label: {"error": reason} for label, reason in reasons.items() if reason}
            for label in coming:  # will not come; others may wait for it
                self._worker[label].expect(self.lanes[label], -1)
            coming.clear()
            for label, unit in units.items():
                answers[label] = _answer(self.lanes[label].reward, await unit.answer)
        finally:
            for label in coming:
                self._worker[label].expect(self.lanes[label], -1)
            for unit in units.values():
                unit.dropped = not unit.answer.done() or unit.answer.cancelled()
            if decoding is not None:
                decoding.add_done_callback(self._give_back)
        for label, one in answers.items():
            self.metrics.image(label, "failed" if "failed" in one else "refused" if "error" in one else "scored")
        return {lane.label: answers[lane.label] for lane in lanes}

    def _decode(self, data: bytes, lanes: list[Lane]) -> Ready:
        """Decode an image and prepare it for rewards. Raises Unreadable."""
        taken = self._budget.take(area(data))
        try:
            image = decode(data, self.settings.pixels)
            prepared: dict[str, Prepared | Exception] = {}
            for lane in lanes:
                try:
                    prepared[lane.label] = lane.reward.prepare(image)
                except Exception as error:  # an image that this reward cannot take; another reward may
                    prepared[lane.label] = error
        except BaseException:
            self._budget.give(taken)
            raise
        return Ready(taken, prepared)

    def _give_back(self, decoding: Future[Ready]) -> None:
        """Give back an image's pixels, also those of an image for which nobody waits any more."""
        if not decoding.cancelled() and decoding.exception() is None:
            self._budget.give(decoding.result().taken)


def _reason(lane: Lane, prompt: str | None, metadata: Metadata) -> str:
    """Return why a reward cannot score an image with this prompt, "" if it can."""
    try:
        return lane.reward.reason_not_scorable(prompt, metadata)
    except Exception as error:  # metadata of any form comes from outside
        return reason_of(error)


def _answer(reward: Reward, measured: Measured) -> AnswerDict:
    """Return what is said of an image: every column if it has a score, else why it has none."""
    if measured.error is not None:
        return {"error": measured.reason, "failed": True}
    columns = {name: _finite(measured.values[name]) for name in reward.columns}
    score = columns[reward.columns[0]]
    if measured.reason or score is None:
        return {"error": measured.reason or "the reward gave no number"}
    return {"score": score, "columns": columns}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

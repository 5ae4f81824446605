"""Put the images of many requests into shared batches, and score them in one thread a model."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from diffalign.progress import say_aside
from diffalign.rewards import Reward
from diffalign.rewards.base import Metadata, Prepared
from diffalign.rewards.batches import Measured, measure_batch, reason_of
from diffalign.serving.metrics import Metrics


@dataclass(eq=False)
class Unit:
    """An image to score with one reward.

    request: of which it is a part. answer: what became of it. dropped: nobody waits for the answer any more.
    """

    prepared: Prepared
    prompt: str
    metadata: Metadata
    request: object
    answer: asyncio.Future[Measured]
    arrived: float = field(default_factory=time.monotonic)
    dropped: bool = False


@dataclass(eq=False)
class Lane:
    """The images that wait for one reward. coming: how many of accepted requests are not prepared yet."""

    label: str
    reward: Reward
    units: deque[Unit] = field(default_factory=deque)
    coming: int = 0


class Worker(threading.Thread):
    """Scores the images of its lanes, one batch after another. Of several lanes only one model is in memory at a time.

    batch_size: images of a batch. wait: seconds for which the first image of a batch that is not full waits for others that
    are on their way. turn: seconds after which the images of another lane come first, and the model is changed.
    """

    def __init__(self, lanes: Sequence[Lane], metrics: Metrics, batch_size: int, wait: float, turn: float) -> None:
        super().__init__(name=f"score {' '.join(lane.label for lane in lanes)}", daemon=True)
        self.lanes, self.metrics = list(lanes), metrics
        self.batch_size, self.wait, self.turn = batch_size, wait, turn
        self.broken = ""  # why no model will answer again
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self._loaded: Lane | None = None
        self._since = 0.0

    def expect(self, lane: Lane, count: int) -> None:
        """Note that so many images are on their way, or with a negative number that they will not come."""
        with self._changed:
            lane.coming += count
            self._changed.notify()

    def submit(self, lane: Lane, unit: Unit) -> None:
        """Queue an image that was expected. To be called in the event loop that waits for its answer."""
        with self._changed:
            self._loop = unit.answer.get_loop()
            lane.coming -= 1
            lane.units.append(unit)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after the batch that is being scored."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        while (batch := self._next()) is not None:
            lane, units = batch
            started = time.monotonic()
            answers: list[tuple[Unit, Measured | Exception]]
            try:
                self._change_to(lane)
                answers = self._measure(lane, units)
            except Exception as error:  # such as a model that cannot be released; the next request is scored again
                answers = [(unit, error) for unit in units]
            self.metrics.batch(lane.label, len(units), time.monotonic() - started)
            self._settle(answers)

    def _next(self) -> tuple[Lane, list[Unit]] | None:
        """Wait for images; return those of the next batch and their lane, None at the end."""
        with self._changed:
            while not self._stopped:
                lane = self._choose()
                if lane is None:
                    self._changed.wait()
                    continue
                left = lane.units[0].arrived + self.wait - time.monotonic()
                if len(lane.units) < self.batch_size and lane.coming > 0 and left > 0:
                    self._changed.wait(left)
                    continue
                taken = [lane.units.popleft() for _ in range(min(self.batch_size, len(lane.units)))]
                if units := [unit for unit in taken if not unit.dropped]:
                    return lane, units
            return None

    def _choose(self) -> Lane | None:
        """Return the lane whose turn it is: the loaded one until its turn ends, then the one that has waited longest."""
        waiting = [lane for lane in self.lanes if lane.units]
        if not waiting:
            return None
        if self._loaded in waiting and (len(waiting) == 1 or time.monotonic() - self._since < self.turn):
            return self._loaded
        others = [lane for lane in waiting if lane is not self._loaded] or waiting
        return min(others, key=lambda lane: lane.units[0].arrived)

    def _change_to(self, lane: Lane) -> None:
        """Release the model of another lane."""
        if lane is self._loaded:
            return
        if self._loaded is not None:
            self._loaded.reward.free()
            gc.collect()
        self._loaded, self._since = lane, time.monotonic()
        self.metrics.load(lane.label)

    def _measure(self, lane: Lane, units: list[Unit]) -> list[tuple[Unit, Measured | Exception]]:
        """Return what became of each image. An error that ends a batch counts for the request that caused it alone."""
        try:
            return list(zip(units, self._measure_batch(lane, units), strict=True))
        except Exception as error:  # whatever a reward raises, other requests of the batch get their scores
            if isinstance(error, torch.AcceleratorError):
                self.broken = f"{lane.label}: {reason_of(error)}"
                say_aside(f"error: the GPU has failed and stays so; start the server again: {self.broken}")
            requests = list({id(unit.request): unit.request for unit in units}.values())
            if self.broken or len(requests) == 1:
                return [(unit, error) for unit in units]
        parts = [[unit for unit in units if unit.request is request] for request in requests]
        return [answer for part in parts for answer in self._measure(lane, part)]

    @staticmethod
    def _measure_batch(lane: Lane, units: list[Unit]) -> list[Measured]:
        facts = [{**unit.metadata, "prompt": unit.prompt} for unit in units]
        try:
            # proven: an image that fails costs only itself, also when it is the first.
            prompts = [unit.prompt for unit in units]
            return measure_batch(lane.reward, [unit.prepared for unit in units], prompts, facts, proven=True)
        except torch.OutOfMemoryError as error:
            if len(units) > 1:  # one of them does not fit
                return [one for unit in units for one in Worker._measure_batch(lane, [unit])]
            return [Measured(dict.fromkeys(lane.reward.columns, float("nan")), reason_of(error), error)]

    def _settle(self, answers: list[tuple[Unit, Measured | Exception]]) -> None:
        """Give the answers to the event loop, all at once."""

        def settle() -> None:
            for unit, answer in answers:
                if unit.answer.done():
                    continue
                if isinstance(answer, Exception):
                    unit.answer.set_exception(answer)
                else:
                    unit.answer.set_result(answer)

        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the server has ended without waiting
            return

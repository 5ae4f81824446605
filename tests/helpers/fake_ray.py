"""A stand-in for Ray in one process: answers come in a shuffled order, and actors die when they are told to.

It has what diffalign.cluster calls, so that the way of the batches is tested where Ray is not installed. tests/cluster
has the tests on Ray itself.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def copied(thing: Any) -> Any:
    """As between processes: nothing is shared, and what cannot travel fails."""
    return pickle.loads(pickle.dumps(thing))


class FakeRay(ModuleType):
    """nodes: how many, with one CPU each. dies: numbers of calls of `do` at which the actor dies instead."""

    def __init__(self, nodes: int = 3, dies: tuple[int, ...] = ()) -> None:
        super().__init__("ray")
        self.__spec__ = ModuleSpec("ray", None)
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self._nodes, self._dies, self._chance = nodes, dies, random.Random(0)
        self.calls, self.made, self.killed, self.up = 0, 0, 0, False
        self.waiting: dict[int, Callable[[], Any]] = {}

    def init(self, **given: Any) -> None:
        self.up = True

    def is_initialized(self) -> bool:
        return self.up

    def shutdown(self) -> None:
        self.up = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self._nodes)}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0}}] * self._nodes

    def later(self, action: Callable[[], Any]) -> int:
        number = len(self.waiting) + 1_000 * (self.calls + 1)
        while number in self.waiting:
            number += 1
        self.waiting[number] = action
        return number

    def remote(self, **needs: Any) -> Callable[[Any], Any]:
        def wrapped(thing: Any) -> Any:
            if isinstance(thing, type):
                return SimpleNamespace(remote=lambda *given: _Handle(self, thing, given))
            return SimpleNamespace(remote=lambda *given: self.later(lambda: thing(*copied(given))))

        return wrapped

    def wait(self, references: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        chosen = self._chance.choice(references)
        return [chosen], [r for r in references if r != chosen]

    def get(self, reference: int) -> Any:
        action = self.waiting.pop(reference)
        try:
            return copied(action())
        except RayError:
            raise
        except Exception as error:
            raise RayTaskError(error) from error

    def kill(self, handle: Any) -> None:
        self.killed += 1


class _Handle:
    def __init__(self, ray: FakeRay, kind: type, given: tuple[Any, ...]) -> None:
        self.ray, self.actor, self.dead = ray, kind(*copied(given)), False
        ray.made += 1
        self.ready, self.do = (SimpleNamespace(remote=self._method(name)) for name in ("ready", "do"))

    def _method(self, name: str) -> Callable[..., int]:
        def call(*given: Any) -> int:
            sent = pickle.dumps(given)

            def answer() -> Any:
                if name == "do":
                    self.ray.calls += 1
                    self.dead = self.dead or self.ray.calls in self.ray._dies
                if self.dead:
                    raise RayError("the node is gone")
                method = {"ready": self.actor.ready, "do": self.actor.do}[name]
                return method(*pickle.loads(sent))

            return self.ray.later(answer)

        return call

"""Run a list of orders on a Ray cluster: each actor holds one model, and the driver keeps every answer by its key.

Ray core and not Ray Data: images may lie on the driver's disk alone, so the driver sends them in a bounded window, and it
stores an answer as soon as it comes. An order whose node dies is given to another actor; Ray finds the place for it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from platform import node
from typing import Any, Generic, Protocol, TypeVar

from diffalign import stopping
from diffalign.errors import DiffalignError, brief
from diffalign.packages import not_installed, require
from diffalign.progress import say_aside
from diffalign.version import __version__

LOCAL, RAY, CLIENT = "local", "ray", "ray://"
IN_FLIGHT = 2
"""Orders that an actor has at once: the next one waits beside the model."""
MOST_LOST = 5
"""How often an order may lose its actor before it is at fault itself."""
ENOUGH = 4
"""When so many orders, the first ones, fail, the work is at fault and not an order."""
WAIT, SILENT = 1.0, 60.0  # seconds between looks for a signal; without any actor, until a line says so

Key = TypeVar("Key")
Order = TypeVar("Order")
Answer = TypeVar("Answer")
OrderIn = TypeVar("OrderIn", contravariant=True)
AnswerOut = TypeVar("AnswerOut", covariant=True)
Result = TypeVar("Result")


class Worker(Protocol[OrderIn, AnswerOut]):
    """What an actor holds: a model and what is done with it. proven: whether another order has succeeded."""

    def __call__(self, order: OrderIn, /, proven: bool) -> AnswerOut: ...


@dataclass(frozen=True)
class Refused:
    """A DiffalignError of an actor, on its way to the driver."""

    message: str


class Actor(Generic[Order, Answer]):
    """A process of the cluster with one worker."""

    def __init__(self, version: str, threads: int, open_worker: Callable[[], Worker[Order, Answer]]) -> None:
        self.version, self.threads, self.open_worker = version, threads, open_worker

    def ready(self) -> Refused | None:
        """Build the worker; its model loads with the first order."""
        import torch

        if __version__ != self.version:
            return Refused(
                f"--engine ray: a node has diffalign {__version__}, and this command is {self.version}; install "
                "one version everywhere"
            )
        torch.set_num_threads(self.threads)  # the number decides the last bits on a CPU
        try:
            self.worker = self.open_worker()
        except DiffalignError as error:
            return Refused(str(error))
        return None

    def do(self, order: Order, proven: bool) -> Answer | Refused:
        """Return the worker's answer."""
        try:
            return self.worker(order, proven)
        except DiffalignError as error:
            return Refused(str(error))


@dataclass
class _Task(Generic[Key, Order]):
    """An order on its way. lost: how many actors died with it. error: what it raised before any other had succeeded."""

    key: Key
    order: Order
    lost: int = 0
    error: Exception | None = None


class Engine:
    """A connection to a cluster.

    device: of its workers, cpu or cuda. actors: how many at most; more than fit make an autoscaler start nodes.
    """

    def __init__(self, ray: Any, device: str, actors: int | None) -> None:
        import torch

        self.ray = ray  # the module: it is no dependency, so it has no type here
        resources: dict[str, float] = ray.cluster_resources()
        gpus = device != "cpu" and (device == "cuda" or resources.get("GPU", 0) >= 1)
        self.device = "cuda" if gpus else "cpu"
        self.threads = torch.get_num_threads()
        largest = max((int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]), default=1)
        cpus = 1 if gpus else max(1, min(self.threads, largest))
        self.needs = {"num_cpus": cpus, "num_gpus": int(gpus)}
        fit = resources.get("GPU", 1) if gpus else resources.get("CPU", 1) // cpus
        self.actors = actors or max(1, int(fit))

    def without_gpu(self) -> Engine:
        """Return the same cluster for work that needs no model."""
        other = copy(self)
        other.device, other.needs = "cpu", {"num_cpus": 1, "num_gpus": 0}
        return other

    def call(self, function: Callable[..., Result], *given: object) -> Result:
        """Run one function on a node like those of the actors, and return its result."""
        task = self.ray.remote(**self.needs)(function)
        result: Result = self.ray.get(task.remote(*given))
        return result

    def run(
        self, open_worker: Callable[[], Worker[Order, Answer]], orders: Iterable[tuple[Key, Order]], count: int
    ) -> Iterator[tuple[Key, Answer]]:
        """Yield (key, answer) of each order, in the order in which they are done; each key once.

        open_worker: called once in each actor. orders: read only as fast as they are done; count: how many. Raises what a
        worker raised, and DiffalignError for an order that ends its actor `MOST_LOST` times.
        """
        if not count:
            return
        pool: _Pool[Key, Order, Answer] = _Pool(self, open_worker, min(count, self.actors), iter(orders))
        try:
            while pool.feed():
                yield from pool.settled()
        finally:
            pool.close()


@dataclass
class _Pool(Generic[Key, Order, Answer]):
    """The actors of one piece of work, and the orders in flight."""

    engine: Engine
    open_worker: Callable[[], Worker[Order, Answer]]
    size: int
    source: Iterator[tuple[Key, Order]]
    actors: dict[int, Any] = field(default_factory=dict)  # Ray's handles, by our number
    started: set[int] = field(default_factory=set)
    flying: dict[Any, tuple[int, _Task[Key, Order] | None]] = field(default_factory=dict)  # by Ray's reference
    waiting: deque[_Task[Key, Order]] = field(default_factory=deque)
    doubtful: list[_Task[Key, Order]] = field(default_factory=list)
    proven: bool = False
    ended: bool = False
    false_starts: int = 0
    silent: float = 0.0
    made: int = 0

    def __post_init__(self) -> None:
        # What Ray would restart by itself could wait for ever with its orders where a node is gone for good.
        self.remote = self.engine.ray.remote(**self.engine.needs, max_restarts=0, max_task_retries=0)(Actor)
        for _ in range(self.size):
            self._start()

    def feed(self) -> bool:
        """Give orders to the actors that have started; return whether anything is left to wait for."""
        load = dict.fromkeys(self.started, 0)
        for number, task in self.flying.values():
            if task is not None and number in load:
                load[number] += 1
        for depth in range(1, IN_FLIGHT + 1):
            for number in load:
                if load[number] < depth and (task := self._next()) is not None:
                    self.flying[self.actors[number].do.remote(task.order, self.proven)] = (number, task)
                    load[number] += 1
        left = not self.ended or bool(self.waiting) or any(task is not None for _, task in self.flying.values())
        if not left and self.doubtful:
            raise self.doubtful[0].error or AssertionError
        return left

    def settled(self) -> Iterator[tuple[Key, Answer]]:
        """Wait for the next answer, at most `WAIT` seconds, and yield it."""
        errors = self.engine.ray.exceptions
        done, _ = self.engine.ray.wait(list(self.flying), num_returns=1, timeout=WAIT)
        stopping.check()
        self._say_if_nobody_works(bool(done))
        for reference in done:
            number, task = self.flying.pop(reference)
            try:
                answer = self.engine.ray.get(reference)
            except errors.RayTaskError as error:
                self._failed(task, error.cause or error)
                continue
            except errors.RayError as error:  # the actor or its node died, or its answer was lost with it
                self._lost(number, task, error)
                continue
            if isinstance(answer, Refused):
                raise DiffalignError(answer.message)
            if task is None:
                self.started.add(number)
                self.false_starts = 0  # counted in a row
                continue
            self._prove()
            yield task.key, answer

    def close(self) -> None:
        """End the actors."""
        for handle in self.actors.values():
            self.engine.ray.kill(handle)

    def _start(self) -> None:
        number, self.made = self.made, self.made + 1
        self.actors[number] = self.remote.remote(__version__, self.engine.threads, self.open_worker)
        self.flying[self.actors[number].ready.remote()] = (number, None)

    def _next(self) -> _Task[Key, Order] | None:
        if self.waiting:
            return self.waiting.popleft()
        found = next(self.source, None) if not self.ended else None
        self.ended = found is None
        return None if found is None else _Task(*found)

    def _failed(self, task: _Task[Key, Order] | None, error: Exception) -> None:
        """Try an order again once another one has succeeded; raise where that would tell nothing new."""
        if task is None or self.proven:
            raise error
        task.error = error
        self.doubtful.append(task)
        if len(self.doubtful) >= ENOUGH:
            raise error

    def _prove(self) -> None:
        self.proven = True
        self.waiting.extend(self.doubtful)
        self.doubtful.clear()

    def _lost(self, number: int, task: _Task[Key, Order] | None, error: Exception) -> None:
        """Start another actor in the place of one that is gone, and give its order away."""
        if (handle := self.actors.pop(number, None)) is not None:
            self.started.discard(number)
            self.engine.ray.kill(handle)
            self.false_starts += task is None
            if self.false_starts < MOST_LOST:
                self._start()
            elif not self.actors:
                raise DiffalignError(f"--engine ray: no actor starts ({brief(error)}); Ray's logs say more")
        if task is None:
            return
        task.lost += 1
        if task.lost >= MOST_LOST:
            raise DiffalignError(
                f"--engine ray: a batch ended its process {MOST_LOST} times ({brief(error)}); give the nodes more memory, or "
                "choose smaller batches"
            )
        self.waiting.append(task)

    def _say_if_nobody_works(self, heard: bool) -> None:
        self.silent = 0.0 if heard or self.started else self.silent + WAIT
        if self.silent >= SILENT:
            self.silent = 0.0
            wanted = f"{self.engine.needs['num_cpus']} CPUs and {self.engine.needs['num_gpus']} GPUs"
            say_aside(f"waiting for the Ray cluster: no node has {wanted} free; `ray status` says more")


def check_same(what: str, driver: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise DiffalignError where a model is another one on this node than where the command runs."""
    changed = next((key for key in {**driver, **here} if driver.get(key) != here.get(key)), None)
    if changed:
        raise DiffalignError(
            f"{what}: {changed}={here.get(changed)!r} on node {node()}, and {driver.get(changed)!r} where the command runs; "
            "give every node the same weights"
        )


@contextmanager
def open_engine(name: str, device: str = "auto", actors: int | None = None) -> Iterator[Engine | None]:
    """Yield the engine that `--engine` names, None for `local`.

    name: local; ray, for the cluster of RAY_ADDRESS or of this machine, or a new one on this machine; ray://HOST:PORT,
    for a cluster elsewhere. device: auto, cpu or cuda. Raises DiffalignError where there is no such cluster.
    """
    if name == LOCAL:
        if actors is not None:
            raise DiffalignError(f"--actors {actors}: only a cluster has actors; add --engine ray")
        yield None
        return
    if name != RAY and not name.startswith(CLIENT):
        raise DiffalignError(f"--engine {name}: unknown; use local, ray or ray://HOST:PORT")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DiffalignError(f"--engine {name}: start one process; Ray starts the others")
    require("ray", f"--engine {name}")
    import ray

    owned = not ray.is_initialized()
    if owned:
        _connect(ray, name)
    try:
        yield Engine(ray, device, actors)
    except ConnectionError as error:
        raise DiffalignError(f"--engine {name}: the cluster no longer answers ({brief(error)})") from error
    finally:
        if owned:
            ray.shutdown()


def _connect(ray: Any, name: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a cluster that is started here calls its makers
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    try:
        _knock(name.removeprefix(CLIENT) if name.startswith(CLIENT) else os.environ.get("RAY_ADDRESS", ""))
        given = {"address": name} if name.startswith(CLIENT) else {"include_dashboard": False}
        ray.init(**given, log_to_driver=False, logging_level="error")
    except ImportError as error:
        raise not_installed("ray", f"--engine {name}") from error  # its client is a part that may be absent
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise DiffalignError(f"--engine {name}: no cluster answers ({brief(error)})") from error
    finally:
        for number, handler in before.items():  # Ray sets handlers that would end the command at once
            if handler is not None:
                signal.signal(number, handler)


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.removeprefix("[").removesuffix("]"), int(port)), timeout=10.0).close()

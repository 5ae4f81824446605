"""What a reward server does with many requests at once: shared batches, full queues, one model at a time, lost clients."""

from __future__ import annotations

import base64
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch

from diffalign.rewards import load_reward
from diffalign.serving.metrics import Metrics
from helpers.pictures import encoded, smooth
from helpers.served import Running, Slow, serving

FILE = encoded(smooth(0, 40, 30), "PNG")
BASE64 = base64.b64encode(FILE).decode()


def ask(root: str, count: int = 1, prompt: str = "a", **more: Any) -> httpx.Response:
    return httpx.post(f"{root}/v1/score", json={"images": [BASE64] * count, "prompts": prompt, **more}, timeout=60)


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen within a minute"
        time.sleep(0.005)


def together(server: Running, requests: list[dict[str, Any]], held: Slow, waiting: int) -> list[httpx.Response]:
    """Send requests while a first one holds the model, so that all of them wait together; return their answers."""
    held.free_to_go.clear()
    with ThreadPoolExecutor(len(requests) + 1) as pool:
        pool.submit(ask, server.root)
        until(lambda: server.service.lanes["slow"].units == type(server.service.lanes["slow"].units)() and held.loaded)
        asked = [pool.submit(ask, server.root, **one) for one in requests]
        until(lambda: server.service.waiting == waiting and len(server.service.lanes["slow"].units) == waiting - 1)
        held.free_to_go.set()
        return [one.result() for one in asked]


def test_requests_share_batches_of_the_stated_size() -> None:
    slow = Slow()
    with serving({"slow": slow}, batch_size=8) as server:
        answers = together(server, [{"count": 1}] * 10 + [{"count": 5}], slow, waiting=16)
    assert all(one["slow"]["score"] == 40.0 for answer in answers for one in answer.json()["results"])
    assert [len(answer.json()["results"]) for answer in answers] == [1] * 10 + [5]
    assert slow.batches == [1, 8, 7]


def test_a_request_that_breaks_a_shared_batch_costs_no_other() -> None:
    """A reward may refuse a batch as a whole, and an image may break it: both count for the request that they came with."""
    slow = Slow()
    plain = slow.measure

    def strict(images: Any, prompts: list[str], metadata: Any = None) -> dict[str, torch.Tensor]:
        from diffalign.errors import DiffalignError

        if "refused" in prompts:
            raise DiffalignError("cannot score\nthese prompts at all")
        if "bug" in prompts:
            raise MemoryError("secret detail")
        return plain(images, prompts, metadata)

    slow.measure = strict  # type: ignore[method-assign]
    prompts = ["a", "refused", "broken", "a"]
    with serving({"slow": slow}) as server:
        answers = together(server, [{"prompt": prompt} for prompt in prompts], slow, waiting=5)
        found = [(answer.status_code, answer.json()) for answer in answers]
        assert server.service.metrics.total("diffalign_images_total", outcome="scored") == 3
    assert [status for status, _ in found] == [200, 400, 200, 200]
    assert found[1][1] == {"error": "cannot score these prompts at all"}
    assert found[2][1]["results"][0]["slow"] == {"error": "ValueError: a broken prompt", "failed": True}
    assert found[0][1]["results"][0]["slow"]["score"] == found[3][1]["results"][0]["slow"]["score"] == 40.0


def test_a_full_queue_is_refused_and_the_client_returns() -> None:
    slow = Slow()
    with serving({"slow": slow}, queue=4) as server:
        client = load_reward("remote", url=server.root, patience=60)
        slow.free_to_go.clear()
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(ask, server.root, 3)
            until(lambda: server.service.waiting == 3)
            refused = ask(server.root, 2)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert refused.json() == {"error": "3 images wait already, and the queue holds 4; try again"}
            patient = pool.submit(client.score, [smooth(0, 40, 30)] * 2, ["a"] * 2)
            until(lambda: server.service.metrics.total("diffalign_requests_total", status="429") == 2)
            slow.free_to_go.set()
            assert first.result().status_code == 200
            assert patient.result().tolist() == [40.0, 40.0]
        # An empty queue takes a request that is larger than it.
        assert ask(server.root, 6).status_code == 200


def test_one_model_at_a_time_answers_all_rewards() -> None:
    """Also while the loaded model has images to the end: another reward's turn comes before that."""
    loaded: set[float] = set()
    rewards = {"slow": Slow(1.0, 0.02, loaded), "double": Slow(2.0, 0.0, loaded)}
    with serving(dict(rewards), resident="one", turn=0.05, batch_size=4) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, server.root, 400, rewards=["slow"])  # 100 batches: 2 s
        until(lambda: len(server.service.lanes["slow"].units) > 4)
        other = ask(server.root, rewards=["double"])
        assert not long.done()
        assert other.json()["results"][0]["double"]["score"] == 80.0
        assert [one["slow"]["score"] for one in long.result().json()["results"]] == [40.0] * 400
        both = ask(server.root).json()["results"][0]
        loads = server.service.metrics.total("diffalign_model_loads_total")
    assert (both["slow"]["score"], both["double"]["score"]) == (40.0, 80.0)
    assert max(reward.most_loaded for reward in rewards.values()) == 1 and loads >= 4


def test_a_model_that_cannot_be_released_costs_its_request_alone() -> None:
    stuck = Slow()
    stuck.free = lambda: (_ for _ in ()).throw(RuntimeError("stuck"))  # type: ignore[method-assign]
    with serving({"slow": stuck, "double": Slow(2.0)}, resident="one") as server:
        statuses = [ask(server.root, rewards=[label]).status_code for label in ("slow", "double", "slow")]
        assert statuses == [200, 500, 200]
        assert httpx.get(f"{server.root}/health").json()["status"] == "ok"


def test_all_models_stay_in_memory_by_default() -> None:
    loaded: set[float] = set()
    with serving({"slow": Slow(1.0, 0.0, loaded), "double": Slow(2.0, 0.0, loaded)}) as server:
        for _ in range(3):
            assert ask(server.root).status_code == 200
        assert loaded == {1.0, 2.0} and server.service.metrics.total("diffalign_model_loads_total") == 2


def test_images_of_a_client_that_has_left_are_not_scored() -> None:
    slow = Slow()
    with serving({"slow": slow}, batch_size=1) as server:
        slow.free_to_go.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask, server.root)
            until(lambda: bool(slow.loaded))
            body = f'{{"images": ["{BASE64}"], "prompts": "left"}}'.encode()
            port = int(server.root.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as leaving:
                head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
                leaving.sendall(f"POST /v1/score HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
                until(lambda: server.service.waiting == 2 and len(server.service.lanes["slow"].units) == 1)
            until(lambda: server.service.waiting == 1)
            slow.free_to_go.set()
            assert first.result().status_code == 200
        assert ask(server.root).status_code == 200
        assert server.service.lanes["slow"].coming == 0
    assert slow.batches == [1, 1]


def test_the_queue_and_the_pixels_are_given_back() -> None:
    with serving({"slow": Slow()}, workers=2) as server:
        for prompt in ("a", "odd", "broken", ""):
            ask(server.root, 3, prompt)
        httpx.post(f"{server.root}/v1/score", json={"images": ["aaaa", BASE64], "prompts": "a"})
        service = server.service
        until(lambda: service._budget.left == service._budget.total)
        assert service.waiting == 0 and service.lanes["slow"].coming == 0


def test_metrics_count_what_happened() -> None:
    with serving({"slow": Slow()}) as server:
        ask(server.root, 3)
        ask(server.root, 2, "odd")
        httpx.post(f"{server.root}/v1/score", content=b"{")
        lines = httpx.get(f"{server.root}/metrics").text.splitlines()
        health = httpx.get(f"{server.root}/health").json()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['diffalign_images_total{reward="slow",outcome="scored"}'] == "3"
    assert values['diffalign_images_total{reward="slow",outcome="refused"}'] == "2"
    assert values['diffalign_requests_total{path="/v1/score",status="200"}'] == "2"
    assert values['diffalign_requests_total{path="/v1/score",status="400"}'] == "1"
    assert values["diffalign_request_seconds_count"] == values['diffalign_request_seconds_bucket{le="+Inf"}'] == "2"
    assert values["diffalign_queue_images"] == "0"
    assert health["status"] == "ok" and health["rewards"] == ["slow"] and health["queue"] == 0
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    names = {name.partition("{")[0] for name in values}
    assert {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in names} <= typed


def test_labels_of_metrics_are_escaped() -> None:
    metrics = Metrics()
    metrics.request('a"b\\c\nd', 200)
    assert r'path="a\"b\\c\nd"' in metrics.text({})


def test_a_gpu_that_has_failed_is_said_by_health() -> None:
    slow = Slow()
    slow.measure = lambda *_: (_ for _ in ()).throw(torch.AcceleratorError("CUDA error: device-side assert", 710))  # type: ignore[method-assign]
    with serving({"slow": slow}) as server:
        assert ask(server.root).status_code == 500
        health = httpx.get(f"{server.root}/health")
        assert health.status_code == 503 and "device-side assert" in health.json()["status"]
        assert ask(server.root).status_code == 500

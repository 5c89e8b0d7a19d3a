"""What a server remembers for its status page: on a clock of the test's own, and as a real server says it."""

import asyncio
import dataclasses
from types import SimpleNamespace

import httpx
import pytest

from cmjax.model import placed_layer_names
from cmjax.schedule import RequestTimes
from cmjax.serve import RequestHandle
from cmjax.serve.http import history
from cmjax.serve.http.history import MAX_REQUESTS, PERIOD_S, RECENT_S, SPAN_S, History
from tests.http.serving import PATIENCE, served, wait_until
from tests.http.test_metrics import STATS


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def past(clock):
    return History(SimpleNamespace(stats=lambda: STATS), clock)


def ended(num_tokens, **times):
    handle = RequestHandle("request", [0], RequestTimes(**times), lambda: None)
    handle.token_ids = [0] * num_tokens
    return handle


def test_medians_are_of_requests_that_ended_of_late(past, clock):
    assert past.recent() == {"span_s": RECENT_S, "num_requests": 0, "ttft_s": None, "tpot_s": None}
    past.note_request(ended(9, arrival=0.0, first_token=90.0, last_token=98.0))
    clock.now += RECENT_S
    for ttft in (1.0, 2.0, 4.0):
        past.note_request(ended(5, arrival=0.0, first_token=ttft, last_token=ttft + 2 * ttft))
    past.note_request(ended(1, arrival=0.0, first_token=4.0, last_token=4.0))  # has no time per token
    past.note_request(ended(0, arrival=0.0))  # got nothing
    recent = past.recent()
    assert recent["num_requests"] == 5
    assert recent["ttft_s"] == pytest.approx({"p50": 3.0, "p99": 4.0})
    assert recent["tpot_s"] == pytest.approx({"p50": 1.0, "p99": 1.98})


def test_samples_go_back_so_far_and_no_further(past, clock):
    for index in range(1000):
        if index == 900:
            past.note_request(ended(3, arrival=0.0, first_token=0.5, last_token=1.5))
        past.sample()
        clock.now += PERIOD_S
    samples = past.since(-1)
    assert len(samples) == SPAN_S / PERIOD_S
    assert (samples[0].at_s, samples[-1].at_s) == (PERIOD_S * (1000 - len(samples)), PERIOD_S * 999)
    assert [(one.ttft_s, one.tpot_s) for one in samples if one.ttft_s is not None] == [(0.5, 0.5)]
    assert past.since(samples[-3].at_s) == samples[-2:]
    for field in ("num_running", "num_waiting", "kv_usage", "num_generation_tokens"):
        assert getattr(samples[-1], field) == getattr(STATS, field)
    assert (samples[-1].num_looked_up, samples[-1].num_cached) == (5000, 3000)
    for _ in range(2 * MAX_REQUESTS):
        past.note_request(ended(3, arrival=0.0, first_token=0.5, last_token=1.5))
    assert past.recent()["num_requests"] == MAX_REQUESTS


def test_errors_are_refusals_and_failures(past):
    for status in (200, 204, 307, 400, 404, 429, 499, 500, 503):
        past.note_answer(status)
    past.sample()
    assert (past.num_refused, past.num_failed) == (3, 2)
    assert dataclasses.asdict(past.since(-1)[0]) | {"num_refused": 3, "num_failed": 2} == vars(past.since(-1)[0])


def test_samples_are_taken_until_the_server_ends(past, monkeypatch):
    monkeypatch.setattr(history, "PERIOD_S", 0.0)

    async def run() -> None:
        following = asyncio.create_task(past.follow())
        while len(past.since(-1)) < 5:
            await asyncio.sleep(0)
        following.cancel()

    asyncio.run(run())
    assert len(past.since(-1)) == 5


# -- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def http(engine, monkeypatch):
    monkeypatch.setattr(history, "PERIOD_S", 0.05)
    with served(engine) as address, httpx.Client(base_url=address, timeout=PATIENCE) as http:
        yield http


def test_what_is_remembered_is_what_was_served(http, engine):
    before = http.get("/status.json").json()
    assert (before["model"], before["num_refused"], before["recent"]["num_requests"]) == ("demo", 0, 0)
    body = {"prompt": "import os", "max_tokens": 9, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert http.post("/v1/completions", json={**body, "max_tokens": 9999}).status_code == 400
    now = http.get("/status.json").json()
    assert now["uptime_s"] > before["uptime_s"]
    assert now["num_generation_tokens"] == before["num_generation_tokens"] + 9
    assert (now["num_refused"], now["num_failed"], now["recent"]["num_requests"]) == (1, 0, 1)
    assert 0 < now["recent"]["tpot_s"]["p50"] == now["recent"]["tpot_s"]["p99"]
    assert now["recent"]["ttft_s"]["p50"] > 0

    def samples(after_s=-1.0):
        return http.get("/status/history.json", params={"after_s": after_s}).json()["samples"]

    wait_until(lambda: samples()[-1]["num_refused"] == 1)
    found = samples()
    assert {before["num_generation_tokens"], now["num_generation_tokens"]} <= {
        one["num_generation_tokens"] for one in found
    }
    assert [one["ttft_s"] for one in found if one["ttft_s"]] == [now["recent"]["ttft_s"]["p50"]]
    assert all(one["at_s"] > found[1]["at_s"] for one in samples(found[1]["at_s"]))
    refused = http.get("/status/history.json", params={"after_s": "noon"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "after_s")


def test_streams_that_end_with_an_error_are_errors(http, engine, monkeypatch):
    """Their status was 200."""

    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr("cmjax.serve.http.run._Choice.take", fail)
    with http.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True}) as answer:
        assert answer.status_code == 200
        assert "server_error" in answer.read().decode()
    assert http.get("/status.json").json()["num_failed"] == 1
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 500
    assert http.get("/status.json").json()["num_failed"] == 2


def test_the_load_of_the_experts_is_the_engine_s(http, engine):
    http.post("/v1/completions", json={"prompt": "import os", "max_tokens": 9, "ignore_eos": True})
    config, after = engine.model.config, http.get("/status/experts.json").json()
    assert after == {
        role: dict(zip(placed_layer_names(config), rows.tolist(), strict=True))
        for role, rows in engine.expert_load().items()
    }
    for role in ("prefill", "decode"):
        assert list(after[role]) == [*map(str, config.moe_layer_ids), "mtp"]
        assert {len(rows) for rows in after[role].values()} == {config.num_routed_experts}
        assert all(sum(after[role][str(layer)]) > 0 for layer in config.moe_layer_ids)

"""What is counted agrees: usage, the counters and the histograms, however an answer ends; every response is counted."""

import json
import threading

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cmjax.schedule import DecodePlan
from tests.http.serving import PATIENCE, serving_app, wait_until

TOTALS = (
    ("prompt_tokens_total", "request_prompt_tokens_sum"),
    ("generation_tokens_total", "request_generation_tokens_sum"),
)


@pytest.fixture(scope="module")
def server(engine):
    with serving_app(engine, max_body_bytes=10_000, max_concurrent_requests=40) as found:
        yield found


def samples(address):
    """Name and labels, sorted -> value."""
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics", timeout=PATIENCE).text)
    own = ("model_name", "engine")
    return {
        (s.name.removeprefix("vllm:"), *(value for name, value in sorted(s.labels.items()) if name not in own)): s.value
        for family in families
        for s in family.samples
    }


def growth(server, act):
    """What has been counted of `act`, and what it returns."""
    address, state = server
    before = samples(address)
    found = act(address)
    wait_until(lambda: state.num_active == 0)
    after = samples(address)
    return {key: value - before.get(key, 0) for key, value in after.items()}, found


def usage_of(address, path, body):
    answer = httpx.post(address + path, json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()["usage"]
    *_, last, end = (line.removeprefix("data: ") for line in answer.text.split("\n\n") if line)
    assert end == "[DONE]"
    return json.loads(last)["usage"]


BODIES = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["import os\n", ["def f(x):", "class A"], [[5, 6, 7], [8]]]),
        "max_tokens": st.sampled_from([0, 1, 2, 7, 30]),
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0, 1]),
        "stream": st.booleans(),
        "ignore_eos": st.booleans(),
    },
    optional={
        "stop": st.lists(st.sampled_from(["e", "s", " ", "\n", "self", "x"]), min_size=1, max_size=3),
        "stop_token_ids": st.lists(st.integers(5, 2000), max_size=60),
        "logprobs": st.integers(0, 2),
        "skip_special_tokens": st.booleans(),
    },
)


@given(body=BODIES)
@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
def test_the_counters_say_what_the_usage_says(server, body):
    if body["max_tokens"] == 0:
        body |= {"echo": True}
    body |= {"stream_options": {"include_usage": True}} if body["stream"] else {}
    grown, usage = growth(server, lambda address: usage_of(address, "/v1/completions", body))
    for name, (total, histogram) in zip(("prompt_tokens", "completion_tokens"), TOTALS, strict=True):
        assert (grown[total,], grown[histogram,]) == (usage[name], usage[name]), name
    num_choices = body["n"] * (1 if isinstance(body["prompt"], str) else 2)
    assert grown["request_generation_tokens_count",] == num_choices
    assert sum(value for key, value in grown.items() if key[0] == "request_success_total") == num_choices
    assert grown["request_success_total", "abort"] == grown["request_success_total", "error"] == 0
    # A chunk's tokens share the gap before it, so that gaps of tokens and of chunks last as long together.
    assert grown["inter_token_latency_seconds_sum",] == pytest.approx(grown["inter_chunk_latency_seconds_sum",])
    assert grown["inter_token_latency_seconds_count",] <= max(usage["completion_tokens"] - num_choices, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_end_is_counted_as_the_client_is_told_it(server, stream):
    """A stop string in the last tokens, which the engine ends by their number."""
    body = {"prompt": "import os\n", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    text = httpx.post(f"{server[0]}/v1/completions", json=body, timeout=PATIENCE).json()["choices"][0]["text"]
    stop = next(text[-size:] for size in range(1, len(text)) if text.find(text[-size:]) == len(text) - size)
    asked = {**body, "stop": [stop], "stream": stream, "stream_options": {"include_usage": True} if stream else None}
    grown, usage = growth(server, lambda address: usage_of(address, "/v1/completions", asked))
    assert usage["completion_tokens"] <= 8
    reasons = {key[1]: value for key, value in grown.items() if key[0] == "request_success_total" and value}
    assert reasons == {"stop": 1}


def test_a_chat_s_too(server):
    body = {"messages": [{"role": "user", "content": "def f(x):"}], "max_tokens": 9, "n": 2, "stop": "e"}
    grown, usage = growth(server, lambda address: usage_of(address, "/v1/chat/completions", body))
    assert [grown[name,] for name in TOTALS[1]] == [usage["completion_tokens"]] * 2
    assert [grown[name,] for name in TOTALS[0]] == [usage["prompt_tokens"]] * 2


def test_what_a_client_got_before_it_went_is_counted_and_no_more(server, engine, monkeypatch):
    (decoding,) = engine.fleet.decode.values()
    run, is_gone, num_calls = decoding.run, threading.Event(), 0

    def run_two(plan):
        nonlocal num_calls
        num_calls += isinstance(plan, DecodePlan)
        if num_calls > 2:
            is_gone.wait(PATIENCE)
        return run(plan)

    monkeypatch.setattr(decoding, "run", run_two)
    wanted = 1 + 2 * engine.settings.steps_per_call
    body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True, "return_token_ids": True}

    def leave(address):
        got = 0
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=PATIENCE) as answer:
            for line in answer.iter_lines():
                got += len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]) if line else 0
                if got == wanted:
                    return got
        return got

    try:
        grown, got = growth(server, leave)
    finally:
        is_gone.set()
    assert got == wanted
    assert [grown[name,] for name in TOTALS[1]] == [wanted] * 2
    assert grown["request_success_total", "abort"] == 1


def test_every_response_is_counted(server):
    def ask(address):
        with httpx.Client(base_url=address, timeout=PATIENCE) as http:
            http.get("/health")
            http.head("/health")
            http.get("/v1/models/demo")
            http.get("/v1/models/other")
            http.get("/nothing/of/this/name")
            http.get("/v1/completions")
            http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            http.post("/v1/completions", json={"prompt": "a", "max_tokens": -1})
            http.post("/v1/completions", json={"prompt": "a" * 20_000})
            http.request("BREW", "/")
            http.options("/health", headers={"Origin": "http://a", "Access-Control-Request-Method": "GET"})

    grown, _ = growth(server, ask)
    found = {key[1:]: value for key, value in grown.items() if key[0] == "http_requests_total" and value}
    # Labels by name: handler, method, status; the two looks at the metrics among them.
    assert found == {
        ("/health", "GET", "200"): 1,
        ("/health", "HEAD", "200"): 1,
        ("/health", "OPTIONS", "200"): 1,
        ("/v1/models/{model:path}", "GET", "200"): 1,
        ("/v1/models/{model:path}", "GET", "404"): 1,
        ("none", "GET", "404"): 1,
        ("/v1/completions", "GET", "405"): 1,
        ("/v1/completions", "POST", "200"): 1,
        ("/v1/completions", "POST", "400"): 1,
        ("/v1/completions", "POST", "413"): 1,
        ("none", "other", "400"): 1,  # no method that there is: the connection itself says so
        ("/metrics", "GET", "200"): 1,
    }


def test_refusals_before_the_routes_are_counted(engine):
    with serving_app(engine, api_keys=("one",), max_concurrent_requests=1) as (address, state):
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "a"}, timeout=PATIENCE).status_code == 401
        state.num_active = 1
        head = {"Authorization": "Bearer one"}
        body = {"prompt": "a"}
        answer = httpx.post(f"{address}/v1/completions", json=body, headers=head, timeout=PATIENCE)
        assert answer.status_code == 429
        state.num_active = 0
        state.is_draining = True
        answer = httpx.post(f"{address}/v1/completions", json=body, headers=head, timeout=PATIENCE)
        assert answer.status_code == 503
        found = samples(address)
        for status in ("401", "429", "503"):
            assert found["http_requests_total", "/v1/completions", "POST", status] == 1


def test_the_process_is_measured(server):
    address, _ = server
    found = samples(address)
    assert found["process_resident_memory_bytes",] > 1e6
    assert found["process_cpu_seconds_total",] > 0
    assert found["process_open_fds",] > 0
    assert any(key[0] == "python_info" for key in found)

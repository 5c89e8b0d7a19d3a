"""Nothing that a client sends holds the event loop: streams go on beside bodies of any size, and late bodies end."""

import contextlib
import json
import os
import re
import signal
import socket
import threading

import httpx
import pytest

from cmjax.checkpoint import Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.serve.http.lag import LoopLag
from tests.http.serving import PATIENCE, serving_app, wait_until

TOKENIZER = Tokenizer.from_folder(BUNDLED_MODEL)
STREAM = {"prompt": "import os\n", "max_tokens": 40, "ignore_eos": True, "temperature": 0, "stream": True}
MEGABYTES = 15
LARGE = {
    "a text": ("/v1/completions", {"prompt": "import os\n" * (MEGABYTES * 90_000)}, "context_length_exceeded"),
    "a list of ids": ("/v1/completions", {"prompt": [5] * (MEGABYTES * 330_000)}, "context_length_exceeded"),
    "a chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "import os\n" * (MEGABYTES * 90_000)}]},
        "context_length_exceeded",
    ),
    "what is unknown": ("/v1/completions", {"prompt": "a", "user": "x" * (MEGABYTES * 1_000_000), "n": 129}, None),
}


@pytest.fixture(scope="module")
def large(engine):
    """A server that takes large bodies, and its state."""
    with serving_app(engine) as (address, state):
        # Its process is there, so that it can be held.
        answer = httpx.post(f"{address}/tokenize", json={"prompt": "a " * 50_000}, timeout=PATIENCE)
        assert answer.json()["count"] == len(answer.json()["tokens"]) == len(TOKENIZER.encode("a " * 50_000))
        yield address, state


@contextlib.contextmanager
def held(pid):
    """A process that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("kind", LARGE)
def test_streams_go_on_beside_a_large_body(large, kind):
    """The body's process is held until all else has been answered: whoever did its work in the loop would wait too."""
    address, state = large
    path, body, code = LARGE[kind]
    answers = []
    sender = threading.Thread(
        target=lambda: answers.append(httpx.post(address + path, content=raw, headers=head, timeout=PATIENCE))
    )
    raw, head = json.dumps(body).encode(), {"Content-Type": "application/json"}
    assert len(raw) > MEGABYTES * 900_000
    with held(state.intake.process.pid):
        sender.start()
        wait_until(lambda: state.intake.is_busy)
        with httpx.stream("POST", f"{address}/v1/completions", json=STREAM, timeout=PATIENCE) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert events[-1] == "data: [DONE]"
        assert httpx.get(f"{address}/health", timeout=PATIENCE).status_code == 200
        # Bodies that are too large to be taken in the loop, and too small for the process.
        middling = {"prompt": "a " * 5_000}
        tokens = httpx.post(f"{address}/tokenize", json=middling, timeout=PATIENCE).json()["tokens"]
        assert tokens == TOKENIZER.encode(middling["prompt"])
        assert not answers
    sender.join(PATIENCE)
    assert answers[0].status_code == 400
    assert answers[0].json()["error"]["code"] == code


def test_the_answer_to_a_large_body_is_whole(large):
    address, _ = large
    text = "def mean(values):\n" * 20_000
    tokens = httpx.post(f"{address}/tokenize", json={"prompt": text}, timeout=PATIENCE).json()["tokens"]
    assert tokens == TOKENIZER.encode(text)
    back = httpx.post(f"{address}/detokenize", json={"tokens": tokens}, timeout=PATIENCE).json()["prompt"]
    assert back == "<|begin|>" + text
    many = {"prompt": [[5, 6, 7] * 30] * 250, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    raw = json.dumps(many)
    assert len(raw) > 1 << 16
    choices = httpx.post(f"{address}/v1/completions", json=many, timeout=PATIENCE).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == many["prompt"]


def test_a_process_that_dies_costs_one_answer(large):
    address, state = large
    body = {"prompt": "a", "user": "x" * 100_000, "max_tokens": 1}
    answers = []
    sender = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE))
    )
    process = state.intake.process
    with held(process.pid):
        sender.start()
        wait_until(lambda: state.intake.is_busy)
        process.kill()
    sender.join(PATIENCE)
    assert answers[0].status_code == 500
    assert answers[0].json()["error"]["type"] == "server_error"
    assert httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE).status_code == 200


# -- what does not come ------------------------------------------------------------------------------------------------


def said(address, *pieces):
    """What a server says to these bytes, until it closes the connection."""
    host, port = re.fullmatch(r"http://(.*):(\d+)", address).groups()
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def test_half_a_request_ends_the_connection(engine):
    with serving_app(engine, receive_timeout_s=0.2) as (address, _):
        half = said(address, HEAD + b"Content-Length: 100\r\n\r\n", b'{"prompt": ')
        assert half.startswith("HTTP/1.1 408 ")
        error = json.loads(half.partition("\r\n\r\n")[2])["error"]
        assert error["message"] == "the body did not come within 0.2 s: 11 bytes of it did"
        assert "connection: close" in half.lower()
        chunked = said(address, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"3\r\n{ab\r\n")
        assert chunked.startswith("HTTP/1.1 408 ")
        head = said(address, HEAD)
        assert head.startswith("HTTP/1.1 408 ")
        assert "the head of the request did not come" in json.loads(head.partition("\r\n\r\n")[2])["error"]["message"]
        assert said(address) == ""  # who says nothing is told nothing
        # An answer that needed no body: the connection does not wait for the rest of it for ever either.
        assert said(address, HEAD.replace(b"completions", b"none") + b"Content-Length: 9\r\n\r\n{").startswith(
            "HTTP/1.1 404 "
        )
        # Who sends all of it is not hurried, however long the answer takes.
        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
        assert httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE).status_code == 200
        text = httpx.get(f"{address}/metrics", timeout=PATIENCE).text
        counts = re.findall(r'^http_requests_total\{handler="(.*)",method="(.*)",status="408"\} (\S+)$', text, re.M)
        assert sorted(counts) == [("/v1/completions", "POST", "2.0"), ("none", "other", "1.0")]


# -- the lag ----------------------------------------------------------------------------------------------------------


def test_a_loop_that_is_held_is_late_for_all_that_came_meanwhile():
    now, seen = [100.0], []
    lag = LoopLag(seen.append, lambda: now[0])
    assert lag.quantiles() == {"p50": 0.0, "p99": 0.0, "p999": 0.0, "max": 0.0, "count": 0}
    now[0] += 1.005  # a second, in which nothing was sampled
    lag.take()
    found = lag.quantiles()
    assert (found["count"], len(seen)) == (100, 100)
    assert (found["p50"], found["max"]) == (pytest.approx(0.5, abs=0.02), pytest.approx(0.995))
    for _ in range(6000):  # a minute later it is forgotten
        now[0] += 0.01
        lag.take()
    assert lag.quantiles()["max"] == pytest.approx(0.005)
    assert max(seen) == pytest.approx(0.995)
    now[0] += 1e6  # a machine that slept
    lag.take()
    assert lag.quantiles()["count"] == 6000
    assert len(seen) < 20_000


def test_the_loop_s_lag_is_told(large):
    address, state = large
    wait_until(lambda: state.lag.quantiles()["count"] > 10)
    found = httpx.get(f"{address}/status.json", timeout=PATIENCE).json()["event_loop_lag_s"]
    assert set(found) == {"p50", "p99", "p999", "max", "count"}
    assert 0 <= found["p50"] <= found["p99"] <= found["p999"] <= found["max"]
    text = httpx.get(f"{address}/metrics", timeout=PATIENCE).text
    assert float(re.search(r"^vllm:event_loop_lag_seconds_count\{.*\} (\S+)$", text, re.M)[1]) > 10

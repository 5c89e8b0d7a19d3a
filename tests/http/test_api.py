"""The API as clients use it: the `openai` package and plain HTTP, against a real server over a real engine."""

import asyncio
import itertools
import json
import re
import threading
import time

import httpx
import openai
import pytest

from cmjax.api import taking
from cmjax.checkpoint import Detokenizer, Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.schedule import SendPlan
from cmjax.serve import SamplingParams, decode, prefill
from tests.http.serving import PATIENCE, served, wait_until, wait_until_idle

TOKENIZER = Tokenizer.from_folder(BUNDLED_MODEL)
TEXTS = ["import os\n", "def mean(values):\n", "class Node:\n    def __init__(self"]


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=PATIENCE) as http:
        yield http


def alone(engine, prompt, **sampling):
    """What the engine says to the prompt, as token ids; the token that ends it included."""
    sampling = {"stop_token_ids": (TOKENIZER.eos_token_id,), **sampling}
    return engine.submit(prompt, SamplingParams(**sampling)).result(timeout=PATIENCE)


# -- completions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_the_engine_s_text(client, engine, stream):
    ids = TOKENIZER.encode(TEXTS[0])
    expected = alone(engine, ids, max_tokens=20)
    text = TOKENIZER.decode(expected.token_ids)
    if stream:
        chunks = list(
            client.completions.create(
                model="demo", prompt=TEXTS[0], max_tokens=20, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
        usage = chunks.pop().usage
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == expected.finish_reason
        assert len(chunks) > 1
    else:
        answer = client.completions.create(model="demo", prompt=TEXTS[0], max_tokens=20, temperature=0)
        assert answer.choices[0].text == text
        usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(expected.token_ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_prompts_as_texts_and_as_token_ids(client):
    common = {"model": "demo", "max_tokens": 8, "temperature": 0}
    ids = [TOKENIZER.encode(text) for text in TEXTS]
    several = [choice.text for choice in client.completions.create(prompt=TEXTS, **common).choices]
    assert [choice.text for choice in client.completions.create(prompt=ids, **common).choices] == several
    one = [client.completions.create(prompt=prompt, **common).choices[0].text for prompt in (TEXTS[1], ids[1])]
    assert one == [several[1]] * 2
    assert len(set(several)) == 3


def test_choices_differ_and_their_seed_repeats_them(client):
    def texts(seed, **extra):
        options = {"prompt": TEXTS[0], "max_tokens": 12, "n": 3, "seed": seed, "temperature": 1.5, "extra_body": extra}
        return [choice.text for choice in client.completions.create(model="demo", **options).choices]

    assert texts(7) == texts(7)
    assert texts(7) != texts(8)
    assert len(set(texts(7))) == 3
    assert len(set(texts(7, top_k=1))) == 1
    assert len(set(texts(7, min_p=1.0))) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client, engine, stream):
    whole = TOKENIZER.decode(alone(engine, TOKENIZER.encode(TEXTS[1]), max_tokens=32).token_ids)
    stop = whole[len(whole) // 2 :][:3]
    answer = client.completions.create(
        model="demo", prompt=TEXTS[1], max_tokens=32, temperature=0, stop=[stop, "\x00"], stream=stream
    )
    if stream:
        chunks = list(answer)
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_log_probabilities_and_echo(client, engine):
    ids = TOKENIZER.encode(TEXTS[0])
    expected = alone(engine, ids, max_tokens=4, logprobs=2, prompt_logprobs=2)
    answer = client.completions.create(
        model="demo", prompt=ids, max_tokens=4, temperature=0, logprobs=2, echo=True
    ).choices[0]
    found = answer.logprobs
    everything = [*expected.prompt_logprobs, *expected.logprobs]
    assert found.token_logprobs == pytest.approx([one and one.logprob for one in everything], abs=1e-4)
    assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == len(ids) + len(expected.token_ids)
    assert found.top_logprobs[0] is None
    for token, top, logprob in zip(found.tokens[1:], found.top_logprobs[1:], found.token_logprobs[1:], strict=True):
        assert top[token] == pytest.approx(logprob)
        assert 2 <= len(top) <= 3
    assert answer.text.endswith(TOKENIZER.decode(expected.token_ids))
    # What an evaluation asks for: the prompt's own log probabilities and nothing more.
    only = client.completions.create(model="demo", prompt=ids, max_tokens=0, logprobs=1, echo=True).choices[0]
    assert len(only.logprobs.tokens) == len(ids)
    assert only.logprobs.token_logprobs == pytest.approx(found.token_logprobs[: len(ids)], abs=1e-4)


def test_biases_penalties_and_ignored_ends(client, http):
    common = {"prompt": TEXTS[0], "max_tokens": 6, "temperature": 0}
    ids = TOKENIZER.encode_with_ends(" zip")[0]
    biased = client.completions.create(model="demo", logit_bias={str(ids[0]): 100}, **common).choices[0].text
    assert biased == TOKENIZER.decode([ids[0]] * 6)
    varied = client.completions.create(
        model="demo", logit_bias={str(ids[0]): 12}, frequency_penalty=2, presence_penalty=2, **common
    )
    assert varied.choices[0].text != biased
    eos = {str(TOKENIZER.eos_token_id): 100}
    ended = http.post("/v1/completions", json={**common, "logit_bias": eos}).json()
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")
    assert ended["usage"]["completion_tokens"] == 1
    went_on = http.post("/v1/completions", json={**common, "logit_bias": eos, "ignore_eos": True}).json()
    assert went_on["usage"]["completion_tokens"] == 6
    own = http.post("/v1/completions", json={**common, "logit_bias": {str(ids[0]): 100}, "stop_token_ids": ids[:1]})
    assert own.json()["choices"][0]["stop_reason"] == ids[0]


# -- chats ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_the_template_s_completion(client, engine):
    messages = [{"role": "user", "content": [{"type": "text", "text": "def f(x):"}]}]
    ids = TOKENIZER.encode_with_ends("<|begin|><|user|>def f(x):<|assistant|>")[0]
    expected = alone(engine, ids, max_tokens=10, logprobs=2)
    options = {"model": "demo", "messages": messages, "max_completion_tokens": 10, "temperature": 0}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **options)
    choice = answer.choices[0]
    assert choice.message.content == TOKENIZER.decode(expected.token_ids)
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(
        [one.logprob for one in expected.logprobs], abs=1e-4
    )
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
    assert answer.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_many_at_once_from_an_event_loop(address, engine):
    async def ask(client, index):
        stream = await client.completions.create(
            model="demo", prompt=TEXTS[index % 3], max_tokens=4 + index, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(30)))

    found = asyncio.run(ask_all())
    for index, text in enumerate(found):
        expected = alone(engine, TOKENIZER.encode(TEXTS[index % 3]), max_tokens=4 + index).token_ids
        assert text == TOKENIZER.decode(expected)


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_what_a_server_says_of_itself(client, http):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert http.get("/health").status_code == 200
    assert http.get("/version").json()["version"]
    ids = http.post("/tokenize", json={"prompt": TEXTS[0]}).json()
    assert ids["tokens"] == TOKENIZER.encode(TEXTS[0])
    assert ids["count"] == len(ids["tokens"])
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()["tokens"]
    assert TOKENIZER.backend.decode(chat, skip_special_tokens=False) == "<|begin|><|user|>a<|assistant|>"
    back = http.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"]
    assert back == "<|begin|>" + TEXTS[0]
    assert (
        http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "mine"}).headers["x-request-id"]
        == "mine"
    )
    status = http.get("/status.json").json()
    assert [one["role"] for one in status["instances"]] == ["prefill", "decode"]
    assert "text/html" in http.get("/").headers["content-type"]


def test_mistakes_are_openai_s_errors(client, http):
    long = {"prompt": [5] * 250, "max_tokens": 10}
    cases = [
        ({"prompt": "a", "temperature": -1}, 400, "temperature", None),
        ({"prompt": "a", "max_tokens": "many"}, 400, "max_tokens", None),
        ({"prompt": {}}, 400, "prompt", None),
        ({"prompt": []}, 400, "prompt", None),
        ({"prompt": [[]]}, 400, "prompt", None),
        ({"prompt": [2**31 - 1]}, 400, None, None),
        ({}, 400, "prompt", None),
        (long, 400, "prompt", "context_length_exceeded"),
        ({"prompt": "a", "model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", None),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", None),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", None),
        ({"prompt": "a", "n": 129}, 400, "n", None),
        ({"prompt": "a", "n": 41}, 400, "prompt", None),
        ({"prompt": ["a", "b", "c"], "n": 14}, 400, "prompt", None),
        ({"prompt": "a", "priority": -1}, 400, "priority", None),
        ({"prompt": "a", "logit_bias": {str(token): 1 for token in range(301)}}, 400, "logit_bias", None),
    ]
    for body, status, param, code in cases:
        answer = http.post("/v1/completions", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code), body
        assert error["message"]
    assert http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert http.post("/v1/completions", json={"prompt": "a" * 200_000}).status_code == 413
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/nothing").json()["error"]["type"] == "not_found_error"
    for extra in ({"tools": [{}]}, {"response_format": {"type": "json_object"}}, {"top_logprobs": 2}, {"messages": []}):
        body = {"messages": [{"role": "user", "content": "a"}], **extra}
        assert http.post("/v1/chat/completions", json=body).status_code == 400, extra
    with pytest.raises(openai.BadRequestError, match="maximum context length of 256"):
        client.completions.create(model="demo", **long)
    # What other clients send and nobody minds.
    fine = {"prompt": "a", "max_tokens": 1, "stop": None, "user": "me", "best_of": 1, "unknown": 3, "stream": False}
    assert http.post("/v1/completions", json=fine).status_code == 200


def test_prompts_times_choices_are_counted_before_they_cost_anything(http, monkeypatch):
    monkeypatch.setattr(taking, "sampling_of", lambda *_: pytest.fail("made the settings of a choice"))
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("tokenized a prompt"))
    for prompts in ([[1]] * 9_000, ["a"] * 9_000):
        answer = http.post("/v1/completions", json={"prompt": prompts, "n": 128})
        assert answer.status_code == 400
        assert "1152000 prompts times choices, at most 40 are taken" in answer.json()["error"]["message"]


def test_more_than_may_be_under_way_are_asked_to_try_again(address, http, engine, monkeypatch):
    (decoding,) = engine.fleet.decode.values()
    run, is_refused = decoding.run, threading.Event()
    # No choice ends before the second request has been sent, however fast the machine is.
    monkeypatch.setattr(decoding, "run", lambda plan: (is_refused.wait(PATIENCE), run(plan))[1])
    body = {"prompt": TEXTS[0], "max_tokens": 200, "ignore_eos": True, "n": 30, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=PATIENCE) as answer:
        lines = answer.iter_lines()  # kept: an iterator that goes closes the connection, and the request is cancelled
        next(lines)
        refused = http.post("/v1/completions", json={"prompt": "a", "n": 11})
        is_refused.set()
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_in_the_server_is_one_error_and_is_counted(http, engine, monkeypatch, stream, caplog):
    """A tokenizer that fails, say: the client is told, the stream ends as streams do, nothing else is hurt."""

    def count():
        text = http.get("/metrics").text
        return float(re.search(r"^vllm:internal_errors_total\{.*\} (\S+)$", text, re.M)[1])

    before, fed, feed = count(), itertools.count(), Detokenizer.feed

    def fail(self, token_id):
        if next(fed) == 5:
            raise RuntimeError("secret of the tokenizer")
        return feed(self, token_id)

    monkeypatch.setattr(Detokenizer, "feed", fail)
    body = {"prompt": TEXTS[0], "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": stream}
    answer = http.post("/v1/completions", json=body)
    if stream:
        *events, last, end = (line for line in answer.text.split("\n\n") if line)
        assert (answer.status_code, end) == (200, "data: [DONE]")
        assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events)
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 500
        error = answer.json()["error"]
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    assert "secret of the tokenizer" in caplog.text or not stream  # uvicorn logs the other, which is off here
    assert count() == before + 1
    monkeypatch.undo()
    wait_until_idle(engine)
    assert http.post("/v1/completions", json={**body, "stream": False}).status_code == 200


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_are_places_in_the_text_that_is_returned(http, echo):
    """A character of several tokens, a special token in front."""
    body = {"prompt": "é 日本", "max_tokens": 12, "temperature": 0, "logprobs": 0, "echo": echo, "ignore_eos": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    text, found = choice["text"], choice["logprobs"]
    assert text.startswith("é 日本") == echo
    assert found["text_offset"] == sorted(found["text_offset"])
    assert found["text_offset"][0] == 0
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if token.isascii() and not token.startswith("<|"):
            assert text[offset:].startswith(token)


def test_no_request_makes_a_server_compile(http, engine):
    """As many biases as there may be, more stop tokens than a step looks for, all log probabilities, penalties."""
    num_compiled = decode._cache_size(), prefill._cache_size()
    everything = {
        "logit_bias": {str(token): 0.5 for token in range(300)},
        "stop_token_ids": list(range(1000, 1064)),
        "logprobs": 20,
        "temperature": 0.7,
        "frequency_penalty": 0.5,
    }
    stops = {"temperature": 0, "stop_token_ids": list(range(1000, 1064))}
    for fields in (everything, stops):
        answer = http.post("/v1/completions", json={"prompt": TEXTS[0], "max_tokens": 12, **fields})
        assert answer.status_code == 200, answer.text
    assert (decode._cache_size(), prefill._cache_size()) == num_compiled


def test_a_stop_token_beyond_those_that_a_step_looks_for_ends_a_request(http, engine):
    free = alone(engine, TOKENIZER.encode(TEXTS[0]), max_tokens=12).token_ids
    wanted = free[: free.index(free[5]) + 1]
    others = [token for token in range(1900, 1963) if token not in free]
    for temperature in (0, 1e-4):  # taken by the greedy step, and by the one that samples
        body = {"prompt": TEXTS[0], "max_tokens": 12, "temperature": temperature, "top_k": 1, "return_token_ids": True}
        answer = http.post("/v1/completions", json={**body, "stop_token_ids": [*others, free[5]]}).json()
        assert "choices" in answer, answer
        assert answer["choices"][0]["token_ids"] == wanted
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_keys_open_and_tell_tenants_apart(engine):
    with served(engine, api_keys=("one", "two")) as address, httpx.Client(base_url=address, timeout=PATIENCE) as http:
        body = {"prompt": "a", "max_tokens": 1}
        assert http.post("/v1/completions", json=body).status_code == 401
        assert http.post("/v1/completions", json=body, headers={"Authorization": "Bearer three"}).status_code == 401
        assert http.get("/health").status_code == 200
        for key in ("one", "two"):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client:
                assert client.completions.create(model="demo", **body).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_what_it_held(address, engine, monkeypatch, stream):
    (decoding,) = engine.fleet.decode.values()
    run, is_gone = decoding.run, threading.Event()
    # The client goes before the choices have ended, however fast the machine is.
    monkeypatch.setattr(decoding, "run", lambda plan: (is_gone.wait(PATIENCE), run(plan))[1])
    body = {"prompt": TEXTS[0], "max_tokens": 250, "ignore_eos": True, "n": 4, "stream": stream}
    before = engine.stats().num_generation_tokens
    if stream:
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=PATIENCE) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            wait_until(lambda: engine.stats().num_running == 4)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=body, timeout=0.3)
    is_gone.set()
    wait_until_idle(engine)
    assert engine.stats().num_generation_tokens - before < 4 * 250


def test_a_failed_request_is_an_error_and_never_a_result(address, http, engine, monkeypatch):
    (source,) = engine.prefill
    run = source.run

    def fails_to_send(plan):
        if isinstance(plan, SendPlan):
            raise RuntimeError("the link is down")
        return run(plan)

    monkeypatch.setattr(source, "run", fails_to_send)
    answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 8})
    assert answer.status_code == 500
    assert "its KV could not be sent to decode0: the link is down" in answer.json()["error"]["message"]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="demo", prompt="a", max_tokens=8, stream=True)
        with pytest.raises(openai.APIError, match="the link is down"):
            list(stream)


def test_metrics_count_what_has_been_served(http):
    from prometheus_client.parser import text_string_to_metric_families

    def values():
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {
            (s.name, s.labels.get("finished_reason", s.labels.get("le", ""))): s.value
            for f in families
            for s in f.samples
        }

    before = values()
    http.post("/v1/completions", json={"prompt": TEXTS[0], "max_tokens": 9, "ignore_eos": True, "n": 2})
    deadline = time.monotonic() + 10
    while (
        values()["vllm:request_success_total", "length"] < before.get(("vllm:request_success_total", "length"), 0) + 2
    ):
        assert time.monotonic() < deadline
    after = values()
    grown = {key[0]: after[key] - before.get(key, 0.0) for key in after if key[1] == ""}
    assert grown["vllm:generation_tokens_total"] == 18
    assert grown["vllm:prompt_tokens_total"] == len(TOKENIZER.encode(TEXTS[0]))
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_time_per_output_token_seconds"):
        assert grown[f"vllm:{name}_count"] == 2
        assert grown[f"vllm:{name}_sum"] > 0
    assert after["vllm:num_requests_running", ""] == 0
    assert 0 <= after["vllm:kv_cache_usage_perc", ""] <= 1


def test_events_are_well_formed(http):
    body = {"prompt": TEXTS[0], "max_tokens": 5, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert len({event["id"] for event in events}) == 1


def test_equal_prompts_of_a_body_are_drawn_apart(http):
    """But with a seed, by which all that a body asks for can be had again."""
    body = {"prompt": [TEXTS[0]] * 3, "max_tokens": 24, "n": 2, "temperature": 2.0, "ignore_eos": True}

    def texts(**fields):
        return [one["text"] for one in http.post("/v1/completions", json={**body, **fields}).json()["choices"]]

    assert len(set(texts())) == 6
    assert texts(seed=5) == texts(seed=5)

"""The prefix cache as clients see it: what usage says was cached, who shares with whom, and that all counts agree."""

import dataclasses
import itertools
import json
import re

import httpx
import openai
import pytest

import cmjax
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.serve import Engine, EngineSettings
from cmjax.serve.caching import CacheSettings
from cmjax.serve.http import history
from cmjax.serve.http.keys import namespace_of
from tests.http.serving import PATIENCE, served, serving_app, wait_until_idle
from tests.http.test_counters import growth, usage_of

pytestmark = pytest.mark.usefixtures("one_shape_of_sampling")
BLOCK = 16
NUM_TOKENS = 3 * BLOCK + 5
KEYS = ("key of one", "key of two")
PATHS = ("/v1/completions", "/v1/chat/completions")
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def caching():
    """An engine with a prefix cache."""
    settings = EngineSettings(max_num_seqs_per_rank=8, max_model_len=256, max_num_batched_tokens=256, block_size=BLOCK)
    cache = CacheSettings(cache_block_size=BLOCK, dram_bytes=100_000_000)
    sizes = {"ep_size": 2, "prefill_ep_size": 1, "num_prefill_instances": 1}
    engine = Engine(cmjax.load(BUNDLED_MODEL), **sizes, settings=settings, cache=cache)
    engine.start()
    yield engine
    engine.shutdown(timeout=0)


@pytest.fixture(scope="module")
def server(caching):
    with serving_app(caching) as found:
        yield found


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def guarded(caching):
    """The address of a server with two keys."""
    with served(caching, api_keys=KEYS, open_pages=True) as address:
        yield address


def new_prompt(num_tokens=NUM_TOKENS):
    """Token ids that no prompt of these tests begins with, not even with the first block of them."""
    number = next(_numbers)
    return [5 + (number * 7919 + place * (number + 31)) % 2000 for place in range(num_tokens)]


def new_messages():
    return [{"role": "user", "content": f"{next(_numbers)} is the number of this conversation. " * 3}]


def cached_of(address, prompt, key=None, path=PATHS[0], **more):
    """What the usage of an answer says was cached."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    kind = "messages" if isinstance(prompt[0], dict) else "prompt"
    body = {kind: prompt, "max_tokens": 1, "temperature": 0, **more}
    answer = httpx.post(address + path, json=body, headers=headers, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def whole_blocks(num_tokens):
    """The most of a prompt that can be cached: whole blocks, and one token is always computed."""
    return (num_tokens - 1) // BLOCK * BLOCK


# -- what usage says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [BLOCK, BLOCK + 1, NUM_TOKENS, 4 * BLOCK])
def test_a_repeated_prompt_is_cached_and_its_answer_the_same(address, num_tokens):
    body = {"prompt": new_prompt(num_tokens), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answers = [httpx.post(address + PATHS[0], json=body, timeout=PATIENCE).json() for _ in range(3)]
    found = [one["usage"].pop("prompt_tokens_details")["cached_tokens"] for one in answers]
    assert found == [0, whole_blocks(num_tokens), whole_blocks(num_tokens)]
    assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]
    assert answers[0]["usage"] == {"prompt_tokens": num_tokens, "completion_tokens": 8, "total_tokens": num_tokens + 8}


def test_prompts_share_the_blocks_that_they_begin_with(address):
    prompt, other = new_prompt(), new_prompt()
    assert cached_of(address, prompt) == 0
    for num_common in (BLOCK, 2 * BLOCK + 3):
        expected = num_common // BLOCK * BLOCK
        assert cached_of(address, [*prompt[:num_common], *other[num_common:]]) == expected
    assert cached_of(address, [*other[:3], *prompt[3:]]) == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_chat", [False, True])
def test_openai_s_client_is_told(address, is_chat, stream):
    messages, prompt = new_messages(), new_prompt()

    def ask(client):
        options = {"model": "demo", "max_tokens": 4, "temperature": 0, "stream": stream}
        if stream:
            options["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        if is_chat:
            answer = client.chat.completions.create(messages=messages, **options)
        else:
            answer = client.completions.create(prompt=prompt, **options)
        if not stream:
            return [answer.usage]
        # All but a chat's first, which says the role before anything is known.
        return [chunk.usage for chunk in answer][1 if is_chat else 0 :]

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        first, again = ask(client), ask(client)
    assert {one.prompt_tokens_details.cached_tokens for one in first} == {0}
    assert {one.prompt_tokens_details.cached_tokens for one in again} == {whole_blocks(again[-1].prompt_tokens)}


def test_a_prompt_counts_once_whatever_n_is(address):
    known, new = new_prompt(), new_prompt()
    cached_of(address, known)
    assert cached_of(address, [known, new, known], n=4, temperature=1) == 2 * whole_blocks(NUM_TOKENS)
    assert cached_of(address, [new], n=4, temperature=1) == whole_blocks(NUM_TOKENS)


# -- who shares with whom ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_clients_with_different_keys_share_nothing(guarded, path):
    prompt = new_prompt() if path == PATHS[0] else new_messages()
    one, two = KEYS
    assert [cached_of(guarded, prompt, key, path) for key in (one, two)] == [0, 0]
    assert cached_of(guarded, prompt, one, path) == cached_of(guarded, prompt, two, path) > 0


def test_a_client_with_a_key_shares_nothing_with_one_of_a_server_without(address, guarded):
    prompt = new_prompt()
    assert cached_of(address, prompt) == 0
    assert cached_of(guarded, prompt, KEYS[0]) == 0
    assert cached_of(address, prompt) > 0


def test_they_share_all_where_the_server_is_told_so(caching):
    prompt, other = new_prompt(), new_prompt()
    with served(caching, api_keys=KEYS, share_prefix_cache=True) as address:
        assert cached_of(address, prompt, KEYS[0]) == 0
        assert cached_of(address, prompt, KEYS[1]) == whole_blocks(NUM_TOKENS)
        assert cached_of(address, other, KEYS[0], cache_salt="a") == 0
        assert cached_of(address, other, KEYS[1], cache_salt="b") == 0


@pytest.mark.parametrize("path", PATHS)
def test_requests_with_different_salts_share_nothing(address, path):
    prompt = new_prompt() if path == PATHS[0] else new_messages()
    salts = [{}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "ä" * 1000}]
    assert [cached_of(address, prompt, path=path, **salt) for salt in salts] == [0] * 4
    (found,) = {cached_of(address, prompt, path=path, **salt) for salt in salts}
    assert found > 0
    assert cached_of(address, prompt, path=path, cache_salt=None) == found


def test_a_salt_does_not_open_another_client_s_cache(guarded):
    prompt, (one, two) = new_prompt(), KEYS
    salt = {"cache_salt": "the same"}
    assert [cached_of(guarded, prompt, key, **salt) for key in (one, two, one)] == [0, 0, whole_blocks(NUM_TOKENS)]


def test_the_salt_of_a_large_body_counts(address):
    """Another process takes it."""
    prompt = new_prompt()

    def ask(salt):
        body = json.dumps({"prompt": prompt, "max_tokens": 1, "cache_salt": salt}) + " " * (1 << 17)
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(address + PATHS[0], content=body, headers=headers, timeout=PATIENCE)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [ask(salt) for salt in ("a", "b", "a")] == [0, 0, whole_blocks(NUM_TOKENS)]
    assert cached_of(address, prompt, cache_salt="b") == whole_blocks(NUM_TOKENS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("salt", ["", "a" * 1001, 5, True, ["a"], {"a": 1}])
def test_what_is_no_salt_is_refused(address, path, salt):
    body = {"prompt": "a"} if path == PATHS[0] else {"messages": new_messages()}
    answer = httpx.post(address + path, json={**body, "cache_salt": salt}, timeout=PATIENCE)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


def test_a_namespace_is_the_same_after_a_restart_and_does_not_tell_the_key(caching, guarded):
    names = [namespace_of(key) for key in KEYS]
    assert names == ["d0fbacbf425203a123ba87e8bb65514c", "58712c99ac3421ca15d9c989abfd90f7"]
    for key in KEYS:
        cached_of(guarded, new_prompt(), key)
    caching.pool.flush()
    shown = httpx.get(f"{guarded}/status.json", timeout=PATIENCE)
    assert set(names) <= {one["namespace"] for one in shown.json()["pool"]["namespaces"]}
    metrics = httpx.get(f"{guarded}/metrics", timeout=PATIENCE).text
    assert not [key for key in KEYS if key in shown.text or key in metrics]


# -- forgetting -------------------------------------------------------------------------------------------------------


def test_what_was_cached_can_be_forgotten(caching, address, guarded):
    prompt = new_prompt()
    for _ in range(2):
        assert cached_of(address, prompt) == 0
        assert cached_of(guarded, prompt, KEYS[0]) == 0
        assert cached_of(address, prompt) > 0
        caching.pool.flush()
        answer = httpx.post(f"{address}/reset_prefix_cache", timeout=PATIENCE)
        assert (answer.status_code, answer.content) == (200, b"")
        assert sum(one.num_keys for one in caching.pool.stats().nodes) == 0


def test_it_takes_a_key_to_forget(guarded, address):
    """The pages of this server are open."""
    where, prompt = f"{guarded}/reset_prefix_cache", new_prompt()
    cached_of(guarded, prompt, KEYS[0])
    for headers in ({}, {"Authorization": "Bearer another"}):
        assert httpx.post(where, headers=headers, timeout=PATIENCE).status_code == 401
    assert httpx.get(f"{address}/reset_prefix_cache", timeout=PATIENCE).status_code == 405
    assert cached_of(guarded, prompt, KEYS[0]) > 0
    assert httpx.post(where, headers={"Authorization": f"Bearer {KEYS[1]}"}, timeout=PATIENCE).status_code == 200
    assert cached_of(guarded, prompt, KEYS[0]) == 0
    assert "/reset_prefix_cache" in httpx.get(f"{address}/openapi.json", timeout=PATIENCE).json()["paths"]


def test_a_server_without_a_prefix_cache_has_nothing_to_forget(engine):
    prompt = new_prompt()
    with serving_app(engine) as server:
        address, _ = server
        assert httpx.post(f"{address}/reset_prefix_cache", timeout=PATIENCE).status_code == 200
        grown, found = growth(server, lambda _: [cached_of(address, prompt, cache_salt="a") for _ in range(2)])
        assert httpx.get(f"{address}/status.json", timeout=PATIENCE).json()["pool"] is None
    assert found == [0, 0]
    assert grown["prefix_cache_queries_total",] == grown["prompt_tokens_cached_total",] == 0
    assert not [key for key in grown if key[0].startswith("pool_")]


# -- counts -----------------------------------------------------------------------------------------------------------


def test_metrics_agree_with_usage(server, caching):
    known, tokens = new_prompt(), {"prompt": [new_prompt(), new_prompt()], "max_tokens": 3, "temperature": 0}
    cached_of(server[0], known)
    chat = {"messages": new_messages(), "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}

    def act(address):
        asked = [(PATHS[0], tokens), (PATHS[0], {"prompt": known, "max_tokens": 0, "echo": True}), (PATHS[1], chat)]
        return [usage_of(address, *one) for _ in range(2) for one in asked]

    grown, usages = growth(server, act)
    cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usages)
    assert cached >= 2 * whole_blocks(NUM_TOKENS)
    assert grown["prompt_tokens_cached_total",] == cached
    assert grown["prompt_tokens_total",] == sum(one["prompt_tokens"] for one in usages)
    hits, external = grown["prefix_cache_hits_total",], grown["external_prefix_cache_hits_total",]
    assert hits + external == cached
    assert grown["prefix_cache_queries_total",] >= cached
    assert external <= grown["external_prefix_cache_queries_total",] <= grown["prefix_cache_queries_total",] - hits
    wait_until_idle(caching)
    now = httpx.get(f"{server[0]}/status.json", timeout=PATIENCE).json()
    assert now["cache"] == dataclasses.asdict(caching.stats().cache)
    assert {one["name"] for one in now["pool"]["nodes"]} == {key[1] for key in grown if key[0] == "pool_node_up"}


def test_the_status_page_shows_the_cache_and_its_nodes(browser, address, caching, monkeypatch):
    monkeypatch.setattr(history, "PERIOD_S", 0.1)
    prompt = new_prompt()
    for _ in range(3):
        cached_of(address, prompt)
    caching.pool.flush()
    wait_until_idle(caching)
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(address)
    page.get_by_role("status").filter(has_text="renewed every second").wait_for()
    stats, pool = caching.stats().cache, caching.pool.stats()
    share = float(page.locator("#figure-prompt-tokens-cached").inner_text().replace(" %", ""))
    assert share == pytest.approx(100 * stats.hit_rate, abs=0.06)
    assert share > 0
    rows = page.locator("#nodes tr")
    assert rows.locator("th").all_inner_texts() == [one.name for one in pool.nodes]
    assert rows.locator("td:nth-child(2)").all_inner_texts() == [f"{one.kind}, up" for one in pool.nodes]
    assert rows.locator("td:nth-child(3)").all_inner_texts() == [f"{one.num_keys:,}" for one in pool.nodes]
    assert rows.locator("td:nth-child(8)").all_inner_texts() == [f"{one.counters.num_misses:,}" for one in pool.nodes]
    assert all(
        re.fullmatch(r"[\d.]+ [kM]?B of 100 MB", text) for text in rows.locator("td:nth-child(4)").all_inner_texts()
    )
    named = {one.namespace or "(common)" for one in pool.namespaces}
    assert set(page.locator("#namespaces th").all_inner_texts()) == named
    assert page.locator("#charts figure", has_text="prompt tokens cached").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.close()

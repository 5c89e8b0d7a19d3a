"""HTTP around the API: keys, scripts of other origins, HEAD, pages, and what is said of bodies that are none."""

import json
import re

import httpx
import openai
import pytest

from cmjax.checkpoint import Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.errors import UserError
from cmjax.serve.http import ServerSettings, known_keys
from tests.http.serving import PATIENCE, served

TOKENIZER = Tokenizer.from_folder(BUNDLED_MODEL)
KEY = {"Authorization": "Bearer one"}


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=PATIENCE) as http:
        yield http


@pytest.fixture(scope="module")
def guarded(engine):
    with served(engine, api_keys=("one",)) as address, httpx.Client(base_url=address, timeout=PATIENCE) as http:
        yield http


def test_a_model_is_found_by_its_name(http, address, engine):
    listed = http.get("/v1/models").json()["data"][0]
    assert http.get("/v1/models/demo").json() == listed
    assert http.get("/v1/models").json()["data"][0]["created"] == listed["created"]
    missing = http.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        assert client.models.retrieve("demo").id == "demo"
    with served(engine, model_name="org/model") as other:
        assert httpx.get(f"{other}/v1/models/org/model", timeout=PATIENCE).json()["id"] == "org/model"


def test_everything_asks_for_a_key_but_health_and_metrics(guarded, engine):
    for path in ("/health", "/ping", "/metrics"):
        assert guarded.get(path).status_code == 200
    status = ("/", "/status.json", "/status/history.json", "/status/experts.json")
    rest = (*status, "/docs", "/openapi.json", "/version", "/tokenizer_info")
    for path in (*rest, "/v1/models", "/v1/models/demo", "/nothing"):
        assert guarded.get(path).status_code == 401, path
        assert guarded.get(path, headers=KEY).status_code == (404 if path == "/nothing" else 200), path
    with served(engine, api_keys=("one",), open_pages=True) as address:
        for path in rest:
            assert httpx.get(address + path, timeout=PATIENCE).status_code == 200
        for path in ("/v1/models", "/v1/models/demo"):
            assert httpx.get(address + path, timeout=PATIENCE).status_code == 401
        assert httpx.post(address + "/tokenize", json={"prompt": "a"}, timeout=PATIENCE).status_code == 401


def test_keys_come_from_options_a_file_or_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("first\n\n  second \n")

    def keys(environment, **settings):
        return known_keys(ServerSettings(model_name="m", **settings), environment)

    assert keys({}) == ()
    assert keys({"VLLM_API_KEY": "theirs"}) == ("theirs",)
    assert keys({"VLLM_API_KEY": "theirs", "CMJAX_API_KEY": "ours"}) == ("ours",)
    assert keys({"CMJAX_API_KEY": ""}) == ()
    assert keys({}, api_key_file=str(file)) == ("first", "second")
    assert keys({"CMJAX_API_KEY": "ours"}, api_key_file=str(file), api_keys=("one",)) == ("one", "first", "second")
    with pytest.raises(UserError, match="a key is empty"):
        keys({}, api_keys=("",))
    with pytest.raises(UserError, match=r"--api-key-file .*: No such file"):
        keys({}, api_key_file=str(tmp_path / "none"))
    file.write_text("\n")
    with pytest.raises(UserError, match="there is no key in it"):
        keys({}, api_key_file=str(file))


def test_scripts_of_other_origins_may_call_it(guarded, engine):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    preflight = {**asked, "Access-Control-Request-Headers": "authorization,content-type"}
    answer = guarded.options("/v1/chat/completions", headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    for headers, status in ((KEY, 200), ({}, 401)):
        answer = guarded.get("/v1/models", headers={"Origin": "https://a.example", **headers})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "*")
    for origins in (("https://a.example",), ('["https://a.example"]',)):
        only = {"allowed_origins": origins, "allowed_methods": ("GET",), "allow_credentials": True}
        with served(engine, **only) as address:
            answer = httpx.get(f"{address}/health", headers={"Origin": "https://a.example"}, timeout=PATIENCE)
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            assert answer.headers["access-control-allow-credentials"] == "true"
            other = httpx.get(f"{address}/health", headers={"Origin": "https://b.example"}, timeout=PATIENCE)
            assert "access-control-allow-origin" not in other.headers
            assert httpx.options(f"{address}/v1/models", headers=asked, timeout=PATIENCE).status_code == 400
    with pytest.raises(UserError, match="is no JSON list"), served(engine, allowed_origins=("[x",)):
        pass


def test_head_is_get_without_a_body(http):
    for path in ("/", "/health", "/metrics", "/v1/models", "/v1/models/demo", "/docs", "/openapi.json", "/version"):
        head, get = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers.get("content-type") == get.headers.get("content-type")
    assert http.head("/v1/completions").status_code == 405
    assert http.head("/nothing").status_code == 404


def test_the_documentation_needs_no_network(http):
    page = http.get("/docs")
    assert "text/html" in page.headers["content-type"]
    assert "http" not in page.text.replace(str(http.base_url), "")
    assert "<script" not in page.text
    for shown in ("/v1/completions", "repetition_penalty", "openapi.json", "min_tokens"):
        assert shown in page.text
    assert http.get("/redoc").status_code == 404


def test_a_remote_tokenizer_finds_what_it_needs(http):
    """What lm-eval's `RemoteTokenizer` reads."""
    found = http.get("/tokenizer_info").json()
    for name in ("bos_token", "eos_token"):
        assert found[name] == getattr(TOKENIZER, name)
        body = {"prompt": found[name], "add_special_tokens": False}
        assert http.post("/tokenize", json=body).json()["tokens"] == [getattr(TOKENIZER, f"{name}_id")]
    assert found["chat_template"] == TOKENIZER.chat_template
    assert "pad_token" in found


def test_tokenizing_a_conversation_is_what_a_chat_does(http):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    chat = http.post("/v1/chat/completions", json={**body, "max_tokens": 1, "return_token_ids": True}).json()
    assert tokens == chat["choices"][0]["prompt_token_ids"]


@pytest.mark.parametrize(
    ("content", "content_type", "message"),
    [
        (b'{"prompt": "a"', "application/json", "the body is not valid JSON: .* \\(character 14\\)"),
        (b'{"prompt": \xff"a"}', "application/json", "UTF-8"),
        (b'{"prompt": "a"}', "application/x-www-form-urlencoded", "Content-Type: application/json; it came as"),
        (b'{"prompt": "a"}', None, "Content-Type: application/json; it came without"),
        (b"", "application/json", "there is no body"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b'{"prompt": "a\\ud800"}', "application/json", "half of a surrogate pair, \\\\ud800"),
        (b'{"prompt": "a", "user": {"x": ["\\uDC00"]}}', "application/json", "half of a surrogate pair"),
        (b'{"prompt": "a\xed\xa0\x80"}', "application/json", "not JSON in UTF-8: invalid continuation byte at byte 13"),
        ('{"prompt": "a\\ud800"}'.encode("utf-16-le"), "application/json", "half of a surrogate pair"),
        (b'{"prompt": "a", "\\ud800": 1}', "application/json", "half of a surrogate pair"),
    ],
)
def test_a_body_that_is_no_request_is_told_so(http, content, content_type, message):
    headers = {} if content_type is None else {"Content-Type": content_type}
    for path in ("/v1/completions", "/tokenize"):
        answer = http.post(path, content=content, headers=headers)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] is None
        assert re.search(message, error["message"]), error


def test_surrogate_pairs_are_text(http):
    body = json.dumps({"prompt": "\U0001f600", "max_tokens": 1, "echo": True})
    assert "\\ud83d" in body
    answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["choices"][0]["text"].startswith("\U0001f600")

"""Fields of requests: null is the default; what changes the answer is honoured or refused, wherever it stands."""

import json

import httpx
import numpy as np
import pytest

from cmjax.api.fields import IGNORED, REFUSED
from cmjax.api.protocol import ChatRequest, CompletionRequest
from cmjax.checkpoint import GenerationConfig, Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.errors import UserError
from cmjax.serve import decode, prefill
from cmjax.serve.http.stops import StopStrings
from tests.http.serving import PATIENCE, served

TOKENIZER = Tokenizer.from_folder(BUNDLED_MODEL)
TEXT = "def mean(values):\n"
GREEDY = {"prompt": TEXT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
MESSAGES = [{"role": "user", "content": "def f(x):"}]


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=PATIENCE) as http:
        yield http


@pytest.fixture
def ask(http):
    def ask(path="/v1/completions", **body):
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    return ask


def refused(http, path="/v1/completions", **body):
    answer = http.post(path, json=body)
    assert answer.status_code == 400, (body, answer.text)
    return answer.json()["error"]


# -- null, unknown, ignored, refused -----------------------------------------------------------------------------------


def test_null_is_the_default(ask):
    plain = ask(**GREEDY)
    own = set(CompletionRequest.model_fields) - {"prompt"}
    given = {**dict.fromkeys(own), **GREEDY}
    assert ask(**given) == plain
    # One of OpenAI's own default, 16 tokens at temperature 1.
    assert len(ask(**{**GREEDY, "max_tokens": None, "ignore_eos": True})["token_ids"]) == 16
    chat = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0}
    every = {**dict.fromkeys(set(ChatRequest.model_fields) - {"messages"}), **chat}
    path = "/v1/chat/completions"
    assert ask(path, **every)["message"] == ask(path, **chat)["message"]


def test_what_changes_nothing_is_ignored_and_so_is_what_nobody_knows(ask):
    plain = ask(**GREEDY)
    assert ask(**GREEDY, **dict.fromkeys(IGNORED, "x"), nobody_knows=3) == plain
    neutral = {name: values[0] for name, values in REFUSED.items() if values}
    assert ask(**GREEDY, **neutral) == plain
    nothing = dict.fromkeys(REFUSED)
    assert ask(**GREEDY, **nothing) == plain


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_would_change_the_answer_is_refused_by_name(http, path):
    body = {"prompt": TEXT} if path == "/v1/completions" else {"messages": MESSAGES}
    asked = {"response_format": {"type": "json_object"}, "include_reasoning": False, "modalities": ["text", "audio"]}
    for name in REFUSED:
        error = refused(http, path, **body, **{name: asked.get(name, {"a": 3})})
        assert error["param"] == name
        assert error["message"] == f"{name}: not supported"
    assert refused(http, path, **body, use_beam_search=True)["param"] == "use_beam_search"
    assert refused(http, path, **body, n=2, best_of=3)["param"] == "best_of"


def test_it_is_refused_in_messages_and_template_arguments_too(http):
    path = "/v1/chat/completions"

    def param(content="a", **more):
        return refused(http, path, messages=[{"role": "user", "content": content}], **more)["param"]

    assert param([{"type": "image_url", "image_url": {"url": "x"}}]) == "messages"
    assert param([{"type": "text"}]) == "messages"
    for name in ("tools", "documents", "messages", "chat_template", "tokenize", "truncation"):
        assert param(chat_template_kwargs={name: 1}) == "chat_template_kwargs"
    assert param(echo=True) == "echo"
    assert param(tools=[{"type": "function"}]) == "tools"
    assert param(tools=[{"type": "function"}], tool_choice="auto") == "tools"
    assert param(tool_choice="required") == "tool_choice"


def test_a_template_sees_tools_that_may_not_be_called(engine):
    template = "{{ tools | tojson if tools else 'none' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    with served(engine, template=template) as address, httpx.Client(base_url=address, timeout=PATIENCE) as http:
        for given, shown in ((tools, json.dumps(tools)), ([], "none"), (None, "none")):
            body = {"messages": MESSAGES, "tools": given, "max_tokens": 1, "return_token_ids": True}
            answer = http.post("/v1/chat/completions", json={**body, "tool_choice": "none"})
            wanted = TOKENIZER.encode_with_ends(shown + MESSAGES[0]["content"])[0]
            assert answer.json()["choices"][0]["prompt_token_ids"] == wanted
            assert http.post("/tokenize", json={"messages": MESSAGES, "tools": given}).json()["tokens"] == wanted


# -- fields that are honoured ------------------------------------------------------------------------------------------


def test_min_tokens_puts_off_every_end(http, ask):
    eos = {str(TOKENIZER.eos_token_id): 100}
    assert ask(**GREEDY, logit_bias=eos)["token_ids"] == [TOKENIZER.eos_token_id]
    later = ask(**GREEDY, logit_bias=eos, min_tokens=5)
    assert TOKENIZER.eos_token_id not in later["token_ids"][:5]
    assert later["token_ids"][5:] == [TOKENIZER.eos_token_id]
    assert later["finish_reason"] == "stop"
    free = ask(**GREEDY, ignore_eos=True)["token_ids"]
    own = ask(**GREEDY, stop_token_ids=free[:1], min_tokens=2)
    assert free[0] not in own["token_ids"][:2]
    text = ask(**GREEDY)["text"]
    assert ask(**GREEDY, stop=text[:2], min_tokens=12)["text"] == text
    assert refused(http, **GREEDY, min_tokens=13)["param"] == "min_tokens"


def test_repetition_penalty_counts_prompt_and_output(ask, engine):
    """By the log probabilities of an unpenalized step: the best token of the penalized logits, step by step."""
    penalty, ids = 3.0, TOKENIZER.encode("import os\n" * 6)
    found = ask(**{**GREEDY, "prompt": ids, "max_tokens": 8, "ignore_eos": True}, repetition_penalty=penalty)[
        "token_ids"
    ]
    every = np.asarray(engine.model.logits(np.array([ids + found])))[0].astype(np.float64)
    for place, token in enumerate(found):
        logits = every[len(ids) - 1 + place].copy()
        seen = sorted({*ids, *found[:place]})
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        assert logits[token] >= logits.max() - 1e-3
    assert found != ask(**{**GREEDY, "prompt": ids, "max_tokens": 8, "ignore_eos": True})["token_ids"]


def test_bad_words_never_come(http, ask):
    free = ask(**GREEDY, ignore_eos=True)
    pair = TOKENIZER.decode(free["token_ids"][3:5])
    assert pair in free["text"]
    without = ask(**GREEDY, ignore_eos=True, bad_words=[pair, "  "])
    assert free["token_ids"][3:5] not in [without["token_ids"][i : i + 2] for i in range(11)]
    assert without["token_ids"] != free["token_ids"]
    first = TOKENIZER.decode(free["token_ids"][:1])
    assert ask(**GREEDY, ignore_eos=True, bad_words=[first])["token_ids"][0] != free["token_ids"][0]
    assert refused(http, **GREEDY, bad_words=[""])["param"] == "bad_words"
    assert refused(http, **GREEDY, bad_words=["abcdefghij " * 100])["param"] == "bad_words"


def test_only_allowed_tokens_come(http, ask):
    allowed = TOKENIZER.encode_with_ends("yes no")[0]
    for temperature in (0, 1.5):
        body = {**GREEDY, "temperature": temperature, "ignore_eos": True}
        assert set(ask(**body, allowed_token_ids=allowed)["token_ids"]) <= set(allowed)
    vocabulary = list(range(TOKENIZER.vocab_size))
    assert ask(**GREEDY, allowed_token_ids=vocabulary)["token_ids"] == ask(**GREEDY)["token_ids"]
    assert refused(http, **GREEDY, allowed_token_ids=[])["param"] == "allowed_token_ids"
    assert "outside the vocabulary" in refused(http, **GREEDY, allowed_token_ids=[2**30])["message"]
    texts = ((token, TOKENIZER.decode([token])) for token in range(500, TOKENIZER.vocab_size))
    one, word = next(
        pair for pair in texts if TOKENIZER.encode_with_ends(pair[1])[0] == [pair[0]] and pair[1].isalpha()
    )
    answer = http.post("/v1/completions", json={**GREEDY, "allowed_token_ids": [one], "bad_words": [word]})
    assert answer.status_code == 500
    assert "leave no token" in answer.json()["error"]["message"]
    assert "request " not in answer.json()["error"]["message"]


def test_no_such_request_makes_a_server_compile(ask):
    before = decode._cache_size(), prefill._cache_size()
    ask(**GREEDY, min_tokens=2, repetition_penalty=1.2, bad_words=["return x"], allowed_token_ids=list(range(99)))
    assert (decode._cache_size(), prefill._cache_size()) == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_may_be_part_of_the_text(http, ask, stream):
    text = ask(**GREEDY, ignore_eos=True)["text"]
    stop = text[3:6]
    end = text.index(stop) + len(stop)
    body = {**GREEDY, "ignore_eos": True, "stop": [stop], "include_stop_str_in_output": True, "stream": stream}
    answer = http.post("/v1/completions", json=body)
    if stream:
        events = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
        found = "".join(httpx.Response(200, content=one).json()["choices"][0]["text"] for one in events)
    else:
        found = answer.json()["choices"][0]["text"]
        assert answer.json()["choices"][0]["stop_reason"] == stop
    assert found == text[:end]


def test_a_stop_token_may_be_part_of_the_text(ask):
    free = ask(**GREEDY, ignore_eos=True)["token_ids"]
    end = free.index(free[4])
    body = {**GREEDY, "ignore_eos": True, "stop_token_ids": [free[4]]}
    assert ask(**body)["text"] == TOKENIZER.decode(free[:end])
    assert ask(**body, include_stop_str_in_output=True)["text"] == TOKENIZER.decode(free[: end + 1])


@pytest.mark.parametrize("pieces", [["ab", "c", "d"], ["a", "b", "c", "d"], ["abcd"]])
def test_a_stop_string_that_came_too_early_does_not_count(pieces):
    for num_early, wanted in ((0, ("a", "b")), (1, ("a", "b") if len(pieces) == 4 else None)):
        stops, text, found = StopStrings(["abx", "b"]), "", None
        for index, piece in enumerate(pieces):
            shown, found = stops.feed(piece, may_end=index >= num_early)
            text += shown
            if found is not None:
                break
        else:
            text += stops.flush()
        assert (text, found) == (wanted or ("abcd", None))


def test_prompts_are_cut_to_their_last_tokens(http, ask):
    ids = TOKENIZER.encode(TEXT)
    last = ask(**{**GREEDY, "prompt": ids[-3:]})
    for prompt in (TEXT, ids):
        assert ask(**{**GREEDY, "prompt": prompt}, truncate_prompt_tokens=3) == last
    echoed = ask(**GREEDY, truncate_prompt_tokens=3, echo=True, logprobs=0)
    assert echoed["text"] == TOKENIZER.decode(ids[-3:]) + last["text"]
    assert echoed["logprobs"]["text_offset"][0] == 0
    long = ask(**{**GREEDY, "prompt": [*range(5, 305), *ids]}, truncate_prompt_tokens=-1)
    assert len(long["prompt_token_ids"]) == 256 - 12
    assert long["prompt_token_ids"][-len(ids) :] == ids
    chat = {"messages": MESSAGES, "max_tokens": 3, "truncate_prompt_tokens": 2, "return_token_ids": True}
    assert len(ask("/v1/chat/completions", **chat)["prompt_token_ids"]) == 2
    for wrong in (0, 257, -2):
        assert refused(http, **GREEDY, truncate_prompt_tokens=wrong)["param"] == "truncate_prompt_tokens"


def test_a_prompt_of_the_maximum_length_can_be_scored(http, ask):
    ids = (TOKENIZER.encode(TEXT) * 50)[:256]
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    found = ask(**body)["logprobs"]["token_logprobs"]
    shorter = ask(**{**body, "prompt": ids[:255]})["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert found[1:255] == pytest.approx(shorter[1:], abs=1e-4)
    assert len(found) == 256
    assert ask(prompt=ids, max_tokens=0, echo=True)["text"] == TOKENIZER.decode(ids, skip_special_tokens=False)
    assert refused(http, **{**body, "prompt": ids * 2})["code"] == "context_length_exceeded"
    assert refused(http, prompt=ids, max_tokens=1)["code"] == "context_length_exceeded"


def test_errors_name_no_internals(http):
    for body in ({"prompt": [2**30]}, {"prompt": "a", "stop_token_ids": [2**30]}, {"prompt": "a", "logprobs": 21}):
        assert "request " not in refused(http, **body)["message"]


# -- what the model's folder says of them ------------------------------------------------------------------------------


def test_generation_config_holds_where_a_request_says_nothing(engine, ask):
    free = ask(**GREEDY, ignore_eos=True)["token_ids"]
    end = free.index(free[4])
    generation = GenerationConfig((free[4], 0), {"temperature": 0.0, "repetition_penalty": 1.7, "max_tokens": 5})
    with served(engine, generation) as address, httpx.Client(base_url=address, timeout=PATIENCE) as http:

        def ids(path="/v1/completions", **body):
            return http.post(path, json={"return_token_ids": True, **body}).json()["choices"][0]["token_ids"]

        assert ids(**GREEDY, repetition_penalty=1) == free[: end + 1]
        penalized = ask(**GREEDY, repetition_penalty=1.7, ignore_eos=True)["token_ids"]
        assert ids(prompt=TEXT, max_tokens=12, ignore_eos=True) == penalized
        assert len(ids(prompt=TEXT, ignore_eos=True)) == 5
        assert len(ids("/v1/chat/completions", messages=MESSAGES, ignore_eos=True)) == 5
        assert len(ids("/v1/chat/completions", messages=MESSAGES, ignore_eos=True, max_tokens=7)) == 7


def test_a_generation_config_that_cannot_be_had_is_found_at_the_start(engine):
    for generation, message in (
        (GenerationConfig((2**30,)), "eos_token_id 1073741824 is outside the vocabulary"),
        (GenerationConfig(None, {"top_p": 3.0}), "generation_config.json: top_p 3.0 is out of range"),
    ):
        with pytest.raises(UserError, match=message), served(engine, generation):
            pass

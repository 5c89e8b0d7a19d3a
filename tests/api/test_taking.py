"""Bodies become requests: the same in the event loop, in a thread and in a process of its own, which may die."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.api import ApiError, Asked, ChatTemplate, Intake, IntakeError, Served, gathered, json_pieces, take
from cmjax.api.intake import INLINE_BYTES, THREAD_BYTES
from cmjax.api.worker import parts_of, whole
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.text import Tokenizer
from tests.http.serving import PATIENCE

TOKENIZER = Tokenizer.from_folder(BUNDLED_MODEL)
SERVED = Served(
    model_name="demo",
    vocab_size=TOKENIZER.vocab_size,
    max_model_len=256,
    max_requests=1000,
    default_max_tokens=64,
    defaults={"temperature": 1.0},
    eos_ids=(TOKENIZER.eos_token_id,),
    tokenizer=TOKENIZER,
    template=ChatTemplate.find(BUNDLED_MODEL, TOKENIZER),
)
JSON = "application/json"
CHAT = {"messages": [{"role": "user", "content": "def f(x):"}]}
BODIES = [
    ("completion", {"prompt": "import os\n", "max_tokens": 5, "temperature": 0.5, "seed": 1, "stop": ["a", "b"]}),
    ("completion", {"prompt": [[5, 6], [7]], "n": 2, "seed": 3, "echo": True, "logprobs": 2}),
    ("completion", {"prompt": ["a", "bé"], "echo": True, "seed": 3, "allowed_token_ids": [5, 6], "bad_words": ["x"]}),
    ("completion", {"prompt": [[5]] * 600, "seed": 3}),
    ("chat", {**CHAT, "seed": 1, "logit_bias": {"5": 1.5}}),
    ("tokenize", {"prompt": "import os\n", "return_token_strs": True}),
    ("detokenize", {"tokens": [5, 6, 7]}),
]
WRONG = [
    ("completion", {"prompt": "a", "model": "other"}),
    ("completion", {"prompt": "import os\n" * 5000}),
    ("completion", {"prompt": [5] * 257}),
    ("completion", {"prompt": [5, "a"]}),
    ("chat", {"messages": []}),
    ("chat", {"messages": [{"role": "user", "content": "a" * 30_000}]}),
    ("detokenize", {"tokens": [2**30]}),
]


def padded(body, size):
    """As JSON of so many bytes and a few."""
    raw = json.dumps(body).encode()
    return raw if len(raw) >= size else json.dumps({**body, "user": "x" * (size - len(raw))}).encode()


def cut(raw):
    return [raw[begin : begin + 50_000] for begin in range(0, len(raw), 50_000)]


def plain(taken):
    if not isinstance(taken, Asked):
        return json.loads(b"".join(taken))
    prompts = [(list(one.token_ids), one.text, list(one.starts)) for one in taken.prompts]
    return taken.body.model_dump(exclude={"user"}), prompts, taken.samplings


@contextlib.asynccontextmanager
async def intake():
    opened = Intake(SERVED)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize("size", [0, INLINE_BYTES + 1, THREAD_BYTES + 1])
def test_a_body_is_the_same_wherever_it_is_taken(size):
    async def run():
        async with intake() as opened:
            for kind, body in BODIES:
                raw = padded(body, size)
                assert plain(await opened.take(kind, JSON, cut(raw))) == plain(take(SERVED, kind, JSON, raw)), body
            for kind, body in WRONG:
                raw = padded(body, size)
                with pytest.raises(ApiError) as direct:
                    take(SERVED, kind, JSON, raw)
                with pytest.raises(ApiError) as found:
                    await opened.take(kind, JSON, cut(raw))
                assert (found.value.status, found.value.body()) == (direct.value.status, direct.value.body())
            assert (opened.process is not None) == (size > THREAD_BYTES)

    asyncio.run(run())


def test_a_text_that_cannot_fit_is_not_tokenized(monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("tokenized a prompt"))
    monkeypatch.setattr(Tokenizer, "encode_with_ends", lambda *_: pytest.fail("tokenized a prompt"))
    text = "import os\n" * 5000
    for kind, body in (
        ("completion", {"prompt": text}),
        ("completion", {"prompt": ["a", text]}),
        ("completion", {"prompt": text, "echo": True, "max_tokens": 0}),
        ("chat", {"messages": [{"role": "user", "content": text}]}),
    ):
        with pytest.raises(
            ApiError, match=r"is too long: at least 122[0-9] tokens.* the maximum context length of 256"
        ):
            take(SERVED, kind, JSON, json.dumps(body).encode())


def test_a_chat_that_does_not_say_has_a_bound():
    def wanted(served=SERVED, **body):
        return take(served, "chat", JSON, json.dumps({**CHAT, **body}).encode()).samplings[0].max_tokens

    num_prompt = len(take(SERVED, "chat", JSON, json.dumps(CHAT).encode()).prompts[0].token_ids)
    assert wanted() == 64
    assert wanted(max_tokens=100) == wanted(max_completion_tokens=100) == 100
    assert wanted(min_tokens=70) == 70
    assert wanted(dataclasses.replace(SERVED, default_max_tokens=1000)) == 256 - num_prompt
    own = dataclasses.replace(SERVED, defaults={"temperature": 1.0, "max_tokens": 90})
    assert (wanted(own), wanted(own, max_tokens=100)) == (90, 100)


def test_a_process_that_dies_costs_one_answer():
    async def run():
        async with intake() as opened:
            raw = padded(BODIES[0][1], THREAD_BYTES + 1)
            await opened.take("completion", JSON, cut(raw))
            first = opened.process
            os.kill(first.pid, signal.SIGSTOP)  # so that it dies with the body
            failing = asyncio.ensure_future(opened.take("completion", JSON, cut(raw)))
            waiting = asyncio.ensure_future(opened.take("completion", JSON, cut(raw)))
            await asyncio.sleep(0)
            first.kill()
            with pytest.raises(IntakeError, match=r"ended \(status -9\)"):
                await asyncio.wait_for(failing, PATIENCE)
            assert plain(await asyncio.wait_for(waiting, PATIENCE)) == plain(take(SERVED, "completion", JSON, raw))
            assert opened.process.pid != first.pid

    asyncio.run(run())


def test_who_does_not_wait_any_more_does_not_get_another_s_answer():
    async def run():
        async with intake() as opened:
            raws = [padded({"prompt": text}, THREAD_BYTES + 1) for text in ("a", "b")]
            await opened.take("completion", JSON, cut(raws[0]))
            os.kill(opened.process.pid, signal.SIGSTOP)  # so that the first is under way when it is cancelled
            gone = asyncio.ensure_future(opened.take("completion", JSON, cut(raws[0])))
            await asyncio.sleep(0)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            found = await asyncio.wait_for(opened.take("completion", JSON, cut(raws[1])), PATIENCE)
            assert list(found.prompts[0].token_ids) == TOKENIZER.encode("b")

    asyncio.run(run())


def test_parts_are_put_together_again():
    for number in (1, 256, 257, 600):
        asked = take(SERVED, "completion", JSON, json.dumps({"prompt": [[5]] * number}).encode())
        assert plain(whole(list(parts_of(asked)))) == plain(asked)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.integers(1, 100))
def test_json_in_pieces_is_json(value, least):
    pieces = list(gathered(json_pieces(value), least))
    assert json.loads(b"".join(pieces)) == value
    assert all(len(piece) >= least for piece in pieces[:-1])


def test_long_json_comes_in_many_pieces():
    for value in ([1] * 100_000, {"a": [{"b": [0.5] * 100_000}]}, {"a": 'é"\\' * 2_000_000}):
        pieces = list(json_pieces(value))
        assert len(pieces) > 5
        assert json.loads(b"".join(pieces)) == value


def test_the_process_does_without_jax():
    code = "import cmjax.api.worker, sys; sys.exit(any(name in sys.modules for name in ('jax', 'fastapi')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)

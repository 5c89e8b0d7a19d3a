"""`cmjax serve` as a process: its options, its configuration file, and the way it ends."""

import itertools
import json
import signal
import threading
from types import SimpleNamespace

import httpx
import pytest

from cmjax.cli import main
from cmjax.errors import UserError
from cmjax.serve.caching import CacheSettings
from tests.http.serving import PATIENCE, serving_process
from tests.parity import FOLDER


@pytest.fixture(scope="module")
def server():
    """A small model without a tokenizer, behind a real process; `(process, address)`."""
    options = {
        "--model": FOLDER / "v3-small",
        "--ep": 2,
        "--max-num-seqs": 1,
        "--max-model-len": 64,
        "--max-num-batched-tokens": 64,
        "--cache-block-size": 16,
    }
    with serving_process(*itertools.chain(*options.items())) as process_and_address:
        yield process_and_address


def test_prompts_are_cached_by_default(server):
    body = {"prompt": list(range(3, 43)), "max_tokens": 1}
    usages = [httpx.post(f"{server[1]}/v1/completions", json=body, timeout=PATIENCE).json()["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 32]


def test_sigterm_finishes_what_runs(server):
    process, address = server
    body = {"prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    whole = httpx.post(f"{address}/v1/completions", json={**body, "return_token_ids": True}, timeout=PATIENCE).json()
    assert len(whole["choices"][0]["token_ids"]) == 60
    assert httpx.post(f"{address}/v1/completions", json={"prompt": "text"}, timeout=PATIENCE).status_code == 400
    streams = []

    def read():
        with httpx.stream(
            "POST",
            f"{address}/v1/completions",
            json={**body, "stream": True, "return_token_ids": True},
            timeout=PATIENCE,
        ) as answer:
            for line in answer.iter_lines():
                streams.append(line)
                started.set()

    started = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    started.wait(PATIENCE)
    process.send_signal(signal.SIGTERM)
    reader.join(PATIENCE)
    events = [json.loads(line.removeprefix("data: ")) for line in streams if line.startswith("data: {")]
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == whole["choices"][0]["token_ids"]
    assert "data: [DONE]" in streams
    assert process.wait(PATIENCE) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health", timeout=PATIENCE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ep: 8\nprot: 1\n", "there is no option 'prot'"),
        ("- 1\n", "must hold names of options and their values"),
        ("ep: [", "serve.yaml"),
        ("ep: eight\n", "'eight' is not a valid integer"),
        ("steps_per_call: 0\n", "0 is not in the range"),
    ],
)
def test_a_wrong_configuration_file_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "serve.yaml").write_text(text)
    assert main(["serve", "--config", str(tmp_path / "serve.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "settings", "shares"),
    [
        ([], {}, False),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}, False),
        (["--cache-dram-gb", "0.5", "--share-prefix-cache"], {"dram_bytes": 500_000_000, "share": True}, True),
        (["--cache-decode-blocks", "never"], {"decode_blocks": "never"}, False),
    ],
)
def test_the_flags_of_the_prefix_cache(monkeypatch, flags, settings, shares):
    """An engine that ends before it begins, and a server that does."""
    engine, asked, served = SimpleNamespace(shutdown=lambda timeout: None), [], []

    def start_engine(*_, cache, **__):
        asked.append(cache)
        return engine

    def create_app(_, server, *__):
        served.append(server)
        raise UserError("enough")

    monkeypatch.setattr("cmjax.cli.serve.start_engine", start_engine)
    monkeypatch.setattr("cmjax.serve.http.create_app", create_app)
    assert main(["serve", "--model", str(FOLDER / "v3-small"), "--port", "0", *flags]) == 2
    # The model does not think before it answers: what it generates is kept.
    assert asked == [CacheSettings(**{"decode_blocks": "always", **settings})]
    assert served[0].share_prefix_cache == shares


def test_the_command_line_comes_before_the_file(tmp_path, capsys):
    (tmp_path / "serve.yaml").write_text("model: nowhere\nmax-num-seqs: 2\napi-key: [a, b]\n")
    assert main(["serve", "--config", str(tmp_path / "serve.yaml")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["serve", "--config", str(tmp_path / "serve.yaml"), "--model", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err

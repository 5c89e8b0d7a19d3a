"""`cmjax serve` as a process: its options, its configuration file, and the way it ends."""

import itertools
import json
import signal
import threading

import httpx
import pytest

from cmjax.cli import main
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
    }
    with serving_process(*itertools.chain(*options.items())) as process_and_address:
        yield process_and_address


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


def test_the_command_line_comes_before_the_file(tmp_path, capsys):
    (tmp_path / "serve.yaml").write_text("model: nowhere\nmax-num-seqs: 2\napi-key: [a, b]\n")
    assert main(["serve", "--config", str(tmp_path / "serve.yaml")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["serve", "--config", str(tmp_path / "serve.yaml"), "--model", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err

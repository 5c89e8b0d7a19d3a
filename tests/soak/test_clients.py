"""Clients that others wrote, against `cmjax serve` as a process.

Each needs an environment of its own, for they install much: `pip install 'lm-eval[api]' transformers` (0.9 GB) and
`pip install aiperf` (0.9 GB). CMJAX_LM_EVAL and CMJAX_AIPERF name their commands, where they are not on PATH.
"""

import json
import os
import shutil
import subprocess

import httpx
import jax
import numpy as np
import pytest

import cmjax
from cmjax.checkpoint import Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from tests.http.serving import PATIENCE, serving_process

pytestmark = pytest.mark.soak
QUESTIONS = [
    {"question": "import os\nimport ", "choices": ["sys", "zzz"], "gold": 0},
    {"question": "def f(self):\n    return ", "choices": ["self", "else"], "gold": 0},
    {"question": "for i in ", "choices": ["range", "import"], "gold": 0},
]
TASK = """task: code
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def address():
    options = ("--model", BUNDLED_MODEL, "--ep", 8, "--max-num-seqs", 4, "--max-model-len", 256)
    with serving_process(*options) as (_, address):
        yield address


def client(name):
    """The command of a client."""
    variable = f"CMJAX_{name.upper()}"
    command = os.environ.get(variable) or shutil.which(name)
    if command is None:
        pytest.skip(f"needs {name} on PATH, or {variable}: see the top of this file")
    return command


def run(command, folder):
    """Run a client; what it says is shown where it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_lm_eval_gets_the_model_s_log_likelihoods(tmp_path, address):
    """It sends token ids with echo, one token to make, and asks for log probabilities."""
    lm_eval = client("lm_eval")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in QUESTIONS))
    (tmp_path / "code.yaml").write_text(TASK.replace("DATA", str(data)))
    arguments = f"model=demo,base_url={address}/v1/completions,num_concurrent=2,max_retries=1"
    arguments += f",tokenizer_backend=huggingface,tokenizer={BUNDLED_MODEL},tokenized_requests=True"
    command = [lm_eval, "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "code"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    run(command, tmp_path)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["code"]["acc,none"] >= 2 / 3
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(found) == len(QUESTIONS)
    model, tokenizer = cmjax.load(BUNDLED_MODEL), Tokenizer.from_folder(BUNDLED_MODEL)
    for sample in found:
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            expected = log_likelihood(model, tokenizer, sample["doc"]["question"], choice)
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-3)


def log_likelihood(model, tokenizer, question, choice):
    """Of the choice's tokens after the question, by the ids that lm-eval sends: without the token that begins a text,
    and with the spaces between question and choice counted to the choice."""
    before, whole = (
        tokenizer.backend.encode(text, add_special_tokens=False).ids for text in (question.rstrip(), question + choice)
    )
    assert 0 < len(before) < len(whole)
    logprobs = jax.nn.log_softmax(np.asarray(model.logits(np.array([whole])))[0], axis=-1)
    return sum(float(logprobs[i - 1, whole[i]]) for i in range(len(before), len(whole)))


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_aiperf_measures_streams_and_reads_the_metrics(tmp_path, address, kind):
    command = [client("aiperf"), "profile", "--model", "demo", "--url", address, "--endpoint-type", kind, "--streaming"]
    command += ["--tokenizer", BUNDLED_MODEL, "--use-server-token-count", "--extra-inputs", "ignore_eos:true"]
    command += ["--concurrency", 4, "--request-count", 12, "--isl", 40, "--osl", 16, "--random-seed", 1]
    before = httpx.get(f"{address}/status.json", timeout=PATIENCE).json()
    run([*map(str, command), "--ui", "none", "--artifact-dir", str(tmp_path / "out")], tmp_path)
    after = httpx.get(f"{address}/status.json", timeout=PATIENCE).json()
    report = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert report["error_summary"] == []
    assert report["request_count"]["avg"] == 12
    assert report["total_output_tokens"]["avg"] == 12 * 16
    assert after["num_generation_tokens"] - before["num_generation_tokens"] == 12 * 16
    for name in ("time_to_first_token", "inter_token_latency", "request_latency"):
        assert report[name]["avg"] > 0
    scraped = json.loads((tmp_path / "out" / "server_metrics_export.json").read_text())["metrics"]
    (latencies,) = scraped["vllm:e2e_request_latency_seconds"]["series"]
    assert latencies["stats"]["count"] == 12

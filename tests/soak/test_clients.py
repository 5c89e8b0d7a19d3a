"""Evaluations and load generators that others wrote, unmodified, against `cmjax serve` as a process.

Each needs an environment of its own, for they install much:

    pip install 'lm-eval[api]' transformers     # 0.9 GB
    pip install aiperf                          # 1.2 GB
    pip install guidellm                        # 6 GB
    pip install inference-perf                  # 0.8 GB

CMJAX_LM_EVAL, CMJAX_AIPERF, CMJAX_GUIDELLM and CMJAX_INFERENCE_PERF name their commands, where they are not on PATH.
"""

import contextlib
import json

import httpx
import jax
import numpy as np
import pytest

from cmjax.cli.options import BUNDLED_MODEL
from tests.http.serving import PATIENCE
from tests.soak.client_runs import MAX_MODEL_LEN, MAX_TOKENS, command_of, conversation, run

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]
QUESTIONS = [
    {"question": "import os\nimport ", "choices": ["sys", "zzz"], "gold": 0},
    {"question": "def f(self):\n    return ", "choices": ["self", "else"], "gold": 0},
    {"question": "for i in ", "choices": ["range", "import"], "gold": 0},
]
# Choose between continuations, continue up to the end of a line, and score whole texts.
TASKS = {
    "choose": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "write": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: TOKENS, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""".replace("TOKENS", str(MAX_TOKENS)),
    "score": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
""",
}
NUM_REQUESTS, CONCURRENCY, INPUT_LENGTH = 12, 4, 40
API_PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}


def evaluate(folder, kind, arguments, tasks, *more):
    """Run tasks of lm-eval: their results, and what the model answered to each question, by task."""
    lm_eval = command_of("lm_eval", "CMJAX_LM_EVAL")
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in QUESTIONS))
    for task in tasks:
        head = f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{task}.yaml").write_text(head + TASKS[task])
    arguments = ",".join(f"{name}={value}" for name, value in {"model": "demo", "max_retries": 1, **arguments}.items())
    command = [lm_eval, "run", "--model", kind, "--model_args", arguments, "--tasks", ",".join(tasks), *more]
    run([*command, "--include_path", folder, "--output_path", folder / "out", "--log_samples"], folder)
    (results,) = (folder / "out").rglob("results_*.json")
    answers = {}
    for task in tasks:
        (samples,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        assert [sample["doc"] for sample in lines] == QUESTIONS
        answers[task] = [sample["resps"] for sample in lines]
    assert [[""]] * len(QUESTIONS) != answers["write"]
    return json.loads(results.read_text())["results"], answers


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_lm_eval_gets_what_the_model_says(tmp_path, address, greedy, model, tokenizer, backend):
    """It sends token ids of its own tokenizer, or of the server's; with echo and log probabilities for scores."""
    arguments = {"base_url": f"{address}/v1/completions", "num_concurrent": 2, "max_length": MAX_MODEL_LEN}
    arguments |= {"tokenizer_backend": backend, "tokenized_requests": True}
    # With "remote" it takes a bos whose id is 0 for none.
    arguments["custom_prefix_token_id"] = tokenizer.bos_token_id
    if backend == "huggingface":
        arguments["tokenizer"] = BUNDLED_MODEL
    results, answers = evaluate(tmp_path, "local-completions", arguments, TASKS)
    assert results["choose"]["acc,none"] >= 2 / 3

    def ids(text):
        return tokenizer.backend.encode(text, add_special_tokens=False).ids

    for one, chosen, written, scored in zip(QUESTIONS, *answers.values(), strict=True):
        question = one["question"]
        for choice, response in zip(one["choices"], chosen, strict=True):
            # The spaces between question and choice count to the choice.
            expected = log_likelihood(model, ids(question.rstrip()), ids(question + choice))
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-3)
        assert written == [[greedy(question).text.split("\n")[0]]]
        bos = [tokenizer.bos_token_id]
        expected = log_likelihood(model, bos, bos + ids(question + one["choices"][0]))
        assert float(np.ravel(scored)[0]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_eval_without_a_tokenizer_sends_texts_and_messages(tmp_path, address, greedy, kind):
    is_chat = kind == "local-chat-completions"
    arguments = {"base_url": address + API_PATHS["chat" if is_chat else "completion"], "tokenizer_backend": "none"}
    _, answers = evaluate(tmp_path, kind, arguments, ["write"], *["--apply_chat_template"] * is_chat)
    for one, written in zip(QUESTIONS, answers["write"], strict=True):
        question = one["question"]
        prompt = conversation([{"role": "user", "content": question}]) if is_chat else "<|begin|>" + question
        assert written == [[greedy(prompt).text.split("\n")[0]]]


def log_likelihood(model, before, whole):
    """Of the token ids that come after those before."""
    assert 0 < len(before) < len(whole)
    logprobs = jax.nn.log_softmax(np.asarray(model.logits(np.array([whole])))[0], axis=-1)
    return sum(float(logprobs[i - 1, whole[i]]) for i in range(len(before), len(whole)))


@contextlib.contextmanager
def generated(address, num_tokens):
    """What happens within has the server generate so many tokens, by its own count."""

    def counted():
        return httpx.get(f"{address}/status.json", timeout=PATIENCE).json()["num_generation_tokens"]

    before = counted()
    yield
    assert counted() - before == num_tokens


@pytest.mark.parametrize(
    ("kind", "extra", "num_tokens"),
    [
        ("completions", {"ignore_eos": True}, MAX_TOKENS),
        ("chat", {"ignore_eos": True}, MAX_TOKENS),
        # The bias would end every text at once, and does so when it may.
        ("completions", {"min_tokens": 8, "logit_bias": {"EOS": 100}}, 9),
        ("chat", {"min_tokens": MAX_TOKENS, "logit_bias": {"EOS": 100}}, MAX_TOKENS),
    ],
)
def test_aiperf_measures_streams_and_reads_the_metrics(tmp_path, address, tokenizer, kind, extra, num_tokens):
    aiperf, extra = command_of("aiperf", "CMJAX_AIPERF"), json.dumps(extra).replace("EOS", str(tokenizer.eos_token_id))
    command = [aiperf, "profile", "--model", "demo", "--url", address, "--endpoint-type", kind, "--streaming"]
    command += ["--tokenizer", BUNDLED_MODEL, "--use-server-token-count", "--extra-inputs", extra, "--random-seed", 1]
    command += ["--concurrency", CONCURRENCY, "--request-count", NUM_REQUESTS]
    command += ["--isl", INPUT_LENGTH, "--osl", MAX_TOKENS, "--ui", "none", "--artifact-dir", tmp_path / "out"]
    with generated(address, NUM_REQUESTS * num_tokens):
        run(command, tmp_path)
    report = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert report["error_summary"] == []
    assert report["request_count"]["avg"] == NUM_REQUESTS
    assert report["total_output_tokens"]["avg"] == NUM_REQUESTS * num_tokens
    for name in ("time_to_first_token", "inter_token_latency", "request_latency"):
        assert report[name]["avg"] > 0
    scraped = json.loads((tmp_path / "out" / "server_metrics_export.json").read_text())["metrics"]
    (latencies,) = scraped["vllm:e2e_request_latency_seconds"]["series"]
    assert latencies["stats"]["count"] == NUM_REQUESTS


@pytest.mark.parametrize("kind", API_PATHS)
def test_guidellm_gets_whole_answers_in_streams(tmp_path, address, kind):
    """Greedily, so that each of its streams is what the server answers at once."""
    backend = {"kind": "openai_http", "target": address, "request_format": API_PATHS[kind]}
    backend["extras"] = {"body": {"temperature": 0}}
    command = [command_of("guidellm", "CMJAX_GUIDELLM"), "run", "--backend", json.dumps(backend)]
    command += ["--profile", f"kind=concurrent,streams={CONCURRENCY}"]
    command += ["--constraint", f"kind=max_requests,count={NUM_REQUESTS}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={BUNDLED_MODEL}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={INPUT_LENGTH},output_tokens={MAX_TOKENS}"]
    command += ["--output", f"kind=json,path={tmp_path / 'out.json'}", "--disable-console"]
    with generated(address, NUM_REQUESTS * MAX_TOKENS):
        run(command, tmp_path)
    (benchmark,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {
        "successful": NUM_REQUESTS, "errored": 0, "incomplete": 0, "total": NUM_REQUESTS
    }  # fmt: skip
    for request in benchmark["requests"]["successful"]:
        body = json.loads(request["request_args"])["body"]
        assert (body.pop("stream"), body.pop("stream_options")["include_usage"]) == (True, True)
        answer = httpx.post(address + API_PATHS[kind], json=body, timeout=PATIENCE).json()
        (choice,) = answer["choices"]
        assert request["output"] == (choice["message"]["content"] if kind == "chat" else choice["text"])
        assert request["output_metrics"]["text_tokens"] == answer["usage"]["completion_tokens"] == MAX_TOKENS
        assert request["input_metrics"]["text_tokens"] == answer["usage"]["prompt_tokens"]
        assert request["info"]["timings"]["token_iterations"] > 1


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize(("kind", "num_tokens"), [("completion", MAX_TOKENS), ("chat", 30)])
def test_inference_perf_counts_what_the_server_counts(tmp_path, address, tokenizer, kind, num_tokens, is_streaming):
    """Random texts, and conversations of a file, for which it always asks for 30 tokens."""
    about = {"mean": INPUT_LENGTH, "min": INPUT_LENGTH - 5, "max": INPUT_LENGTH + 5, "std_dev": 3}
    exactly = {"mean": num_tokens, "min": num_tokens, "max": num_tokens, "std_dev": 0}
    lengths = {"input_distribution": about, "output_distribution": exactly}
    random = {"type": "random"} | {name: {**one, "total_count": NUM_REQUESTS} for name, one in lengths.items()}
    turns = [[("human", one["question"]), ("gpt", one["choices"][0]), ("human", "and é?")] for one in QUESTIONS]
    spoken = [{"conversations": [{"from": who, "value": what} for who, what in one]} for one in turns]
    (tmp_path / "conversations.json").write_text(json.dumps(spoken))
    config = {
        "api": {"type": kind, "streaming": is_streaming},
        "data": random if kind == "completion" else {"type": "shareGPT", "path": str(tmp_path / "conversations.json")},
        "load": {
            "type": "concurrent",
            "num_workers": 1,
            "stages": [{"num_requests": NUM_REQUESTS, "concurrency_level": CONCURRENCY}],
        },
        "server": {"type": "vllm", "model_name": "demo", "base_url": address, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(BUNDLED_MODEL)},
        "report": {"request_lifecycle": {"per_request": True, "use_server_output_tokens": True}},
        "storage": {"local_storage": {"path": str(tmp_path / "out")}},
    }
    (tmp_path / "config.yml").write_text(json.dumps(config))
    with generated(address, NUM_REQUESTS * num_tokens):
        run([command_of("inference-perf", "CMJAX_INFERENCE_PERF"), "-c", tmp_path / "config.yml"], tmp_path)
    summary, requests = (
        json.loads((tmp_path / "out" / f"{name}_lifecycle_metrics.json").read_text())
        for name in ("summary", "per_request")
    )
    assert summary["failures"]["count"] == 0
    assert summary["successes"]["count"] == len(requests) == NUM_REQUESTS
    for one in requests:
        asked, response = json.loads(one["request"]), one["info"]["response_metrics"]
        prompt = conversation(asked["messages"]) if kind == "chat" else "<|begin|>" + asked["prompt"]
        ids = tokenizer.backend.encode(prompt, add_special_tokens=False).ids
        usage = response["server_usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), num_tokens)
        if is_streaming:
            assert len(response["response_chunks"]) > 1

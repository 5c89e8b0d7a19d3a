"""Evaluation by `lm-eval`, which sends token ids with echo and asks for log probabilities, against a real server.

Needs `pip install 'lm-eval[api]' transformers`, in an environment of its own: CMJAX_LM_EVAL names its `lm_eval`.
"""

import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest

import cmjax
from cmjax.cli_options import BUNDLED_MODEL
from cmjax.model import Tokenizer
from tests.http.serving import served
from tests.serve.driving import make_engine

pytestmark = pytest.mark.soak
LM_EVAL = os.environ.get("CMJAX_LM_EVAL") or shutil.which("lm_eval")
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


def test_lm_eval_gets_the_model_s_log_likelihoods(tmp_path):
    if LM_EVAL is None:
        pytest.skip("needs lm-eval: see the top of this file")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in QUESTIONS))
    (tmp_path / "code.yaml").write_text(TASK.replace("DATA", str(data)))
    model, tokenizer = cmjax.load(BUNDLED_MODEL), Tokenizer.from_folder(BUNDLED_MODEL)
    engine = make_engine(model, 2, prefill_ep_size=1, max_num_seqs_per_rank=4, max_model_len=128)
    engine.start()
    try:
        with served(engine) as address:
            arguments = f"model=demo,base_url={address}/v1/completions,num_concurrent=2,max_retries=1"
            arguments += f",tokenizer_backend=huggingface,tokenizer={BUNDLED_MODEL},tokenized_requests=True"
            command = [LM_EVAL, "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "code"]
            command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
            environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
            subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=280)
    finally:
        engine.shutdown(timeout=0)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["code"]["acc,none"] >= 2 / 3
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    for sample in map(json.loads, samples.read_text().splitlines()):
        question = sample["doc"]["question"]
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            prompt, whole = (tokenizer.encode(text) for text in (question, question + choice))
            logits = np.asarray(model.logits(np.array([whole])))[0]
            logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
            begin = len(prompt) if whole[: len(prompt)] == prompt else None
            if begin is not None:
                expected = sum(float(logprobs[i - 1, whole[i]]) for i in range(begin, len(whole)))
                assert float(response[0][0]) == pytest.approx(expected, abs=1e-2)

"""What the tests of others' clients share: how a client is run, and what the model says to its prompts."""

import os
import shutil
import subprocess

import httpx
import jax
import numpy as np
import pytest

from tests.http.serving import PATIENCE

MAX_MODEL_LEN, MAX_TOKENS = 256, 16  # of the server that they ask, and of an answer
CLEAR = 1e-3  # logits closer than that may trade places with the order of sums


def command_of(name, variable):
    """The command that the environment variable names, or the one on PATH; without either the test is skipped."""
    command = os.environ.get(variable) or shutil.which(name)
    if command is None:
        pytest.skip(f"needs {name} on PATH, or {variable}: see the top of this file")
    return command


def run(command, folder, is_error=False, **variables):
    """Run a client in a folder: its standard output, or standard error where it is to fail. Where it does otherwise all
    that it said is shown."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    ended = subprocess.run(
        [*map(str, command)], cwd=folder, env={**environment, **variables}, capture_output=True, text=True, timeout=600
    )
    assert (ended.returncode != 0) == is_error, ended.stdout + ended.stderr
    return ended.stderr if is_error else ended.stdout


def conversation(messages):
    """By the demonstration model's chat template."""
    return "<|begin|>" + "".join(f"<|{one['role']}|>{one['content']}" for one in messages) + "<|assistant|>"


class Greedy:
    """What the model itself says to a prompt: text, log probabilities, and the tokens that went in and came out."""

    def __init__(self, model, tokenizer, address, prompt):
        """The prompt is as the model sees it: special tokens are where its text has them."""
        ids = tokenizer.backend.encode(prompt, add_special_tokens=False).ids
        body = {"prompt": ids, "max_tokens": MAX_TOKENS, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE).json()
        made = answer["choices"][0]["token_ids"]
        assert len(made) == MAX_TOKENS
        # One full forward on one device: each token is its best, but for a close call.
        logits = np.asarray(model.logits(np.array([ids + made])))[0][len(ids) - 1 : -1]
        assert np.all(logits[np.arange(MAX_TOKENS), made] >= logits.max(axis=-1) - CLEAR)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        self.logprobs = [float(logprobs[place, token]) for place, token in enumerate(made)]
        self.text, self.usage = tokenizer.decode(made), [len(ids), MAX_TOKENS]
        self.stop = self.text[len(self.text) // 2 :][:3]
        self.stopped = self.text[: self.text.index(self.stop)]

    def check_whole(self, answer):
        assert (answer["text"], answer["usage"], answer["finish"]) == (self.text, self.usage, "length")
        if "pieces" in answer:
            self.check_pieces(answer["pieces"])

    def check_pieces(self, pieces):
        assert "".join(pieces) == self.text
        assert sum(piece != "" for piece in pieces) > 1

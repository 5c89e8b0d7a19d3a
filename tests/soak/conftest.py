"""The server that others' clients ask."""

import pytest

import cmjax
from cmjax.checkpoint import Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from tests.http.serving import serving_process
from tests.soak.client_runs import MAX_MODEL_LEN, Greedy


@pytest.fixture(scope="module")
def address():
    """Of `cmjax serve` with the demonstration model, as a process."""
    options = ("--model", BUNDLED_MODEL, "--ep", 8, "--max-num-seqs", 4, "--max-model-len", MAX_MODEL_LEN)
    with serving_process(*options) as (_, address):
        yield address


@pytest.fixture(scope="session")
def model():
    return cmjax.load(BUNDLED_MODEL)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_folder(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def greedy(address, model, tokenizer):
    """A function from a prompt, as the model sees it, to what the model says to it."""
    return lambda prompt: Greedy(model, tokenizer, address, prompt)

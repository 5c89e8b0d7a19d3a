"""The tokenizer of a model folder."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.cli.options import BUNDLED_MODEL
from cmjax.errors import UserError
from cmjax.text import Tokenizer

TOKENIZER = Tokenizer.from_folder(BUNDLED_MODEL)


@given(st.text())
def test_text_survives(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    ids, ends = TOKENIZER.encode_with_ends(text)
    assert [TOKENIZER.bos_token_id, *ids] == TOKENIZER.encode(text)
    assert ends == sorted(ends)
    assert (ends or [0])[-1] == len(text)


def test_special_tokens():
    assert (TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<|begin|>", "<|end|>")
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.vocab_size) == (0, 1, 2048)
    assert TOKENIZER.decode([0, *TOKENIZER.encode("x")[1:], 1]) == "x"
    assert "add_generation_prompt" in TOKENIZER.chat_template


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, tmp_path)
    return tmp_path


def test_the_older_style_of_special_tokens(folder):
    config = {"bos_token": {"content": "<|begin|>", "lstrip": False}, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template) == (0, None, None)
    assert tokenizer.encode("x") == TOKENIZER.encode("x")[1:]


def test_without_a_config_there_are_no_special_tokens(folder):
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).bos_token is None


def test_saved_padding_and_truncation_do_not_count(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    text = "a long text of many tokens"
    assert Tokenizer.from_folder(folder).encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer: "),
        ("tokenizer.json", "\x00", "tokenizer.json: not a tokenizer: "),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object, found list"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', 'eos_token "<none>" is not in the vocabulary'),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token 7 is not in the vocabulary"),
    ],
)
def test_files_that_are_no_tokenizer(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_folder(folder)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json: not found; text needs the model's tokenizer"):
        Tokenizer.from_folder(tmp_path)

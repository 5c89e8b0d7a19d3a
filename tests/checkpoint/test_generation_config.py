"""`generation_config.json`: what is taken from it, what is refused, and where it is looked for."""

import json

import pytest

from cmjax.checkpoint import GenerationConfig
from cmjax.errors import UserError


def write(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_need_not_have_one(tmp_path):
    assert GenerationConfig.find(tmp_path) == GenerationConfig(None, {})
    with pytest.raises(UserError, match=r"--generation-config .*: .*generation_config.json not found; it takes auto"):
        GenerationConfig.find(tmp_path, str(tmp_path / "other"))


def test_what_is_taken_from_it(tmp_path):
    own = write(tmp_path / "own", eos_token_id=[3, 5], temperature=0.6, top_p=0.95, top_k=50, min_p=None,
                repetition_penalty=1, max_new_tokens=64, do_sample=True, transformers_version="5.0")  # fmt: skip
    defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.0, "max_tokens": 64}
    found = GenerationConfig.find(own)
    assert (found.eos_token_ids, found.defaults) == ((3, 5), defaults)
    assert found.where == str(own / "generation_config.json")
    found = GenerationConfig.find(own, "vllm")
    assert (found.eos_token_ids, found.defaults) == ((3, 5), {})
    other = write(tmp_path / "other", eos_token_id=0)
    found = GenerationConfig.find(own, str(other))
    assert (found.eos_token_ids, found.defaults) == ((0,), {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id must be a token id or a list of them, found 'x'"),
        ({"eos_token_id": [1, -1]}, "eos_token_id must be"),
        ({"eos_token_id": True}, "eos_token_id must be"),
        ({"temperature": "hot"}, "temperature must be a number, found 'hot'"),
        ({"top_k": 2.5}, "top_k must be an integer, found 2.5"),
        ({"top_p": False}, "top_p must be a number"),
    ],
)
def test_what_is_malformed_is_named(tmp_path, config, message):
    write(tmp_path, **config)
    with pytest.raises(UserError, match="generation_config.json: " + message):
        GenerationConfig.find(tmp_path)


def test_ends_outside_the_vocabulary(tmp_path):
    found = GenerationConfig.find(write(tmp_path, eos_token_id=[3, 99]))
    found.check(100)
    with pytest.raises(UserError, match=r"eos_token_id 99 is outside the vocabulary \(0 to 98\)"):
        found.check(99)

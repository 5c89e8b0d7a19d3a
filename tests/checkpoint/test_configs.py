"""Configs without weights: shipped ones, files, folders."""

import json

import pytest

from cmjax.checkpoint.configs import find_config, shipped_models
from cmjax.errors import UserError
from cmjax.model import abstract_params, num_params
from tests.helpers import TINY

# As published: all parameters, those of the MTP module included (V3 and R1: 671 billion and 14 of the module with its
# own head and embedding).
PUBLISHED = {
    "deepseek-r1": 685e9,
    "deepseek-v2": 236e9,
    "deepseek-v2-lite": 15.7e9,
    "deepseek-v3": 685e9,
    "kimi-k2": 1.026e12,
    "moonlight-16b-a3b": 16e9,
}


def test_these_ship():
    assert shipped_models() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_model_has_its_published_size(name):
    found = find_config(name)
    assert found.name == name
    assert not found.is_int8
    assert num_params(abstract_params(found.config)) == pytest.approx(PUBLISHED[name], rel=0.004)


def test_a_folder_and_a_file(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(TINY))
    assert find_config(str(folder)).name == "mine"
    assert find_config(str(other)) == find_config(str(folder)).__class__(
        "other", find_config(str(folder)).config, False
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is no folder, no file and none of deepseek-r1, .*"),
        ("{", "not valid JSON"),
        ('{"model_type": "llama"}', "llama"),
    ],
)
def test_what_is_no_config(tmp_path, content, words):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        find_config(str(path))

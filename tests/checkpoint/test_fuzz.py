"""Damaged checkpoints: whatever a file says, loading gives a model or one clear line."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.checkpoint import Tokenizer, load, save_hf
from cmjax.errors import UserError
from cmjax.model import convert_params
from tests.conftest import ROOT
from tests.helpers import tiny_model

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
# Values that are of the right kind and wrong all the same.
NEAR = st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, "yarn", "int", 8, True, [], {}])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint of floats, one of FP8 blocks, one in int8."""
    base = tmp_path_factory.mktemp("fuzz")
    model = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=1)
    save_hf(base / "floats", model.config, model.params)
    save_hf(base / "int8", model.config, convert_params(model.params, "int8", np.float32))
    shutil.copytree(ROOT / "tests/data/parity/v3-fp8", base / "fp8", ignore=shutil.ignore_patterns("*.npz"))
    return base


def parts(path):
    """The header of a safetensors file, and what follows it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(path, header, rest):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + rest)


def places(value, path=()):
    """Where a value of JSON may be replaced."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def changed(value, path, new, removes):
    """A copy with the value at `path` replaced, or removed."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if removes:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return copy


def loads_or_says_why(folder):
    try:
        model = load(folder)
    except UserError as error:
        message = str(error)
        assert message
        assert "\n" not in message.strip(), message
        return
    assert model.config.num_hidden_layers > 0


@pytest.mark.parametrize("name", ["floats", "fp8", "int8"])
def test_config(folders, name, tmp_path_factory):
    folder = folders / name
    config = json.loads((folder / "config.json").read_text())
    copy = tmp_path_factory.mktemp("config")
    for file in folder.glob("*.safetensors*"):
        (copy / file.name).symlink_to(file)

    @settings(max_examples=150)
    @given(st.sampled_from(list(places(config))), NEAR | JSON, st.booleans())
    def check(path, new, removes):
        (copy / "config.json").write_text(json.dumps(changed(config, path, new, removes)))
        loads_or_says_why(copy)

    check()


@pytest.mark.parametrize("name", ["floats", "fp8", "int8"])
def test_headers(folders, name, tmp_path_factory):
    folder = folders / name
    file = sorted(folder.glob("*.safetensors"))[0]
    header, rest = parts(file)
    copy = tmp_path_factory.mktemp("header")
    shutil.copytree(folder, copy, dirs_exist_ok=True)

    @settings(max_examples=100)
    @given(st.sampled_from(list(places(header))), NEAR | JSON, st.booleans())
    def check(path, new, removes):
        write_parts(copy / file.name, changed(header, path, new, removes), rest)
        loads_or_says_why(copy)

    check()


def test_bytes(folders, tmp_path_factory):
    """Cut off anywhere, or with some bytes of the header or of any JSON file replaced."""
    folder = folders / "floats"
    copy = tmp_path_factory.mktemp("bytes")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    files = sorted(path.name for path in folder.iterdir())

    @settings(max_examples=100)
    @given(st.sampled_from(files), st.floats(0, 1), st.binary(min_size=1, max_size=4), st.booleans())
    def check(name, where, new, cuts):
        content = (folder / name).read_bytes()
        place = int(where * min(len(content), 4096))
        damaged = content[:place] + (b"" if cuts else new + content[place + len(new) :])
        (copy / name).write_bytes(damaged)
        try:
            loads_or_says_why(copy)
        finally:
            shutil.copy(folder / name, copy / name)

    check()


def test_tokenizer(tmp_path_factory):
    source, copy = ROOT / "models/demo", tmp_path_factory.mktemp("tokenizer")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (copy / "tokenizer.json").symlink_to(source / "tokenizer.json")

    @settings(max_examples=50)
    @given(st.sampled_from(list(places(config))), NEAR | JSON, st.booleans())
    def check(path, new, removes):
        (copy / "tokenizer_config.json").write_text(json.dumps(changed(config, path, new, removes)))
        try:
            tokenizer = Tokenizer.from_folder(copy)
        except UserError:
            return
        assert tokenizer.encode("def f():")

    check()

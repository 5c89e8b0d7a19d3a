"""Orbax checkpoints: the same model back, on any mesh, and never half of one."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from cmjax.checkpoint import load_checkpoint, restore, save, save_hf
from cmjax.checkpoint import orbax as checkpoint
from cmjax.errors import UserError
from cmjax.model import init_params, named_leaves, params_digest
from tests.parity import FOLDER, load_case


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of v3-mtp; not to be changed."""
    case, path = load_case("v3-mtp"), tmp_path_factory.mktemp("saved") / "model"
    assert save(path, case.config, case.params) == case.digest
    return path


@pytest.fixture
def copy(tmp_path, saved) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_same(params, expected) -> None:
    found, wanted = named_leaves(params), named_leaves(expected)
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        assert leaf.dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted[name]), err_msg=name)


@pytest.mark.parametrize("name", ["v3-tied", "v3-odd", "v2-bias", "v3-noqlora", "v3-dense"])
def test_a_model_comes_back_as_it_was(name, tmp_path):
    case = load_case(name)
    save(tmp_path / "model", case.config, case.params)
    for load in (restore, load_checkpoint):
        config, params, digest = load(tmp_path / "model")
        assert (config, digest) == (case.config, case.digest)
        assert_same(params, case.params)
        assert all(leaf.ctypes.data % 64 == 0 for leaf in jax.tree.leaves(params))


def test_bfloat16_comes_back_as_it_was_and_in_float32(tmp_path):
    case = load_case("v3-odd")
    config, params, digest = load_checkpoint(case.path, "bfloat16")
    assert save(tmp_path / "model", config, params) == digest
    assert restore(tmp_path / "model")[2] == digest
    assert_same(load_checkpoint(tmp_path / "model", "bfloat16")[1], params)
    wide = load_checkpoint(tmp_path / "model", "float32")
    np.testing.assert_array_equal(wide[1].embed, params.embed.astype(np.float32))
    np.testing.assert_array_equal(wide[1].norm, params.norm)
    assert wide[2] == params_digest(config, wide[1])


def test_a_narrower_dtype_is_what_the_folder_itself_would_give(saved):
    assert load_checkpoint(saved, "bfloat16")[2] == load_checkpoint(FOLDER / "v3-mtp", "bfloat16")[2]


def test_restore_onto_a_mesh(saved, make_mesh):
    """Experts over eight devices, the rest on each; then the saved devices' own arrays onto a mesh of another shape."""
    case, mesh = load_case("v3-mtp"), make_mesh(8)

    def shardings(abstract):
        def choose(path, leaf):
            spec = PartitionSpec(None, "ep") if "experts" in str(path) else PartitionSpec()
            return NamedSharding(mesh, spec)

        return jax.tree_util.tree_map_with_path(choose, abstract)

    config, params, digest = restore(saved, sharding=shardings)
    assert (config, digest) == (case.config, case.digest)
    assert_same(params, case.params)
    experts = params.moe.mlp.experts.w13
    assert experts.sharding.spec == PartitionSpec(None, "ep")
    assert [shard.data.shape for shard in experts.addressable_shards] == [(3, 2, 64, 64)] * 8
    assert params.embed.sharding.is_fully_replicated
    assert params.embed.sharding.device_set == set(mesh.devices.flat)


def test_from_one_mesh_to_another(tmp_path, make_mesh):
    case = load_case("v3-odd")
    first = NamedSharding(make_mesh(4), PartitionSpec())
    assert save(tmp_path / "model", case.config, jax.device_put(case.params, first)) == case.digest
    grid = make_mesh(2, 3, axes=("dp", "ep"), first=9)
    _, params, digest = restore(tmp_path / "model", sharding=NamedSharding(grid, PartitionSpec()))
    assert digest == case.digest
    assert_same(params, case.params)
    assert params.norm.sharding.device_set == set(grid.devices.flat)
    single = SingleDeviceSharding(jax.devices()[5])
    _, params, _ = restore(tmp_path / "model", dtype="bfloat16", sharding=single)
    assert_same(params, load_checkpoint(case.path, "bfloat16")[1])
    assert params.embed.devices() == {jax.devices()[5]}


def test_nothing_is_said(saved, caplog, capfd):
    restore(saved)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert capfd.readouterr() == ("", "")


# Whole or not at all


def test_the_folder_must_be_new(saved, tmp_path):
    case = load_case("v3-odd")
    before = restore(saved)[2]
    with pytest.raises(UserError, match="model: already exists"):
        save(saved, case.config, case.params)
    with pytest.raises(UserError, match="model: already exists"):
        save_hf(saved, case.config, case.params)
    assert restore(saved)[2] == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: already exists"):
        save(tmp_path / "file", case.config, case.params)
    with pytest.raises(UserError, match="cannot create this folder"):
        save(tmp_path / "file" / "model", case.config, case.params)
    (tmp_path / "empty").mkdir()
    assert save(tmp_path / "empty", case.config, case.params) == case.digest


@pytest.mark.parametrize("write", [save, save_hf])
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, write):
    case = load_case("v3-odd")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(case.config), "to_hf", interrupted)  # after the weights, before the manifest
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "model", case.config, case.params)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_a_checkpoint_only_when_it_is_whole(tmp_path, monkeypatch):
    """What a killed process leaves: no folder of that name, and a hidden one that is not taken for a checkpoint."""
    case = load_case("v3-odd")
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr(type(case.config), "to_hf", lambda config: {}["killed"])
    with pytest.raises(KeyError):
        save(tmp_path / "model", case.config, case.params)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.partial-")
    assert not checkpoint.is_checkpoint(left / "whole")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_checkpoint(left / "whole")
    with pytest.raises(UserError, match="not a checkpoint that cmjax saved"):
        restore(left / "whole")


# What is wrong is one clear error


def expect(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_damaged_arrays(copy):
    file = largest_file(copy / "params")
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    expect(copy, f"{file.name}: this file of the checkpoint has changed since it was saved")
    file.write_bytes(whole[:middle])
    expect(copy, f"{file.name}: this file of the checkpoint has changed since it was saved")
    file.unlink()
    expect(copy, f"{file.name}: this file of the checkpoint is missing")


def test_changed_config(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.5}))
    expect(copy, "config.json: this file of the checkpoint has changed since it was saved")
    (copy / "config.json").unlink()
    expect(copy, "config.json: this file of the checkpoint is missing")


def test_bad_manifest(copy):
    manifest = json.loads((copy / "cmjax.json").read_text())
    (copy / "cmjax.json").write_text(json.dumps(manifest | {"format": 99}))
    expect(copy, "checkpoint format 99 is not supported; supported: 1")
    (copy / "cmjax.json").write_text(json.dumps(manifest | {"files": None}))
    expect(copy, "cmjax.json: digest or files are missing")
    (copy / "cmjax.json").write_text("half")
    expect(copy, "cmjax.json: not valid JSON")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "parameter embed is float32[260, 64]; the config wants float32[260, 32]"),
        ({"q_lora_rank": None}, "parameter dense.attn.q_a is not one of the config"),
        ({"attention_bias": True}, "parameter dense.attn.kv_a_bias is missing"),
    ],
)
def test_parameters_of_another_config_are_not_saved(tmp_path, changes, message):
    case = load_case("v3-mtp")
    with pytest.raises(UserError, match=re.escape(message)):
        save(tmp_path / "model", dataclasses.replace(case.config, **changes), case.params)
    assert list(tmp_path.iterdir()) == []


def test_random_parameters_of_any_dtype(tmp_path):
    config = load_case("v2-groups").config
    params = init_params(config, seed=2, dtype="float16")
    digest = save(tmp_path / "model", config, params)
    assert_same(restore(tmp_path / "model")[1], params)
    assert digest == params_digest(config, params)

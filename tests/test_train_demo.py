"""The demonstration model's training, as users run it on a tiny recipe; and the list of files that it learns from."""

import contextlib
import hashlib
import importlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import cmjax
from cmjax.errors import UserError
from tests.conftest import ROOT

TINY = {
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_attention_heads": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 4,
        "moe_intermediate_size": 4,
        "num_routed_experts": 8,
        "num_topk": 2,
        "num_expert_groups": 2,
        "num_topk_groups": 1,
    },
    "steps": 8,
    "phases": [[0, 16], [0.5, 32]],
    "tokens_per_step": 64,
    "warmup": 2,
}
ENVIRONMENT = os.environ | {
    # A step is compiled for seconds and runs for milliseconds.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "PYTHONPATH": str(ROOT),
    # As for the suite itself: what one run compiled, the next one finds.
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def import_script(name):
    """A module of the scripts' folder, as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module(name)


demo_data = import_script("demo_data")


def write_list(path, folder, splits):
    """A list in the format of files.tsv, of `{name: split}` in `folder`."""
    rows = ["path\tsha256\tsplit\tarea"]
    rows += [f"{n}\t{hashlib.sha256((folder / n).read_bytes()).hexdigest()}\t{s}\ttests" for n, s in splits.items()]
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with `files.tsv` and a few texts of it, one of them held out (and gone), and the tiny recipe."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(4):
        lines = [f"def f{i}(x):\n    return x * {i * index}\n" for i in range(40)]
        (folder / f"m{index}.py").write_text("\n".join(lines))
    write_list(
        folder / "files.tsv", folder, {f"m{index}.py": "heldout" if index == 2 else "train" for index in range(4)}
    )
    (folder / "m2.py").unlink()
    (folder / "recipe.json").write_text(json.dumps(TINY))
    return folder


def start(corpus, work, out, *options):
    words = [sys.executable, str(ROOT / "scripts" / "train_demo.py"), "--work", str(work), "--out", str(out)]
    words += ["--recipe", str(corpus / "recipe.json"), "--list", str(corpus / "files.tsv"), "--stdlib", str(corpus)]
    words += ["--save-every", "2", "--log-every", "1", *map(str, options)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process):
    stdout, stderr = process.communicate(timeout=250)
    assert process.returncode == 0, stderr
    return stdout


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """`(work, out)` of a run that nothing interrupted; what an earlier one left half-done is in its way."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "out" / ".unfinished" / "model").mkdir(parents=True)
    (folder / "out" / ".unfinished" / "model" / "model.safetensors").write_text("half")
    finish(start(corpus, folder / "work", folder / "out"))
    return folder / "work", folder / "out"


def curve_of(work):
    """The log without its times."""
    rows = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("tokens_per_s", "seconds")} for row in rows]


def test_the_result_is_a_model(trained, rng):
    work, out = trained
    names = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
        "curve.png",
    }
    assert {path.name for path in out.iterdir()} == names
    with (out / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    dtypes = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    biases = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    assert dtypes == {name: "F32" if name in biases else "BF16" for name in dtypes}
    model = cmjax.load(out)
    assert model.config.hidden_size == 16
    assert np.isfinite(model.logits(rng.integers(0, 2048, (2, 20)))).all()
    assert np.ptp(model.params.moe.mlp.router_bias) > 0
    training = json.loads((out / "training.json").read_text())
    assert {name: training["recipe"][name] for name in TINY} == TINY
    assert [row["step"] for row in training["curve"]] == list(range(1, 9))
    assert curve_of(work)[-1]["loss"] < curve_of(work)[0]["loss"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_a_killed_run_goes_on(corpus, trained, tmp_path):
    """Killed once a checkpoint is there, it ends with the weights and the log of the run that was not."""
    work, out = tmp_path / "work", tmp_path / "out"
    process = start(corpus, work, out)
    for _ in process.stdout:
        if any(path.name.isdigit() for path in work.glob("checkpoints/*")):
            break
    process.kill()
    process.communicate()
    assert process.returncode == -9
    assert not list(out.iterdir())
    assert "going on from step" in finish(start(corpus, work, out))
    assert (out / "model.safetensors").read_bytes() == (trained[1] / "model.safetensors").read_bytes()
    assert curve_of(work) == curve_of(trained[0])
    assert [row["step"] for row in curve_of(work)] == list(range(1, 9))


def test_checkpoints_of_another_recipe_are_refused(corpus, trained, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(TINY | {"seed": 1}))
    process = start(corpus, trained[0], tmp_path / "out", "--recipe", tmp_path / "recipe.json")
    stdout, stderr = process.communicate(timeout=250)
    assert process.returncode == 2
    assert stdout == ""
    assert stderr.startswith(f"train_demo.py: error: {trained[0]} holds checkpoints of another recipe; ")
    assert stderr.count("\n") == 1


@pytest.fixture(scope="module")
def train_demo():
    return import_script("train_demo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "recipe: Expecting property name"),
        ("[]", "recipe: 'list' object"),
        ('{"model": {"hidden": 3}}', "recipe: model: unknown field 'hidden'"),
        ('{"model": {"hidden_size": 0}}', "hidden_size must be at least 1"),
        ('{"model": {"num_mtp_layers": 0}}', "with experts, MTP module and 2048 tokens"),
        ('{"steps": "many"}', "recipe: steps must be a number"),
        ('{"phases": [[0.1, 512]]}', "must begin at 0"),
        ('{"phases": [512]}', "recipe: "),
        ('{"phases": [[0, 4096]]}', "length 4096 of a phase must be 3 to 2048"),
        ('{"tokens_per_step": 1000}', "length 512 of a phase must be 3 to 2048 and divide tokens_per_step"),
    ],
)
def test_a_recipe_that_cannot_be(train_demo, text, message):
    with pytest.raises(UserError, match=message):
        train_demo.read_recipe(text)


def test_mistakes_are_one_line(train_demo, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.json").write_text('{"stepz": 1}')
    options = ["--recipe", str(tmp_path / "recipe.json"), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_demo.py", *options])
    assert train_demo.main() == 2
    assert capsys.readouterr() == ("", "train_demo.py: error: recipe: unknown field 'stepz'\n")
    assert not (tmp_path / "work").exists()


def test_no_weights_where_export_was_interrupted(train_demo, tmp_path, monkeypatch):
    recipe = train_demo.read_recipe(json.dumps(TINY))
    state = train_demo.State(train_demo.initial_params(recipe.config, 0), None, None)
    monkeypatch.setattr(train_demo.demo_log, "draw_curve", lambda rows, path: path.write_bytes(b"PNG"))
    train_demo.export(state, recipe, [], tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for moves in range(len(whole)):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            interrupt_after(patch, train_demo.os, moves)
            train_demo.export(state, recipe, [], tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
        train_demo.export(state, recipe, [], tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def interrupt_after(patch, module, moves):
    """Let `moves` files be moved into the folder, and be interrupted at the next."""
    replace, left = module.replace, [moves]

    def counting(source, target):
        if os.path.basename(os.path.dirname(source)) == "model":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(source, target)

    patch.setattr(module, "replace", counting)


def test_phases_and_epochs(train_demo, corpus):
    """A phase takes its sequences in turn, and an epoch has every token but those that fill no sequence."""
    recipe = train_demo.read_recipe(json.dumps(TINY | {"steps": 100, "phases": [[0, 16], [0.25, 32]]}))
    taken = [recipe.sequences(step) for step in range(100)]
    for phase, length, steps in ((0, 16, range(25)), (1, 32, range(25, 100))):
        assert {taken[step][:2] for step in steps} == {(phase, length)}
        assert [i for step in steps for i in taken[step][2]] == list(range(len(steps) * 64 // length))
    tokenizer = train_demo.Tokenizer.from_file(str(demo_data.MODEL / "tokenizer.json"))
    texts = demo_data.read_training_texts(corpus / "files.tsv", corpus)
    stream = demo_data.TokenStream(texts, tokenizer, seed=3)
    tokens = np.bincount(np.concatenate(stream.files), minlength=2048)
    assert tokens.sum() == stream.num_tokens
    per_epoch = stream.num_tokens // 32
    first, second = (stream.batch(0, 32, range(e * per_epoch, (e + 1) * per_epoch)) for e in range(2))
    for epoch in (first, second):
        left_out = tokens - np.bincount(epoch.ravel(), minlength=2048)
        assert left_out.min() >= 0
        assert left_out.sum() == stream.num_tokens % 32
    assert not np.array_equal(first, second)
    # A step at the end of an epoch takes the rest of it and the beginning of the next.
    across = stream.batch(0, 32, range(per_epoch - 1, per_epoch + 1))
    np.testing.assert_array_equal(across, [first[-1], second[0]])


def test_training_texts_are_those_of_the_list(tmp_path):
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    write_list(tmp_path / "list.tsv", tmp_path, {"b.py": "train", "c.py": "heldout", "a.py": "train"})
    assert demo_data.read_training_texts(tmp_path / "list.tsv", tmp_path) == ["# b.py\n", "# a.py\n"]
    (tmp_path / "a.py").write_text("# another\n")
    with pytest.raises(UserError, match=r"a\.py differs"):
        demo_data.read_training_texts(tmp_path / "list.tsv", tmp_path)
    (tmp_path / "b.py").unlink()
    with pytest.raises(UserError, match=r"b\.py is missing"):
        demo_data.read_training_texts(tmp_path / "list.tsv", tmp_path)


def test_the_list_follows_from_its_paths():
    """And the held-out text is that of the list."""
    header, *lines = demo_data.LIST.read_text().splitlines()
    assert header == "path\tsha256\tsplit\tarea"
    rows = [line.split("\t") for line in lines]
    for path, sha256, split, area in rows:
        source = demo_data.Source(path, "", sha256)
        assert (source.split, source.area) == (split, area), path
    assert len(demo_data.AREAS) == 16
    for wanted in ("train", "heldout"):
        assert {area for _, _, split, area in rows if split == wanted} == set(demo_data.AREAS)
    assert demo_data.HELDOUT.stat().st_size <= 3_000_000
    heldout = [json.loads(line) for line in demo_data.HELDOUT.read_text().splitlines()]
    stored = [[f["path"], hashlib.sha256(f["text"].encode()).hexdigest(), "heldout", f["area"]] for f in heldout]
    assert stored == [row for row in rows if row[2] == "heldout"]

"""This machine: calibrated by single operators, steps priced by their compiled programs, predicted beside measured."""

import ast
import dataclasses
import inspect
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.bench import calibrate as calibration
from cmjax.bench import calibrate_devices, calibrate_kernels, calibrate_xla
from cmjax.bench import host as bench
from cmjax.bench.own_process import own_process
from cmjax.bench.report import machine
from cmjax.checkpoint.formats import compressed_config
from cmjax.cli.command import main
from cmjax.errors import UserError
from cmjax.kernels import tiling
from cmjax.perf.host import HostCosts, fit, price_program
from cmjax.perf.host_hardware import BESIDE_A_PRODUCT, host_hardware
from cmjax.perf.host_kernels import HostData, matrix_amounts
from cmjax.perf.host_work import runs, total
from cmjax.perf.layout import Layout
from cmjax.perf.price import Pricing, price
from cmjax.serve.instances import AbstractInstance
from tests import forms
from tests.helpers import tiny_config

CONFIG = tiny_config(max_position_embeddings=512)
form = forms.form


FEW, CROWD = 2, 4


@pytest.fixture(scope="module")
def costs():
    return calibration.calibrate([1], passes=1, few=FEW, crowd=CROWD)


def test_a_calibration_measures_every_cost(costs):
    """Of whatever a step can hold; none is below zero, and a launch is never free."""
    for role, batch in (("decode", 4), ("prefill", 512)):
        text, data = program(role, 2, batch)
        assert set(total(text, data)) <= set(costs.values)
    for name, points in costs.values.items():
        assert all(value >= 0 for value in points.values()), name
        assert set(points) <= {1, FEW, CROWD}
    for name in ("operator_s", "launch_s", "memory_bytes_per_s", "exchange_s"):
        assert min(costs.values[name].values()) > 0
    if costs.cores > 1:
        alone = [seconds for seconds, _ in costs.help]
        assert alone == sorted(alone)
        assert alone[0] > 0
    assert costs.machine == machine()


def test_costs_are_found_from_what_was_measured():
    """Those that are there, whatever they are mixed with; and none below zero."""
    measured = [({"a": a, "b": b}, 2e-6 * a + 3e-9 * b) for a, b in ((1, 0), (1, 1000), (3, 10), (8, 100_000))]
    found = fit(measured, ("a", "b"))
    assert found == pytest.approx({"a": 2e-6, "b": 3e-9})
    falling = fit([({"a": 1, "b": 0}, 2.0), ({"a": 1, "b": 1}, 1.0)], ("a", "b"))
    assert falling["b"] == 0
    assert 1 < falling["a"] < 2


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (calibrate_kernels._norm(8, 60), {"norm_s": 1, "norm_row_s": 8, "norm_value_s": 8 * 64}),
        (calibrate_kernels._sample(8, 100), {"sample_s": 1, "sample_value_s": 8 * 112}),
        (
            calibrate_kernels._choose(8, 64, 4),
            {"choose_s": 1, "choose_score_s": 8 * 64, "choose_compare_s": 8 * 4 * 64},
        ),
        (
            calibrate_kernels._pack(8, 64, 4, 32),
            {"pack_s": 1, "pack_row_s": 32, "pack_slot_s": 32, "pack_byte_s": 32 * 128},
        ),
        (calibrate_kernels._lay_out(16, 2), {"lay_out_s": 1, "lay_out_rank_s": 16, "lay_out_segment_s": 32}),
        (
            calibrate_kernels._attend(2, 4, 32, 64),
            {"attend_s": 1, "attend_key_s": 128, "attend_read_s": 128 * 32, "attend_value_s": 128 * 4 * 32},
        ),
    ],
)
def test_amounts_of_a_kernel(probe, expected):
    """What its inner loops run over, from the text of a program that calls it once."""
    arrays = probe.make(np.random.default_rng(0))
    text = jax.jit(probe.call).lower(*arrays).compile().as_text()
    found = total(text, probe.data)
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)


def amounts_of(probe):
    arrays = probe.make(np.random.default_rng(0))
    return total(jax.jit(probe.call).lower(*arrays).compile().as_text(), probe.data)


def test_amounts_of_the_attention_of_prompts():
    """Of keys and pairs that there are, whatever the padding; and the probes tell the four costs apart."""
    probe = calibrate_kernels._attend_expanded(3, 32, 16, 2, 16, 32)
    out, pairs = 2 * 32 * 32, 2 * 3 * 16 * (32 + 17 / 2)
    names = ("expand_head_s", "expand_key_s", "expand_score_s", "expand_value_s")
    found = amounts_of(probe)
    assert [found[name] for name in names] == [3 * out, 3 * 48 * out, pairs, pairs * (32 + 16)]
    each = [amounts_of(one) for one in calibrate_kernels.probes()["attend_expanded"]]
    matrix = np.array([[one[name] for name in ("attend_expanded_s", *names)] for one in each])
    assert np.linalg.cond(matrix / np.linalg.norm(matrix, axis=0)) < 1000


def test_amounts_of_products(form):
    """Of few rows and of many, as the form takes them: which it is the kernels say."""
    values, rows = 64 * 96, 240
    few, many = (amounts_of(calibrate_kernels._product(count, 64, 96)) for count in (12, rows))
    how = tiling("bf16")
    assert (few["tile_bf16_s"], few["value_bf16_s"]) == (math.ceil(12 / how.tile_rows) * values, 12 * values)
    assert few["stored_s"] == 12 * 96
    assert ("staged_s" in few) == (not how.is_read_in_place)
    assert few["summed_s"] == 12 * 96
    assert not few["rest_s"]
    assert amounts_of(calibrate_kernels._product(12, 24, 96))["rest_s"] == (
        96 * few["tile_bf16_s"] / values if how.step > 8 else 0
    )
    if form == "Portable":
        assert many["value_bf16_s"] == rows * values
        assert not {"laid_bf16_s", "many_bf16_s", "by_lane_s"} & {name for name, amount in many.items() if amount}
    else:
        assert (many["laid_bf16_s"], many["many_bf16_s"], many["by_lane_s"]) == (values, rows * values, rows * 64)
        assert "value_bf16_s" not in many
    # Columns are laid once more for rows that do not fit beside them.
    large = amounts_of(calibrate_kernels._product(6000, 64, 96)).get("laid_bf16_s", 0.0)
    assert large == (2 * values if form != "Portable" else 0)


def test_amounts_of_int8_products(form):
    """Rows are quantized where they come as floats; and int8 has many rows earlier."""
    few, many = (amounts_of(calibrate_kernels._quantized(count, 64, 96)) for count in (8, 48))
    assert (few["value_s8_s"], few["scaled_s"], few["quantized_s"]) == (8 * 64 * 96, 8 * 96, 8 * 64)
    assert many["quantized_s"] == 48 * 64
    assert many.get("many_s8_s", 0) == (0 if form == "Portable" else 48 * 64 * 96)
    each = 200
    found = amounts_of(calibrate_kernels._expert(2, each, 64, 32, is_quantized=True))
    assert found["quantized_s"] == 2 * each * (64 + 32)
    if form != "Portable":  # two parts of an expert's rows
        assert found["laid_s8_s"] == 2 * 2 * 64 * (64 + max(32, tiling("s8").step))
    packed = amounts_of(calibrate_kernels._pack(64, 256, 8, 64, "int8"))
    assert packed["quantized_s"] == 64 * 256
    assert not amounts_of(calibrate_kernels._pack(64, 256, 8, 64))["quantized_s"]


def test_amounts_of_xla_operators():
    x = np.ones((64, 64), np.float32)
    found = total(jax.jit(lambda x: jnp.exp(x)).lower(x).compile().as_text(), HostData())
    assert (found["operator_s"], found["bent_s"], found["touched_s"]) == (1, 64 * 64, 2 * x.nbytes)
    found = total(jax.jit(lambda x: x @ x.T).lower(x).compile().as_text(), HostData())
    assert found["dot_s"] == 2 * 64**3
    assert found["dot_value_s"] == 3 * 64 * 64
    for axis, folded in ((1, 0), (0, 64 * 64)):  # along rows, and rows to one
        found = total(jax.jit(lambda x, axis=axis: x.sum(axis)).lower(x).compile().as_text(), HostData())
        assert (found["reduced_s"], found["folded_s"]) == (64 * 64, folded)
    for tokens in (256, 2048):  # rows of choices; more than a library keeps memory for, or not
        chain = calibrate_xla.Chain(calibrate_xla._combined, calibrate_xla._choices(tokens))
        arrays = chain.make(np.random.default_rng(0))
        found = total(jax.jit(chain.body).lower(*arrays).compile().as_text(), HostData())
        assert found["folded_s"] == tokens * 8 * 64
        assert found["mapped_s"] == max(2 * 4 * tokens * 8 * 64 - 2**20, 0)
    index = np.arange(8, dtype=np.int32)
    found = total(
        jax.jit(lambda x, i: jnp.take(x, i, axis=0, mode="clip")).lower(x, index).compile().as_text(), HostData()
    )
    assert found["gathered_s"] == 8 * 64


def test_help_is_for_kernels_that_take_long():
    costs = HostCosts(2, {}, help=[(1e-5, 1e-5), (1e-4, 8e-5), (1e-3, 5e-4)])
    assert costs.helped(1e-6) == 1e-6
    assert costs.helped(1e-3) == pytest.approx(5e-4)
    assert costs.helped(4e-3) == pytest.approx(2e-3)
    assert HostCosts(2, {}, help=[(1e-3, 4e-4)]).helped(2e-3) == 1e-3  # not faster than all cores are
    assert 3e-5 * 0.8 < costs.helped(3e-5) < 3e-5
    assert HostCosts(2, {}).helped(1.0) == 1.0


def test_a_calibration_is_kept_for_the_same_machine_only(costs, tmp_path):
    path = tmp_path / "cmjax" / "host.json"
    assert bench.kept(path) is None
    costs.save(path)
    assert bench.kept(path) == costs
    other = HostCosts(costs.cores, {**costs.machine, "commit": "another"}, costs.values)
    other.save(path)
    assert bench.kept(path) is None
    path.write_text("{")
    assert bench.kept(path) is None


def modules_of(module):
    """What a module imports."""
    nodes = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes}


def step_modules(names):
    """Those that run a whole step, or measure one."""
    return {one for one in names if one.startswith(("cmjax.serve", "cmjax.bench.host", "cmjax.targets.running"))}


def test_a_calibration_knows_no_step(monkeypatch):
    """Neither by what it imports, nor by what it runs: no step can be traced meanwhile."""
    for module in (calibration, calibrate_devices, calibrate_kernels, calibrate_xla):
        assert not step_modules(modules_of(module))
    assert step_modules(modules_of(bench))  # the check sees one that does

    def fail(*args, **kwargs):
        raise AssertionError("a whole step")

    monkeypatch.setattr(bench, "run_step", fail)
    monkeypatch.setattr(AbstractInstance, "trace", fail)
    found = HostCosts(2, machine())
    on = calibrate_devices.Devices(calibration.bring_up(2)[:2], 1)
    calibration._launch(on, found)
    calibration._exchanges(on, found)
    assert found.values["exchange_s"][2] > 0


def test_what_stands_beside_a_product_is_what_decode_has():
    """The trace of `--hardware host` has products only; what else runs is counted in a program."""
    text, data = program("decode", 1, 8)
    found = {"xla": 0.0, "kernel": 0.0, "product": 0.0}
    for run in runs(text, data):
        kind = run.kind if run.kind in found else "kernel"
        found[kind] += run.times if run.kind != "exchange" else 0
    assert BESIDE_A_PRODUCT["operator_s"] == pytest.approx(found["xla"] / found["product"], rel=0.4)
    assert BESIDE_A_PRODUCT["norm_s"] == pytest.approx(found["kernel"] / found["product"], rel=0.4)


def program(role, ep_size, batch, quant=None, dtype=jnp.bfloat16):
    instance = bench.instance_of(CONFIG, bench.Case(role, ep_size, batch), 2, quant)
    instance = dataclasses.replace(instance, dtype=jnp.dtype(dtype))
    return instance.trace().lower().compile().as_text(), bench.data_of(instance)


@pytest.mark.parametrize(("role", "batch"), [("decode", 4), ("prefill", 512)])
def test_a_compiled_step_is_priced_by_stage(costs, role, batch):
    text, data = program(role, 2, batch)
    found = price_program(text, costs, 2, data)
    assert {"launch", "mla_prolog", "core_attention", "gate", "dispatch", "moe", "combine"} <= set(found)
    assert min(found.values()) > 0
    # Each cost is in it: twice of all is twice the price, and of rates half.
    slower = {
        name: {at: value / 2 if name.endswith("per_s") else value * 2 for at, value in points.items()}
        for name, points in costs.values.items()
    }
    twice = price_program(text, HostCosts(costs.cores, costs.machine, slower), 2, data)
    assert sum(twice.values()) == pytest.approx(2 * sum(found.values()))
    # And so is each kernel's own: where it is free, the step takes less.
    for name in ("norm_s", "choose_score_s", "pack_row_s", "value_bf16_s", "expert_s"):
        dearer = {**costs.values, name: {1: 1e-3}}
        assert sum(price_program(text, HostCosts(costs.cores, costs.machine, dearer), 2, data).values()) > sum(
            found.values()
        )
    more = price_program(text, costs, 64, data)
    assert sum(more.values()) > sum(found.values())


@pytest.mark.parametrize(("quant", "dtype", "kind"), [("int8", jnp.bfloat16, "s8"), (None, jnp.float32, "f32")])
def test_other_formats_have_a_price(costs, quant, dtype, kind):
    """Their own products are in it: dearer ones make the step so."""
    for role, batch in (("decode", 4), ("prefill", 512)):
        text, data = program(role, 2, batch, quant, dtype)
        amounts = total(text, data)
        assert set(amounts) <= set(costs.values)
        assert amounts.get(f"value_{kind}_s", 0) + amounts.get(f"many_{kind}_s", 0) > amounts.get("value_bf16_s", 0)
        found = sum(price_program(text, costs, 2, data).values())
        names = [name for name in costs.values if name.endswith(f"_{kind}_s")]
        dearer = HostCosts(costs.cores, costs.machine, costs.values | {name: {1: 1e-3} for name in names})
        assert sum(price_program(text, dearer, 2, data).values()) > 2 * found > 0


def test_trips_of_prefill_are_those_of_packed_prompts():
    """2,048 tokens are 8 prompts of 256: of two chunks each, the first meets two tiles of queries, the second one."""
    _, data = program("prefill", 1, 2048)
    assert (data.chunks, data.tiles) == (16, 1.5)
    assert (data.prompts, data.prompt_keys, data.pairs) == (8, 2048, 8 * 256 * 257 / 2)
    assert data.rows == 2048 * CONFIG.num_topk


def test_predicted_beside_measured(costs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs.save(tmp_path / "cmjax" / "host.json")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    sizes = ["--ep", "1", "--ep", "2", "--batch", "2", "--tokens", "64", "--rounds", "1"]
    assert main(["simulate", "host", "--model", str(tmp_path), *sizes, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    cases = [(one["role"], one["ep_size"]) for one in report["results"]]
    assert cases == [("decode", 1), ("decode", 2), ("prefill", 1), ("prefill", 2)]
    for one in report["results"]:
        assert one["predicted_s"] == pytest.approx(sum(one["stages_s"].values()))
        assert one["error"] == pytest.approx(one["predicted_s"] / one["measured_s"] - 1)
    assert report["costs"]["values"]["product_s"].keys() == {"1", str(FEW), str(CROWD)}
    assert bench.tables(report)
    assert (
        main(["simulate", "step", "--model", str(tmp_path), "--hardware", "host", "--ep", "2", "--context", "100"]) == 0
    )
    assert "This machine" in capsys.readouterr().out


def test_an_int8_checkpoint_runs_as_int8(costs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs.save(tmp_path / "cmjax" / "host.json")
    hf = CONFIG.to_hf() | {"quantization_config": compressed_config([])}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    sizes = ["--ep", "1", "--batch", "2", "--tokens", "64", "--rounds", "1"]
    assert main(["simulate", "host", "--model", str(tmp_path), *sizes, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["weights"] == "int8"
    assert min(one["predicted_s"] for one in report["results"]) > 0
    one = host_hardware(costs)
    assert one.peak_int8 != one.peak_bf16


def test_what_does_not_fit_is_one_line(costs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs.save(tmp_path / "cmjax" / "host.json")
    assert main(["simulate", "host", "--ep", "1"]) == 2
    assert "GiB for weights and cache" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(UserError, match="EP 1000 needs 1000 devices"):
        bench.instance_of(CONFIG, bench.Case("decode", 1000, 1), 2)


def test_a_process_that_is_killed_is_one_line():
    with pytest.raises(UserError, match="a process that measures was killed"), own_process() as pool:
        pool.submit(os._exit, 9).result()


def test_a_product_takes_no_less_than_reading_its_matrix(costs):
    """Where noise had its costs come out as nothing."""
    names = {name for kind in ("bf16", "f32") for name in matrix_amounts(kind, 64, 512, 512)[0]}
    free = dataclasses.replace(costs, values=costs.values | {name: {1: 0.0} for name in names})
    one = host_hardware(free)
    assert one.peak_bf16 == pytest.approx(64 * one.memory_bytes_per_s)  # 64 rows, two operations for two bytes
    assert one.peak_f32 == pytest.approx(32 * one.memory_bytes_per_s)


def test_devices_share_the_machine(costs):
    """Sixteen times the devices do sixteen times the work on the same cores."""
    one = host_hardware(costs)
    assert one.among(64).peak_bf16 == pytest.approx(one.among(8).peak_bf16 / 8)
    assert one.among(64).memory_bytes == pytest.approx(one.memory_bytes / 64)

    def seconds(ep_size):
        layout = Layout(config=CONFIG, phase="decode", ep_size=ep_size, batch=8, context=100)
        return price(layout, one, Pricing(check_memory=False)).seconds

    assert seconds(64) > 4 * seconds(8)

"""This machine: calibrated by single operators, steps priced by their compiled programs, predicted beside measured."""

import ast
import inspect
import json

import pytest

from cmjax.bench import calibrate as calibration
from cmjax.bench import host as bench
from cmjax.bench.report import machine
from cmjax.cli.command import main
from cmjax.errors import UserError
from cmjax.perf.host import PRODUCT_ROWS, HostCosts, price_program
from cmjax.perf.host_hardware import host_hardware
from cmjax.perf.layout import Layout
from cmjax.perf.price import Pricing, price
from cmjax.serve.instances import AbstractInstance
from tests.helpers import tiny_config

CONFIG = tiny_config(max_position_embeddings=512)


@pytest.fixture(scope="module")
def costs():
    return calibration.calibrate([1])


def test_a_calibration_measures_every_cost(costs):
    rates = [f"product_{dtype}_{rows}" for dtype in ("bfloat16", "float32") for rows in PRODUCT_ROWS]
    assert set(rates) <= set(costs.values)
    for name, points in costs.values.items():
        assert all(value >= 0 for value in points.values()), name
        assert set(points) <= {1, 8}
    for name in ("operator_s", "kernel_s", "launch_s", "memory_bytes_per_s", *rates):
        assert min(costs.values[name].values()) > 0
    assert costs.machine == machine()


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
    assert not step_modules(modules_of(calibration))
    assert step_modules(modules_of(bench))  # the check sees one that does

    def fail(*args, **kwargs):
        raise AssertionError("a whole step")

    monkeypatch.setattr(bench, "run_step", fail)
    monkeypatch.setattr(AbstractInstance, "trace", fail)
    found = HostCosts(2, machine())
    calibration._overheads(calibration._Devices(calibration.bring_up(1)[:1]), found)
    assert found.values["operator_s"][1] > 0


def program(role, ep_size, batch):
    instance = bench.instance_of(CONFIG, bench.Case(role, ep_size, batch), 2)
    return instance.trace().lower().compile().as_text(), bench.data_of(instance)


@pytest.mark.parametrize(("role", "batch"), [("decode", 4), ("prefill", 512)])
def test_a_compiled_step_is_priced_by_stage(costs, role, batch):
    text, data = program(role, 2, batch)
    found = price_program(text, costs, 2, data)
    assert {"launch", "mla_prolog", "core_attention", "gate", "dispatch", "moe", "combine"} <= set(found)
    assert min(found.values()) > 0
    # Each cost is in it: twice of all is twice the price, and of rates half.
    slower = {
        name: {at: value / 2 if name.endswith("per_s") or name.startswith("product") else value * 2 for at, value in of}
        for name, of in ((name, points.items()) for name, points in costs.values.items())
    }
    twice = price_program(text, HostCosts(costs.cores, costs.machine, slower), 2, data)
    assert sum(twice.values()) == pytest.approx(2 * sum(found.values()))
    more = price_program(text, costs, 64, data)
    assert sum(more.values()) > sum(found.values())


def test_trips_of_prefill_are_those_of_packed_prompts():
    """2,048 tokens are 8 prompts of 256: of two chunks each, the first meets two tiles of queries, the second one."""
    _, data = program("prefill", 1, 2048)
    assert (data.chunks, data.tiles) == (16, 1.5)
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
    assert report["costs"]["values"]["kernel_s"].keys() == {"1", "8"}
    assert bench.tables(report)
    assert (
        main(["simulate", "step", "--model", str(tmp_path), "--hardware", "host", "--ep", "2", "--context", "100"]) == 0
    )
    assert "This machine" in capsys.readouterr().out


def test_what_does_not_fit_is_one_line(costs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs.save(tmp_path / "cmjax" / "host.json")
    assert main(["simulate", "host", "--ep", "1"]) == 2
    assert "GiB for weights and cache" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(UserError, match="EP 1000 needs 1000 devices"):
        bench.instance_of(CONFIG, bench.Case("decode", 1000, 1), 2)


def test_devices_share_the_machine(costs):
    """Sixteen times the devices do sixteen times the work on the same cores."""
    one = host_hardware(costs)
    assert one.among(64).peak_bf16 == pytest.approx(one.among(8).peak_bf16 / 8)
    assert one.among(64).memory_bytes == pytest.approx(one.memory_bytes / 64)

    def seconds(ep_size):
        layout = Layout(config=CONFIG, phase="decode", ep_size=ep_size, batch=8, context=100)
        return price(layout, one, Pricing(check_memory=False)).seconds

    assert seconds(64) > 4 * seconds(8)

"""Pricing: what it must never do, what does not fit, where its numbers are from; nothing end-to-end is fitted."""

import ast
import dataclasses
import inspect
import pathlib
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cmjax.checkpoint.configs import find_config
from cmjax.errors import UserError
from cmjax.perf import fit, hardware, paper
from cmjax.perf.layout import Layout
from cmjax.perf.price import Pricing, check_fits, price, stage_table
from cmjax.targets import machines

R1 = find_config("deepseek-r1").config
DIE = hardware.hardware("ascend-910")
FREE = Pricing(check_memory=False)


def decode(**changes):
    return Layout(**{"config": R1, "phase": "decode", "ep_size": 320, "batch": 48, "context": 4096.0, **changes})


def seconds(layout, machine=DIE, pricing=FREE):
    return price(layout, machine, pricing).seconds


@given(
    context=st.floats(100, 100_000),
    more=st.floats(1.05, 3),
    balance=st.floats(1, 3),
    name=st.sampled_from(hardware.names()),
)
def test_more_of_anything_never_takes_less(context, more, balance, name):
    machine = hardware.hardware(name)
    base = decode(context=context, balance=balance)
    before = seconds(base, machine)
    assert seconds(dataclasses.replace(base, context=context * more), machine) >= before
    assert seconds(dataclasses.replace(base, balance=balance * more), machine) >= before
    assert seconds(dataclasses.replace(base, batch=64), machine) > before


@pytest.mark.parametrize("figure", ["memory_bytes_per_s", "peak_int8", "peak_bf16", "attention_efficiency"])
def test_a_faster_machine_is_faster(figure):
    faster = DIE.with_figures("assumed", "a test", **{figure: 2 * getattr(DIE, figure)})
    assert seconds(decode(), faster) < seconds(decode())


@pytest.mark.parametrize("figure", ["launch_s", "exchange_slowdown", "step_overhead_s"])
def test_a_slower_part_is_slower(figure):
    slower = DIE.with_figures("assumed", "a test", **{figure: 2 * getattr(DIE, figure) + 1e-6})
    assert seconds(decode(), slower) > seconds(decode())


def test_two_streams_are_balanced_and_bounded():
    found = price(decode(drafts=1, microbatches=2), DIE)
    attention, moe = found.streams
    assert 1 / 24 <= found.attention_share <= 23 / 24
    assert max(attention, moe) < found.seconds < attention + moe
    fixed = price(decode(drafts=1, microbatches=2), DIE, Pricing(splits=[2 / 3]))
    assert fixed.seconds >= found.seconds


def test_overlap_of_exchange_hides_the_shorter():
    machine = hardware.hardware("h800")
    layout = Layout(config=R1, phase="prefill", ep_size=32, batch=8192, context=4096, microbatches=2, attention="dp")
    found = price(layout, machine, FREE)
    alone = sum(found.stages.values())
    assert max(found.streams) < found.seconds < alone * 1.3
    apart = dataclasses.replace(machine, prefill_overlap="none", bulk_cores=0)
    assert price(layout, apart, FREE).seconds > found.seconds


def test_the_buffers_of_the_paper():
    """Equations 1 and 2: 96 tokens a die at EP320, 225 + 420 MiB."""
    placed = decode(drafts=1)
    assert placed.memory()["buffers"] == (225 + 420) * 2**20
    assert decode(drafts=1, microbatches=2).memory()["buffers"] == (225 + 420) * 2**20 / 2


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"needs \d+\.\d GiB .*weights 22\.7.*most by cache.*ascend-910 has 64\.0"):
        price(decode(batch=2000), DIE)
    with pytest.raises(UserError, match="most by weights"):
        price(decode(ep_size=4, batch=2), DIE)
    check_fits(decode(), DIE, {"weights": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ep_size": 0}, "ep_size 0 is not positive"),
        ({"batch": 0}, "batch 0 is not positive"),
        ({"batch": 3, "microbatches": 2}, "microbatches 2 do not divide a batch of 3"),
        ({"microbatches": 3}, "microbatches 3 are not supported"),
        ({"balance": 0.5}, "balance 0.5 is below 1"),
        ({"context": 0}, "no lengths of a request"),
        ({"context": 4096, "cached": 4096}, "no lengths of a request"),
        ({"context": 10**7}, "exceeds the model's max_position_embeddings"),
        ({"config": find_config("kimi-k2").config, "drafts": 1}, "need an MTP module"),
    ],
)
def test_layouts_that_are_none(changes, message):
    with pytest.raises(UserError, match=message):
        decode(**changes)


def test_unknown_hardware_lists_what_there_is():
    with pytest.raises(UserError, match="'tpu' is unknown; there are ascend-910, h800"):
        hardware.hardware("tpu")


@pytest.mark.parametrize("name", hardware.names())
def test_every_number_has_unit_source_and_mark(name):
    machine = hardware.hardware(name)
    assert {"memory_bytes", "peak_int8", "peak_bf16", "launch_s", "balance"} <= set(machine.figures)
    for figure in machine.figures.values():
        assert figure.unit
        assert len(figure.source) > 3
        assert figure.mark in ("measured", "published", "fitted", "assumed")
    assert 0 < machine.matmul_efficiency <= 1
    with pytest.raises(AttributeError):
        _ = machine.no_such_number


def test_the_data_file_holds_what_the_fit_gives():
    fitted = fit.fit_ascend(R1, DIE)
    for name, value in fitted.items():
        assert DIE.figures[name].mark == "fitted", name
        assert DIE.figures[name].value == pytest.approx(value, rel=1e-3, abs=1e-12), name
    assert fitted["matmul_efficiency"] == pytest.approx((0.794 + 0.774 + 0.827 + 0.811 + 0.796 + 0.779) / 6)
    # What is fitted on Hopper is the mean of the published products.
    h800, published = hardware.hardware("h800"), hardware.operators()["deepgemm"]
    many = published["many_rows_tflops"] + published["grouped_tflops"]
    assert h800.matmul_efficiency == pytest.approx(sum(many) / len(many) / published["peak_tflops"], abs=1e-3)
    few = published["few_rows_gb_per_s"]
    assert h800.matmul_memory_efficiency == pytest.approx(sum(few) / len(few) / published["peak_gb_per_s"], abs=1e-3)


def files_read(monkeypatch, function):
    """Names of the files that a call reads."""
    read, real = [], pathlib.Path.read_text
    monkeypatch.setattr(
        pathlib.Path, "read_text", lambda self, *args, **kw: read.append(self.name) or real(self, *args, **kw)
    )
    hardware._data.cache_clear()
    function()
    monkeypatch.undo()
    return set(read)


def test_a_fit_reads_operators_only(monkeypatch):
    """Neither by what it opens, nor by what it imports, nor by what its file holds."""
    assert files_read(monkeypatch, lambda: fit.fit_ascend(R1, DIE)) == {"operators.toml"}
    # The check sees a fit that looks at what is to be predicted.
    assert "published.toml" in files_read(monkeypatch, lambda: (fit.fit_ascend(R1, DIE), paper.rows()))
    imported = [node.module for node in ast.walk(ast.parse(inspect.getsource(fit))) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if name.split(".")[-1] in ("paper", "points", "plan", "whatif")]
    sections = hardware.operators()
    assert set(sections) == {"exchange", "mla", "gemm", "streams", "deepgemm"}
    numbers = set(re.findall(r"[\d.]+", str(sections)))
    end_to_end = {str(row["published"]) for row in paper.rows() if row["end_to_end"] and row["paper"]}
    # Figure 14 is of a layer's streams; 46.8, 1943 and the like are nowhere.
    assert not numbers & (end_to_end - {"[1.23, 1.31]"})


def test_formats_of_weights():
    machine = hardware.hardware("gb200")
    int8, fp4 = (seconds(decode(ep_size=32), machine, Pricing(format=f, check_memory=False)) for f in ("fp8", "fp4"))
    assert fp4 < int8
    narrow = Pricing(cache_itemsize=1, check_memory=False)
    assert price(decode(), machine, narrow).memory["cache"] == price(decode(), machine, FREE).memory["cache"] / 2


def test_a_step_is_the_sum_of_its_stages():
    layout = decode(batch=8)
    found = price(layout, DIE)
    assert found.seconds == pytest.approx(sum(found.stages.values()) + DIE.step_overhead_s)
    table = {row["stage"]: row["seconds"] for row in stage_table(layout, DIE, found)}
    assert table == pytest.approx(dict(found.stages))


@given(
    low=st.integers(64, 4096),
    more=st.integers(1, 4096),
    name=st.sampled_from(["h200", "gb200", "ascend-910", "ascend-950dt", "v5p"]),
    microbatches=st.sampled_from([1, 2]),
    ep_size=st.sampled_from([8, 32]),
)
@example(low=1020, more=10, name="h200", microbatches=1, ep_size=32)
@settings(max_examples=60, deadline=None)
def test_a_larger_batch_never_takes_less(low, more, name, microbatches, ep_size):
    """Where another kernel of dispatch and combine takes over, too: it does where it is faster."""
    machine = hardware.hardware(name)
    base = decode(ep_size=ep_size, microbatches=microbatches, batch=64)

    def at(batch):
        layout = dataclasses.replace(base, batch=2 * (batch // 2))
        return price(layout, machine, FREE, layout.counts_by_batch(64, 512)).seconds

    assert at(low + more) >= at(low) * (1 - 1e-9)


def test_a_machine_to_compile_for_and_to_price_on_is_one():
    """Memory and its rate stand in the targets' table alone; what no target has is in the data file itself."""
    known = machines()
    shared = set(hardware.names()) & set(known)
    assert shared == {"h100", "h200", "b200", "gb200", "gb300", "v5p"}
    for name in shared:
        machine, target = hardware.hardware(name), known[name]
        entries = hardware._data("hardware.toml")[name]
        assert entries["target"] == name
        assert "memory_bytes" not in entries
        assert machine.memory_bytes == target.memory_bytes
        assert machine.figures["memory_bytes"].source == target.facts["source"]
        if "memory_bytes_per_s" in target.facts:
            assert "memory_bytes_per_s" not in entries
            assert machine.memory_bytes_per_s == target.facts["memory_bytes_per_s"]

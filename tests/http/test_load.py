"""`cmjax bench serve` and `cmjax bench sampling` against a server of this project."""

import json

import httpx
import pytest

from cmjax.bench.sampling import KINDS
from cmjax.cli import main
from tests.http.serving import PATIENCE


def bench(capsys, *arguments):
    capsys.readouterr()
    assert main(["bench", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def generated(address):
    return httpx.get(f"{address}/status.json", timeout=PATIENCE).json()["num_generation_tokens"]


@pytest.mark.parametrize("whole", [False, True])
def test_a_load_with_large_bodies_beside_it(capsys, address, whole):
    before = generated(address)
    options = ["--num-prompts", 6, "--output-len", 20, "--max-model-len", 256, "--max-concurrency", 3, "--idle-s", 0.2]
    options += ["--large-bodies", 5, "--large-body-mb", 0.09, *(["--whole"] if whole else [])]
    report = bench(capsys, "serve", "--url", address, *options)
    assert report["sent"] == [{"sampling": {}, "num_requests": 6}]
    found = report["results"]["url"]
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (6, 0, 120)
    assert generated(address) - before == 120
    # Whole answers come at once: there are no gaps.
    assert ("mean_itl_ms" in found, "mean_icl_ms" in found, "mean_tpot_ms" in found) == (not whole,) * 3
    kinds = [one["kind"] for one in found["large_bodies"]]
    assert kinds == ["text", "token ids", "chat of one message", "chat of many", "text"]
    for one in found["large_bodies"]:
        assert one["answer"] == "400 context_length_exceeded"
        assert one["bytes"] == pytest.approx(90_000, rel=0.01)


def test_kinds_of_requests_beside_greedy_ones(capsys, address):
    options = ["--url", address, "--rounds", 2, "--concurrency", "1,2", "--input-len", 9, "--output-len", 12]
    report = bench(capsys, "sampling", *options)
    assert report["errors"] == {}
    assert [(row["kind"], row["concurrency"]) for row in report["results"]] == [(k, c) for c in (1, 2) for k in KINDS]
    for row in report["results"]:
        for name in ("ttft", "tpot"):
            assert row[f"{name}_ms"] > 0
            low, middle, high = (row[f"{name}_ratio_{p}"] for p in ("p25", "p50", "p75"))
            assert 0 < low <= middle <= high
            assert middle == 1 or row["kind"] != "greedy"
    assert main(["bench", "sampling", *map(str, options)]) == 0
    assert "greedy, again" in capsys.readouterr().out
    assert main(["bench", "sampling", "--concurrency", "1,0"]) == 2
    assert "give positive numbers" in capsys.readouterr().err

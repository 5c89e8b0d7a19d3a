"""`cmjax bench serve`: traces, the figures of a load, and what is counted as a failure."""

import asyncio
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from cmjax.bench.load import Record, UrlTarget, run_load
from cmjax.bench.serving import latencies, plot, summarize
from cmjax.bench.trace import Lengths, Prompts, TraceRequest, poisson_trace, read_trace
from cmjax.cli import main
from cmjax.errors import UserError

RANDOM = Prompts(np.random.default_rng(0), 100, None, None)


# -- traces -----------------------------------------------------------------------------------------------------------


def test_arrivals_are_poisson_and_lengths_as_asked():
    rng = np.random.default_rng(1)
    trace = poisson_trace(
        4000, 20.0, Lengths.parse("10:20"), Lengths.parse("lognormal:50,0.5"), RANDOM, rng, max_model_len=1000
    )
    arrivals = np.array([one.arrival_s for one in trace])
    gaps = np.diff(arrivals)
    assert gaps.min() >= 0
    assert np.mean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert np.std(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert {len(one.prompt_ids) for one in trace} == set(range(10, 21))
    assert np.median([one.max_tokens for one in trace]) == pytest.approx(50, rel=0.1)
    at_once = poisson_trace(5, float("inf"), Lengths.parse("3"), Lengths.parse("4"), RANDOM, rng, max_model_len=6)
    assert [(one.arrival_s, len(one.prompt_ids), one.max_tokens) for one in at_once] == [(0.0, 3, 3)] * 5


@pytest.mark.parametrize("text", ["", "0", "a", "5:2", "lognormal:3", "lognormal:0,1"])
def test_wrong_lengths_are_refused(text):
    with pytest.raises(UserError, match=r"is no length|must be positive"):
        Lengths.parse(text)


def test_traces_from_files(tmp_path):
    file = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 3000, "input_length": 7, "output_length": 5},
        {"arrival_s": 1.0, "prompt": [1, 2, 3], "max_tokens": 500, "priority": 2, "tenant": "t"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_trace(file, RANDOM, None, max_model_len=100, speed=2.0)
    assert first == TraceRequest(0.0, [1, 2, 3], 97, 2, "t")
    assert (second.arrival_s, len(second.prompt_ids), second.max_tokens) == (1.0, 7, 5)
    for line, message in (("{", "1: no request"), ('{"timestamp": 1}', "input_length"), ("[]", "1: no request")):
        file.write_text(line)
        with pytest.raises(UserError, match=message):
            read_trace(file, RANDOM, None, max_model_len=100)
    with pytest.raises(UserError, match="No such file"):
        read_trace(tmp_path / "nothing", RANDOM, None, max_model_len=100)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_times_of_a_request():
    record = Record(5, sent=1.0, chunks=[1.5, 2.0, 3.5], num_output=6)
    assert latencies(record) == pytest.approx({"ttft": 500, "e2el": 2500, "tpot": 2000 / 5})
    assert "tpot" not in latencies(Record(5, sent=1.0, chunks=[2.0], num_output=1))


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.lists(st.floats(0.001, 5), min_size=1, max_size=5), st.integers(1, 3)),
        min_size=1,
    )
)
def test_figures_are_those_of_complete_requests(shapes):
    records = []
    for index, (sent, gaps, per_chunk) in enumerate(shapes):
        record = Record(3, sent, (sent + np.cumsum(gaps)).tolist(), per_chunk * len(gaps))
        record.error = "broken" if index % 3 == 2 else None
        records.append(record)
    report = summarize(records, 20.0, percentiles=(50, 95), slo_ms={"ttft": 1000.0, "e2el": 4000.0})
    good = [r for r in records if r.error is None]
    assert (report["completed"], report["failed"]) == (len(good), len(records) - len(good))
    assert sum(report["errors"].values()) == report["failed"]
    assert report["total_output_tokens"] == sum(r.num_output for r in good)
    assert report["output_throughput"] == report["total_output_tokens"] / 20
    ttft = [(r.chunks[0] - r.sent) * 1e3 for r in good]
    assert report["mean_ttft_ms"] == pytest.approx(np.mean(ttft))
    assert report["p95_ttft_ms"] == pytest.approx(np.percentile(ttft, 95))
    kept = [r for r in good if r.chunks[0] - r.sent <= 1 and r.chunks[-1] - r.sent <= 4]
    assert report["request_goodput"] == len(kept) / 20


def test_a_load_without_a_complete_request_has_no_times(tmp_path):
    report = summarize([Record(3, error="broken")], 1.0)
    assert report["errors"] == {"broken": 1}
    assert "mean_ttft_ms" not in report
    plot([Record(3, 0.0, [0.5, 1.0], 4), Record(3, error="broken")], str(tmp_path / "load.png"))
    assert (tmp_path / "load.png").stat().st_size > 1000


# -- against servers that break ---------------------------------------------------------------------------------------


def event(value):
    return f"data: {json.dumps(value)}\n\n".encode()


def chunk(*ids):
    return event({"choices": [{"text": "x", "token_ids": list(ids)}]})


async def completions(request):
    """Behaves as the first prompt token says."""
    kind = (await request.json())["prompt"][0]
    if kind == 1:
        return JSONResponse({"error": {"message": "no"}}, status_code=500)

    async def stream():
        yield chunk(5, 6)[:9]  # cut anywhere
        yield chunk(5, 6)[9:] + chunk(7)
        if kind == 2:
            return  # ends early
        if kind == 3:
            yield b"data: {nonsense\n\n"
        if kind == 4:
            yield event({"error": {"message": "the link is down"}})
        if kind == 5:
            raise RuntimeError("drops the connection")
        yield event({"choices": [], "usage": {"completion_tokens": 3}})
        yield b"data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def broken_server():
    async def models(_):
        return JSONResponse({"data": [{"id": "m"}]})

    app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"]), Route("/v1/models", models)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def test_only_whole_answers_count(broken_server):
    trace = [TraceRequest(0.01 * kind, [kind], 3) for kind in range(6)]

    async def load():
        target = await UrlTarget(broken_server).open()
        try:
            return await run_load(trace, target, max_concurrency=3)
        finally:
            await target.close()

    records, duration = asyncio.run(load())
    assert records[0].is_complete
    assert records[0].token_ids == [5, 6, 7]
    assert records[0].num_output == 3
    reasons = [record.error for record in records[1:]]
    for reason, part in zip(
        reasons, ["status 500", "before it was complete", "JSONDecodeError", "the link is down", ""], strict=True
    ):
        assert reason is not None
        assert part in reason
    assert summarize(records, duration)["completed"] == 1
    assert all(record.sent >= one.arrival_s for record, one in zip(records, trace, strict=True))


def test_mistakes_are_one_line(capsys):
    for arguments, message in (
        (["--url", "http://127.0.0.1:9", "--num-prompts", "1"], "does not answer as a server should"),
        (["--request-rate", "0", "--url", "http://x"], "--request-rate 0 is not positive"),
        (["--slo", "speed:3"], "'speed:3' is no target"),
        (["--percentiles", "500"], "give numbers from 0 to 100"),
        (["--compare", "--url", "http://x"], "leave out --url"),
    ):
        assert main(["bench", "serve", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1


@pytest.mark.soak
def test_the_command_compares_engine_and_server(tmp_path):
    """In a process of its own: what server and clients do to the streams of their process is not pytest's business."""
    arguments = ["--ep", "2", "--num-prompts", "12", "--output-len", "9", "--max-model-len", "128", "--slo", "ttft:1e9"]
    command = [sys.executable, "-m", "cmjax", "bench", "serve", *arguments, "--compare", "--json"]
    done = subprocess.run([*command, "--plot", tmp_path / "load.png"], stdout=subprocess.PIPE, check=True)
    report = json.loads(done.stdout)
    assert set(report["results"]) == {"engine", "whole", "stream"}
    for one in report["results"].values():
        assert (one["completed"], one["failed"], one["total_output_tokens"]) == (12, 0, 12 * 9)
        assert one["request_goodput"] == one["request_throughput"]
    assert report["results"]["stream"]["server_cpu_us_per_token"] > 0
    assert (tmp_path / "load.png").exists()

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
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from cmjax.bench.figures import gaps, latencies, summarize
from cmjax.bench.load import Record, UrlTarget, run_load
from cmjax.bench.loop_lag import parse_lag
from cmjax.bench.serving import plot
from cmjax.bench.trace import (
    SAMPLED,
    Lengths,
    Prompts,
    TraceRequest,
    TraceSettings,
    make_trace,
    poisson_trace,
    read_trace,
)
from cmjax.cli import main
from cmjax.errors import UserError
from cmjax.serve import SamplingParams

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
        {
            "arrival_s": 1.0,
            "prompt": [1, 2, 3],
            "max_tokens": 500,
            "priority": 2,
            "tenant": "t",
            "top_p": 0.5,
            "seed": 1,
        },
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_trace(file, RANDOM, None, max_model_len=100, speed=2.0)
    assert first == TraceRequest(0.0, [1, 2, 3], 97, 2, "t", {"top_p": 0.5, "seed": 1})
    assert (second.arrival_s, len(second.prompt_ids), second.max_tokens) == (1.0, 7, 5)
    for line, message in (("{", "1: no request"), ('{"timestamp": 1}', "input_length"), ("[]", "1: no request")):
        file.write_text(line)
        with pytest.raises(UserError, match=message):
            read_trace(file, RANDOM, None, max_model_len=100)
    file.write_text('{"timestamp": 1, "input_length": 1, "output_length": 1, "top_p": 7}')
    with pytest.raises(UserError, match=r"trace.jsonl:1: top_p 7 is out of range"):
        read_trace(file, RANDOM, None, max_model_len=100)
    with pytest.raises(UserError, match="No such file"):
        read_trace(tmp_path / "nothing", RANDOM, None, max_model_len=100)


def test_requests_say_of_their_sampling_what_is_given_and_nothing_else(tmp_path):
    sizes = {"vocab_size": 100, "max_model_len": 50}
    for sent in ({}, {"temperature": 0.0}, {"top_p": 0.9, "logprobs": 2, "stop_token_ids": (3, 4)}):
        for request in make_trace(TraceSettings(num_prompts=3), None, tmp_path / "none", sampling=sent, **sizes):
            body = UrlTarget("http://x", model="m").body(request)
            assert {name: value for name, value in body.items() if name in SAMPLED} == sent
            # An engine is asked for what a server would make of it: OpenAI's defaults for all the rest.
            expected = {"temperature": 1.0, **sent, "max_tokens": request.max_tokens}
            assert request.params == SamplingParams(**expected)
            file = tmp_path / "trace.jsonl"
            file.write_text(request.line)
            (again,) = read_trace(file, RANDOM, None, max_model_len=50)
            assert json.loads(again.line) == json.loads(request.line)
    file.write_text('{"arrival_s": 0, "prompt": [1], "max_tokens": 4, "temperature": 0.5}')
    (mixed,) = make_trace(TraceSettings(file=file), None, file, sampling={"temperature": 0.0, "top_k": 3}, **sizes)
    assert mixed.sampling == {"temperature": 0.5, "top_k": 3}
    with pytest.raises(UserError, match="min_tokens 9 is more than max_tokens 4"):
        make_trace(TraceSettings(file=file), None, file, sampling={"min_tokens": 9}, **sizes)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_times_of_a_request():
    record = Record(5, sent=1.0, chunks=[1.5, 2.0, 3.5], counts=[1, 2, 3])
    assert latencies(record) == pytest.approx({"ttft": 500, "e2el": 2500, "tpot": 2000 / 5})
    icl, itl = gaps(record)
    assert icl == pytest.approx([500, 1500])
    assert itl == pytest.approx([250, 250, 500, 500, 500])
    assert "tpot" not in latencies(Record(5, sent=1.0, chunks=[2.0], counts=[8]))


@given(st.lists(st.tuples(st.floats(0.001, 5), st.integers(1, 9)), min_size=2, max_size=9))
def test_gaps_of_tokens_and_of_chunks_are_the_same_time(shape):
    steps, counts = zip(*shape, strict=True)
    record = Record(3, chunks=np.cumsum(steps).tolist(), counts=list(counts))
    icl, itl = gaps(record)
    assert (len(icl), len(itl)) == (len(counts) - 1, sum(counts[1:]))
    assert np.sum(icl) == pytest.approx(np.sum(itl)) == pytest.approx(sum(steps[1:]) * 1e3)
    report = summarize([record], 1.0)
    assert report["mean_itl_ms"] == pytest.approx(sum(steps[1:]) * 1e3 / sum(counts[1:]))
    assert report["p99_icl_ms"] == pytest.approx(np.percentile(np.array(steps[1:]) * 1e3, 99))


@given(st.lists(st.none() | st.lists(st.integers(0, 9), max_size=4), max_size=9), st.integers(0, 30))
def test_every_token_is_in_a_chunk(parts, total):
    record = Record(1)

    async def answer():
        for part in parts:
            yield part
        yield total

    ticks = iter(range(100))
    told = sum(len(part or ()) for part in parts)
    num_chunks = sum(part is None or bool(part) for part in parts)
    if num_chunks == 0 or max(total, told) == 0:
        with pytest.raises(RuntimeError, match=r"no tokens came|says neither"):
            asyncio.run(record.fill(answer(), lambda: next(ticks)))
        return
    asyncio.run(record.fill(answer(), lambda: next(ticks)))
    assert record.num_output == max(total, told)
    assert record.chunks == list(range(num_chunks))
    named = [len(part) for part in parts if part]
    if None in parts:
        shares = [
            count for count, part in zip(record.counts, [p for p in parts if p is None or p], strict=True) if not part
        ]
        assert max(shares) - min(shares) <= 1
        assert sum(shares) == max(total - told, 0)
    else:
        assert record.counts == [*named[:-1], named[-1] + max(total - told, 0)]


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.lists(st.floats(0.001, 5), min_size=1, max_size=5), st.integers(1, 3)),
        min_size=1,
    )
)
def test_figures_are_those_of_complete_requests(shapes):
    records = []
    for index, (sent, steps, per_chunk) in enumerate(shapes):
        record = Record(3, sent, (sent + np.cumsum(steps)).tolist(), [per_chunk] * len(steps))
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
    plot([Record(3, 0.0, [0.5, 1.0], [1, 3]), Record(3, error="broken")], str(tmp_path / "load.png"))
    assert (tmp_path / "load.png").stat().st_size > 1000


@given(st.lists(st.floats(0, 3), min_size=1, max_size=300), st.lists(st.floats(0, 3), max_size=20))
def test_the_loop_s_lag_is_bounded_from_above(lags, earlier):
    registry = CollectorRegistry()
    edges = (0.001, 0.01, 0.1, 1.0)
    histogram = Histogram("own:event_loop_lag_seconds", "Of it.", ("model_name",), buckets=edges, registry=registry)
    Histogram("own:other_lag_seconds", "Not of it.", registry=registry).observe(9)
    assert parse_lag(generate_latest(registry).decode()) is None  # there, but without a reading yet
    for seconds in earlier:
        histogram.labels("m").observe(seconds)
    before = parse_lag(generate_latest(registry).decode()) if earlier else None
    for seconds in lags:
        histogram.labels("m").observe(seconds)
    after = parse_lag(generate_latest(registry).decode())
    found = (after - before if before else after).figures()
    assert found["count"] == len(lags)
    for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1)):
        exact = np.sort(lags)[int(np.ceil(share * len(lags))) - 1]
        assert found[name] == next((edge * 1e3 for edge in edges if exact <= edge), None)
    assert (after - after).figures() is None


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
        if kind == 7:
            yield event(
                {"choices": [{"text": "y"}]}
            )  # a server that says no ids: 3 tokens are left for it and the next
            yield event({"choices": [{"text": "z"}]})
        yield event({"choices": [], "usage": {"completion_tokens": 6 if kind == 7 else 3}})
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
    trace = [TraceRequest(0.01 * kind, [kind], 3) for kind in (0, 1, 2, 3, 4, 5, 7)]

    async def load():
        async with UrlTarget(broken_server) as target:
            return await run_load(trace, target, max_concurrency=3)

    records, duration = asyncio.run(load())
    assert records[0].is_complete
    assert records[0].token_ids == [5, 6, 7]
    assert records[0].num_output == 3
    assert records[6].counts == [2, 1, 1, 2]
    reasons = [record.error for record in records[1:6]]
    for reason, part in zip(
        reasons, ["status 500", "before it was complete", "JSONDecodeError", "the link is down", ""], strict=True
    ):
        assert reason is not None
        assert part in reason
    assert summarize(records, duration)["completed"] == 2
    assert all(record.sent >= one.arrival_s for record, one in zip(records, trace, strict=True))


def test_mistakes_are_one_line(capsys):
    for arguments, message in (
        (["--url", "http://127.0.0.1:9", "--num-prompts", "1"], "does not answer as a server should"),
        (["--request-rate", "0", "--url", "http://x"], "--request-rate 0 is not positive"),
        (["--slo", "speed:3"], "'speed:3' is no target"),
        (["--percentiles", "500"], "give numbers from 0 to 100"),
        (["--compare", "--url", "http://x"], "leave out --url"),
        (["--large-bodies", "1"], "give --url"),
        (["--temperature", "-1"], "--temperature -1 is out of range: it must be from 0"),
        (["--url", "http://x", "--top-k", "-5"], "top_k -5 is out of range"),
    ):
        assert main(["bench", "serve", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1


@pytest.mark.soak
def test_the_command_compares_engine_and_server(tmp_path):
    """In a process of its own: what server and clients do to the streams of their process is not pytest's business."""
    arguments = ["--ep", "2", "--num-prompts", "12", "--output-len", "9", "--max-model-len", "128", "--slo", "ttft:1e9"]
    arguments += ["--temperature", "0.5", "--top-k", "7", "--idle-s", "0"]
    command = [sys.executable, "-m", "cmjax", "bench", "serve", *arguments, "--compare", "--json"]
    done = subprocess.run([*command, "--plot", tmp_path / "load.png"], stdout=subprocess.PIPE, check=True)
    report = json.loads(done.stdout)
    assert set(report["results"]) == {"engine", "whole", "stream"}
    for one in report["results"].values():
        assert (one["completed"], one["failed"], one["total_output_tokens"]) == (12, 0, 12 * 9)
        assert one["request_goodput"] == one["request_throughput"]
    assert report["sent"] == [{"sampling": {"temperature": 0.5, "top_k": 7}, "num_requests": 12}]
    assert report["results"]["stream"]["server_cpu_us_per_token"] > 0
    assert (tmp_path / "load.png").exists()

"""`cmjax bench serve`: a load on an engine or a server, its report and its picture."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from cmjax.bench.figures import DEFINITIONS, TIMES, FigureSettings, latencies, summarize
from cmjax.bench.large_bodies import bodies_table, make_bodies, send_bodies
from cmjax.bench.load import ClientSettings, EngineTarget, Record, Target, UrlTarget, run_load
from cmjax.bench.loop_lag import lag_table, read_lag, watch_idle
from cmjax.bench.report import machine
from cmjax.bench.tables import new_table
from cmjax.bench.trace import TraceRequest
from cmjax.checkpoint import Tokenizer
from cmjax.serve import Engine
from cmjax.serve.settings import API_DEFAULTS, ServerSettings
from cmjax.text import JsonObject


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests, how they are sent (`url` counts for `run_on_url` alone), and what is wanted of their times."""

    trace: Sequence[TraceRequest]
    client: ClientSettings
    wanted: FigureSettings

    async def send(self, target: Target, on_progress: Callable[[], None]) -> tuple[list[Record], float]:
        """What became of each request, and the seconds in all."""
        return await run_load(self.trace, target, max_concurrency=self.client.max_concurrency, on_progress=on_progress)

    def figures(self, records: Sequence[Record], duration_s: float) -> JsonObject:
        """See `summarize`."""
        return summarize(records, duration_s, percentiles=self.wanted.each_percentile, slo_ms=self.wanted.slo_ms)

    def sent(self) -> list[JsonObject]:
        """What requests say of their sampling, and how many say it, the most frequent first."""
        kinds = collections.Counter(json.dumps(one.sampling, sort_keys=True) for one in self.trace)
        return [{"sampling": json.loads(kind), "num_requests": count} for kind, count in kinds.most_common()]


def run_on_engine(engine: Engine, load: Load, on_progress: Callable[[], None]) -> tuple[JsonObject, list[Record]]:
    """The load on an engine that has been started: its figures by name, and what became of each request."""
    records, duration_s = asyncio.run(load.send(EngineTarget(engine), on_progress))
    return {"engine": load.figures(records, duration_s)}, records


def run_on_url(load: Load, on_progress: Callable[[], None]) -> tuple[JsonObject, list[Record]]:
    """As `run_on_engine`, on the server that the client's settings name; with what it says of its event loop, and what
    became of large bodies."""
    client = load.client

    async def send() -> tuple[JsonObject, list[Record]]:
        async with UrlTarget.of(client) as target:
            bodies = make_bodies(client.large_bodies, client.large_body_bytes, target.model, np.random.default_rng(0))
            idle = await watch_idle(target, client.idle_s)
            before = await read_lag(target)
            (records, duration_s), answers = await asyncio.gather(
                load.send(target, on_progress), send_bodies(bodies, target)
            )
            after = await read_lag(target)
        found = load.figures(records, duration_s)
        if before is not None and after is not None:
            lags = {f"idle, {client.idle_s:g} s": idle, "under the load": (after - before).figures()}
            found["event_loop_lag_ms"] = {name: lag for name, lag in lags.items() if lag is not None}
        return found | ({"large_bodies": answers} if answers else {}), records

    found, records = asyncio.run(send())
    return {"url": found}, records


def run_over_http(engine: Engine, path: Path, tokenizer: Tokenizer | None, load: Load) -> JsonObject:
    """The figures of the load over HTTP, asked for whole and in streams; `path` is the model's folder."""
    return {
        name: _served(engine, path, tokenizer, load, more) for name, more in (("whole", ["--whole"]), ("stream", []))
    }


def make_report(results: JsonObject, load: Load) -> JsonObject:
    """The figures of one load or several, with all that goes with them."""
    report = {"benchmark": "serve", "machine": machine(), "num_requests": len(load.trace), "sent": load.sent()}
    return report | {"results": results, "ratios": _ratios(results), "definitions": DEFINITIONS}


def _served(engine: Engine, path: Path, tokenizer: Tokenizer | None, load: Load, more: Sequence[str]) -> JsonObject:
    """The server in a thread of this process, the clients in another process, with `more` options."""
    with tempfile.TemporaryDirectory() as folder, _server(engine, path, tokenizer) as (url, cpu_s):
        file = Path(folder) / "trace.jsonl"
        file.write_text("\n".join(one.line for one in load.trace), encoding="utf-8")
        command = [sys.executable, "-m", "cmjax", "bench", "serve", "--url", url, "--trace", str(file), "--json"]
        command += ["--model", str(path), "--max-model-len", str(engine.settings.max_model_len), *more]
        command += ["--percentiles", load.wanted.percentiles, "--idle-s", str(load.client.idle_s)]
        command += [word for target in load.wanted.targets for word in ("--slo", target)]
        before = cpu_s()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        used = cpu_s() - before
    report: JsonObject = json.loads(done.stdout)["results"]["url"]
    return report | {"server_cpu_us_per_token": used * 1e6 / max(report["total_output_tokens"], 1)}


@contextlib.contextmanager
def _server(engine: Engine, path: Path, tokenizer: Tokenizer | None) -> Iterator[tuple[str, Callable[[], float]]]:
    """A server in a thread: its address, and the seconds of CPU that the thread has used so far."""
    import uvicorn

    from cmjax.api import ChatTemplate
    from cmjax.serve.http import create_app

    template = None if tokenizer is None else ChatTemplate.find(path, tokenizer)
    app = create_app(engine, ServerSettings(model_name=path.name), tokenizer, template)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    clock: list[int] = []

    def run() -> None:
        clock.append(time.pthread_getcpuclockid(threading.get_ident()))
        server.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", lambda: time.clock_gettime(clock[0])
    finally:
        server.should_exit = True
        thread.join()


def _ratios(reports: JsonObject) -> dict[str, float]:
    """Throughput over HTTP, over that of the engine by itself."""
    if "stream" not in reports:
        return {}
    alone = reports["engine"]["output_throughput"]
    return {f"{name}_over_engine": reports[name]["output_throughput"] / alone for name in ("whole", "stream")}


def plot(records: Sequence[Record], path: str) -> None:
    """A picture of a load: requests under way and tokens a second over time, and the times as distributions."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    complete = [record for record in records if record.is_complete]
    figure, ((running, rate), (ttft, tpot)) = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained")
    starts, ends = np.sort([r.sent for r in complete]), np.sort([r.chunks[-1] for r in complete])
    times = np.linspace(0, max(ends, default=1.0), 200)
    running.plot(times, np.searchsorted(starts, times) - np.searchsorted(ends, times))
    running.set(title="requests under way", xlabel="s")
    chunks = [chunk for r in complete for chunk in zip(r.chunks, r.counts, strict=True)]
    counts, edges = np.histogram([at for at, _ in chunks], bins=rate_bins(complete), weights=[n for _, n in chunks])
    rate.stairs(counts / np.diff(edges), edges)
    rate.set(title="tokens/s", xlabel="s")
    each = [latencies(record) for record in complete]
    for axes, name in ((ttft, "ttft"), (tpot, "tpot")):
        values = np.sort([one[name] for one in each if name in one])
        axes.plot(values, np.linspace(0, 1, len(values)))
        axes.set(title=f"share of requests with a {name.upper()} up to", xlabel="ms", ylim=(0, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


_MAX_BINS = 30


def rate_bins(complete: Sequence[Record]) -> int:
    """Of tokens over time: the sequences of a call get their tokens at the same moment, so a bin spans at least five
    calls, told by the median gap between a request's chunks; in bins of about a call they come or do not."""
    gaps = [gap for record in complete for gap in np.diff(record.chunks)]
    moments = [at for record in complete for at in (record.chunks[0], record.chunks[-1])]
    widest = max(moments, default=0.0) - min(moments, default=0.0)
    fitting = widest / (5 * float(np.median(gaps))) if gaps and np.median(gaps) > 0 else _MAX_BINS
    return int(min(max(fitting, 1), _MAX_BINS))


def tables(report: JsonObject, percentiles: Sequence[float]) -> list[Table]:
    """Each load in a column."""
    reports = report["results"]
    table = new_table(f"{report['num_requests']:,} requests", "", *reports, numbers_from=1)

    def row(name: str, key: str, form: str = ",.1f") -> None:
        if any(key in one for one in reports.values()):
            table.add_row(name, *(format(one[key], form) if key in one else "-" for one in reports.values()))

    for name, key, form in (
        ("complete", "completed", ","),
        ("failed", "failed", ","),
        ("seconds", "duration", ",.1f"),
        ("requests/s", "request_throughput", ",.2f"),
        ("goodput, requests/s", "request_goodput", ",.2f"),
        ("output tokens/s", "output_throughput", ",.0f"),
        ("all tokens/s", "total_token_throughput", ",.0f"),
        ("server CPU, µs a token", "server_cpu_us_per_token", ",.0f"),
    ):
        row(name, key, form)
    for time_name in TIMES:
        row(f"{time_name.upper()} mean, ms", f"mean_{time_name}_ms")
        for p in percentiles:
            row(f"{time_name.upper()} p{p:g}, ms", f"p{p:g}_{time_name}_ms")
    notes = [f"{name.replace('_', ' ')}: {value:.2f}" for name, value in report["ratios"].items()]
    notes += [f"{count} failed: {why}" for one in reports.values() for why, count in one["errors"].items()]
    notes += [f"{one['num_requests']:,} requests sent {_in_words(one['sampling'])}" for one in report["sent"]]
    table.caption = "\n".join(notes)
    words = new_table("What they are", "", "of", "")
    for name, text in report["definitions"].items():
        words.add_row(name.upper(), *text.split(": ", 1))
    lags = {f"{n}: {when}": lag for n, one in reports.items() for when, lag in one.get("event_loop_lag_ms", {}).items()}
    bodies = [answer for one in reports.values() for answer in one.get("large_bodies", ())]
    return [table, *([lag_table(lags)] if lags else []), *([bodies_table(bodies)] if bodies else []), words]


def _in_words(sampling: JsonObject) -> str:
    if not sampling:
        return (
            f"nothing of their sampling: the API's defaults hold, such as temperature {API_DEFAULTS['temperature']:g}"
        )
    return ", ".join(f"{name} {value}" for name, value in sampling.items())

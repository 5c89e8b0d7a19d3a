"""`cmjax bench serve`: a load on an engine or a server, and the figures of `vllm bench serve`, under their names."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cmjax.bench.load import ClientSettings, EngineTarget, Record, Target, UrlTarget, run_load
from cmjax.bench.report import machine
from cmjax.bench.tables import new_table
from cmjax.bench.trace import TraceRequest
from cmjax.checkpoint import Tokenizer
from cmjax.errors import UserError
from cmjax.options import option
from cmjax.serve import Engine
from cmjax.serve.settings import ServerSettings

TIMES = ("ttft", "tpot", "itl", "e2el")

DEFINITIONS = {
    "ttft": "from sending to the first chunk",
    "tpot": "(end to end - ttft) / (tokens - 1)",
    "itl": "between chunks; a chunk holds all tokens that a request got in one call",
    "e2el": "from sending to the last chunk",
    "goodput": "complete requests a second that keep every target",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FigureSettings:
    """What is wanted of the times of a load."""

    targets: tuple[str, ...] = option(
        (), "Count requests that keep it: ttft:500, tpot:50, e2el:9000 (ms).", flag="--slo"
    )
    percentiles: str = option("50,90,99", "Of each time.", flag="--percentiles")

    def __post_init__(self) -> None:
        _ = self.each_percentile, self.slo_ms

    @property
    def each_percentile(self) -> list[float]:
        """The percentiles as numbers."""
        try:
            found = [float(part) for part in self.percentiles.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 <= one <= 100 for one in found):
            raise UserError(f"--percentiles {self.percentiles!r}: give numbers from 0 to 100, such as 50,90,99")
        return found

    @property
    def slo_ms(self) -> dict[str, float]:
        """The targets by "ttft", "tpot" or "e2el"."""
        found = {}
        for text in self.targets:
            name, _, limit = text.partition(":")
            try:
                found[name] = float(limit)
            except ValueError:
                found[name] = 0.0
            if name not in ("ttft", "tpot", "e2el") or not found[name] > 0:
                raise UserError(f"--slo {text!r} is no target; give ttft:500, tpot:50 or e2el:9000, in milliseconds")
        return found


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests, how they are sent (`url` counts for `run_on_url` alone), and what is wanted of their times."""

    trace: Sequence[TraceRequest]
    client: ClientSettings
    wanted: FigureSettings

    async def send(self, target: Target, on_progress: Callable[[int], None]) -> tuple[list[Record], float]:
        """What became of each request, and the seconds in all."""
        return await run_load(self.trace, target, max_concurrency=self.client.max_concurrency, on_progress=on_progress)

    def figures(self, records: Sequence[Record], duration_s: float) -> dict[str, Any]:
        """See `summarize`."""
        return summarize(records, duration_s, percentiles=self.wanted.each_percentile, slo_ms=self.wanted.slo_ms)


def run_on_engine(
    engine: Engine, load: Load, on_progress: Callable[[int], None]
) -> tuple[dict[str, Any], list[Record]]:
    """The load on an engine that has been started: its figures by name, and what became of each request."""
    records, duration_s = asyncio.run(load.send(EngineTarget(engine), on_progress))
    return {"engine": load.figures(records, duration_s)}, records


def run_on_url(load: Load, on_progress: Callable[[int], None]) -> tuple[dict[str, Any], list[Record]]:
    """As `run_on_engine`, on the server that the client's settings name."""
    import aiohttp

    client = load.client
    assert client.url is not None
    target = UrlTarget(client.url, model=client.model, api_key=client.api_key, streams=not client.whole)

    async def send() -> tuple[list[Record], float]:
        try:
            await target.open()
            return await load.send(target, on_progress)
        except (aiohttp.ClientError, KeyError, IndexError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{client.url} does not answer as a server should: {what}") from error
        finally:
            await target.close()

    records, duration_s = asyncio.run(send())
    return {"url": load.figures(records, duration_s)}, records


def run_over_http(engine: Engine, path: Path, tokenizer: Tokenizer | None, load: Load) -> dict[str, Any]:
    """The figures of the load over HTTP, asked for whole and in streams; `path` is the model's folder."""
    return {
        name: _served(engine, path, tokenizer, load, more) for name, more in (("whole", ["--whole"]), ("stream", []))
    }


def make_report(results: dict[str, Any], load: Load) -> dict[str, Any]:
    """The figures of one load or several, with all that goes with them."""
    report = {"benchmark": "serve", "machine": machine(), "num_requests": len(load.trace), "results": results}
    return report | {"ratios": _ratios(results), "definitions": DEFINITIONS}


def _served(engine: Engine, path: Path, tokenizer: Tokenizer | None, load: Load, more: Sequence[str]) -> dict[str, Any]:
    """The server in a thread of this process, the clients in another process, with `more` options."""
    with tempfile.TemporaryDirectory() as folder, _server(engine, path, tokenizer) as (url, cpu_s):
        file = Path(folder) / "trace.jsonl"
        lines = [
            json.dumps({"arrival_s": one.arrival_s, "prompt": one.prompt_ids, "max_tokens": one.max_tokens})
            for one in load.trace
        ]
        file.write_text("\n".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "cmjax", "bench", "serve", "--url", url, "--trace", str(file), "--json"]
        command += ["--model", str(path), "--max-model-len", str(engine.settings.max_model_len), *more]
        command += ["--percentiles", load.wanted.percentiles]
        command += [word for target in load.wanted.targets for word in ("--slo", target)]
        before = cpu_s()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        used = cpu_s() - before
    report: dict[str, Any] = json.loads(done.stdout)["results"]["url"]
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


def _ratios(reports: dict[str, Any]) -> dict[str, float]:
    """Throughput over HTTP, over that of the engine by itself."""
    if "stream" not in reports:
        return {}
    alone = reports["engine"]["output_throughput"]
    return {f"{name}_over_engine": reports[name]["output_throughput"] / alone for name in ("whole", "stream")}


def latencies(record: Record) -> dict[str, float]:
    """A complete request's times in milliseconds; `tpot` only where it has two tokens or more."""
    first, last = record.chunks[0], record.chunks[-1]
    found = {"ttft": (first - record.sent) * 1e3, "e2el": (last - record.sent) * 1e3}
    if record.num_output > 1:
        found["tpot"] = (last - first) * 1e3 / (record.num_output - 1)
    return found


def summarize(
    records: Sequence[Record],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (50, 90, 99),
    slo_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The report of a load; failures are counted by reason, and are in no mean.

    Args:
        records: of all requests.
        duration_s: of the load.
        percentiles: wanted of each time.
        slo_ms: targets by "ttft", "tpot" or "e2el".
    """
    complete = [record for record in records if record.is_complete]
    each = [latencies(record) for record in complete]
    samples = {name: [one[name] for one in each if name in one] for name in ("ttft", "tpot", "e2el")}
    samples["itl"] = [gap * 1e3 for record in complete for gap in np.diff(record.chunks)]
    num_input, num_output = (sum(getattr(r, name) for r in complete) for name in ("num_input", "num_output"))
    report: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(complete),
        "failed": len(records) - len(complete),
        "errors": dict(collections.Counter(record.error for record in records if record.error is not None)),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(complete) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
    }
    if slo_ms:
        good = sum(all(one.get(name, 0.0) <= limit for name, limit in slo_ms.items()) for one in each)
        report |= {"slo_ms": dict(slo_ms), "request_goodput": good / duration_s}
    for name, values in samples.items():
        if values:
            report |= {
                f"mean_{name}_ms": float(np.mean(values)),
                f"median_{name}_ms": float(np.median(values)),
                f"std_{name}_ms": float(np.std(values)),
            }
            report |= {f"p{p:g}_{name}_ms": float(np.percentile(values, p)) for p in percentiles}
    return report


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
    chunks = [(at, r.num_output / len(r.chunks)) for r in complete for at in r.chunks]
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


def tables(report: dict[str, Any], percentiles: Sequence[float]) -> list[Table]:
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
    table.caption = "\n".join([*notes, *(f"{name}: {text}" for name, text in report["definitions"].items())])
    return [table]

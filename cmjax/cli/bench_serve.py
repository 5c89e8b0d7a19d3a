"""`cmjax bench serve`: a request trace against an engine or a server."""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmjax.cli.generate import new_table
from cmjax.cli.options import HELDOUT, engine_options, find_model, instance_options, json_option, model_option
from cmjax.cli.running import carve_from, ease_collector, find_tokenizer, load_from, memory_errors
from cmjax.cli.serve import DEFAULT_SEQS_PER_RANK, serving_settings
from cmjax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cmjax.bench.load import Record, Target
    from cmjax.bench.trace import TraceRequest
    from cmjax.checkpoint import Tokenizer
    from cmjax.serve import Engine

TIMES = ("ttft", "tpot", "itl", "e2el")


class Slo(click.ParamType):
    """`ttft:500`: a target in milliseconds."""

    name = "name:ms"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        name, _, limit = str(value).partition(":")
        try:
            if name in ("ttft", "tpot", "e2el") and float(limit) > 0:
                return name, float(limit)
        except ValueError:
            pass
        self.fail(f"{value!r} is no target; give ttft:500, tpot:50 or e2el:9000, in milliseconds", param, ctx)


@click.command(
    epilog="""\b
    Examples:
      cmjax bench serve --ep 64 --num-prompts 200 --request-rate 10     an engine in this process
      cmjax bench serve --url http://localhost:8000 --num-prompts 100   any server with OpenAI's API
      cmjax bench serve --trace requests.jsonl --slo ttft:2000 --slo tpot:100 --plot load.png
      cmjax bench serve --compare --num-prompts 1000                    engine, HTTP whole, HTTP streaming"""
)
@click.option("--url", help="A server.  [default: an engine in this process, with the options below]")
@click.option("--api-key", help="For the server.")
@click.option("--served-model-name", help="The model's name there.  [default: the first it names]")
@click.option("--whole", is_flag=True, help="Ask the server for whole answers in place of streams.")
@click.option("--compare", is_flag=True, help="The same load on the engine, and over HTTP, whole and streamed.")
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), help="JSON lines: see docs/serving.md.")
@click.option("--trace-speed", type=float, default=1.0, show_default=True, help="Play it so many times as fast.")
@click.option("--num-prompts", type=click.IntRange(min=1), default=100, show_default=True, help="Requests to draw.")
@click.option("--request-rate", type=float, default=float("inf"), show_default=True, help="A second; inf: at once.")
@click.option("--burstiness", type=float, default=1.0, show_default=True, help="1 is Poisson, less comes in bursts.")
@click.option("--input-len", default="16:96", show_default=True, help="128, 16:256 or lognormal:200,0.8.")
@click.option("--output-len", default="32", show_default=True, help="The same.")
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Requests under way, at most.")
@click.option("--slo", "slos", type=Slo(), multiple=True, help="Count requests that keep it: ttft:500, tpot:50 ...")
@click.option("--percentiles", default="50,90,99", show_default=True, help="Of each time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@click.option("--plot", "picture", type=click.Path(), help="Draw the load to this file; needs cmjax[plot].")
@click.option("--tpot-slo-ms", type=float, help="The engine's own target for the time per output token.")
@click.option("--num-kv-blocks", type=click.IntRange(min=1), help="Cache blocks of a decode rank.  [default: for all]")
@click.option("--rounds", type=int, hidden=True, help="Taken, for `bench all`, and not used.")
@model_option
@instance_options
@engine_options
@json_option
def serve(folder: str, as_json: bool, **options: Any) -> None:
    """Time to first token, time per output token, throughput and goodput of an engine or a server under a trace."""
    from rich.console import Console

    from cmjax.bench import serving
    from cmjax.bench.load import EngineTarget
    from cmjax.bench.report import machine
    from cmjax.cli.bench import print_report

    if options["url"] and options["compare"]:
        raise UserError("--compare brings up a server of its own: leave out --url")
    percentiles = _percentiles(options["percentiles"])
    path = find_model(folder)
    tokenizer = find_tokenizer(path)
    settings: dict[str, Any] = {"percentiles": percentiles, "slo_ms": dict(options["slos"])}
    console = Console(stderr=True)
    reports: dict[str, Any] = {}
    if options["url"]:
        trace = make_trace(options, tokenizer, options["max_model_len"] or 2048, vocab_size=_vocab_size(tokenizer))
        records, duration = _over_http(options["url"], trace, options, console, streams=not options["whole"])
        reports["url"] = serving.summarize(records, duration, **settings)
    else:
        with _engine(path, options) as engine:
            vocab_size = engine.model.config.vocab_size
            trace = make_trace(options, tokenizer, engine.settings.max_model_len, vocab_size=vocab_size)
            records, duration = _load(trace, EngineTarget(engine), options, console)
            reports["engine"] = serving.summarize(records, duration, **settings)
            if options["compare"]:
                for name, streams in (("whole", False), ("stream", True)):
                    reports[name] = _served(engine, path, trace, options, console, streams, settings)
    if options["picture"]:
        serving.plot(records, options["picture"])
    report = {"benchmark": "serve", "machine": machine(), "num_requests": len(trace), "results": reports}
    report |= {"ratios": _ratios(reports), "definitions": serving.DEFINITIONS}
    print_report(report, [_table(report, percentiles)], as_json)


def make_trace(
    options: dict[str, Any], tokenizer: "Tokenizer | None", max_model_len: int, *, vocab_size: int
) -> "list[TraceRequest]":
    """The trace that the options say."""
    import numpy as np

    from cmjax.bench.trace import Lengths, Prompts, poisson_trace, read_trace

    for name in ("request_rate", "burstiness", "trace_speed"):
        if not options[name] > 0:
            raise UserError(f"--{name.replace('_', '-')} {options[name]:g} is not positive")
    rng = np.random.default_rng(options["seed"])
    prompts = Prompts(rng, vocab_size, tokenizer, HELDOUT)
    if options["trace_file"] is not None:
        speed = options["trace_speed"]
        return read_trace(options["trace_file"], prompts, tokenizer, max_model_len=max_model_len, speed=speed)
    lengths = (Lengths.parse(options["input_len"]), Lengths.parse(options["output_len"]))
    return poisson_trace(
        options["num_prompts"],
        options["request_rate"],
        *lengths,
        prompts,
        rng,
        max_model_len=max_model_len,
        burstiness=options["burstiness"],
    )


def _vocab_size(tokenizer: "Tokenizer | None") -> int:
    if tokenizer is None:
        raise UserError("--url: --model must have a tokenizer, which says what ids there are")
    return tokenizer.vocab_size


def _percentiles(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= one <= 100 for one in found):
        raise UserError(f"--percentiles {text!r}: give numbers from 0 to 100, such as 50,90,99")
    return found


@contextlib.contextmanager
def _engine(path: Path, options: dict[str, Any]) -> "Iterator[Engine]":
    from cmjax.serve import Engine

    pools = carve_from(options)
    model = load_from(path, options, options["max_num_seqs"] or DEFAULT_SEQS_PER_RANK)
    settings = serving_settings(options, model.config)
    with memory_errors(settings):
        engine = Engine(model, pools, settings=settings)
        engine.start(lambda what: click.echo(f"compiling {what}", err=True))
        ease_collector()
        try:
            yield engine
        finally:
            engine.shutdown(timeout=0)


def _load(
    trace: "Sequence[TraceRequest]", target: "Target", options: dict[str, Any], console: "Console"
) -> "tuple[list[Record], float]":
    from rich.progress import Progress

    from cmjax.bench.load import run_load

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("requests", total=len(trace))
        return asyncio.run(
            run_load(
                trace,
                target,
                max_concurrency=options["max_concurrency"],
                on_progress=lambda _: bars.advance(task),
            )
        )


def _over_http(
    url: str, trace: "Sequence[TraceRequest]", options: dict[str, Any], console: "Console", *, streams: bool
) -> "tuple[list[Record], float]":
    import aiohttp
    from rich.progress import Progress

    from cmjax.bench.load import UrlTarget, run_load

    async def send() -> "tuple[list[Record], float]":
        target = UrlTarget(url, model=options["served_model_name"], api_key=options["api_key"], streams=streams)
        try:
            await target.open()
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
                task = bars.add_task("requests", total=len(trace))
                return await run_load(
                    trace,
                    target,
                    max_concurrency=options["max_concurrency"],
                    on_progress=lambda _: bars.advance(task),
                )
        except (aiohttp.ClientError, KeyError, IndexError) as error:
            raise UserError(f"{url} does not answer as a server should: {type(error).__name__}: {error}") from error
        finally:
            await target.close()

    return asyncio.run(send())


def _served(
    engine: "Engine",
    path: Path,
    trace: "Sequence[TraceRequest]",
    options: dict[str, Any],
    console: "Console",
    streams: bool,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The same load over HTTP: the server in a thread of this process, the clients in another process."""
    import json
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as folder, _server(engine, path) as (url, cpu_s):
        file = Path(folder) / "trace.jsonl"
        lines = [
            json.dumps({"arrival_s": one.arrival_s, "prompt": one.prompt_ids, "max_tokens": one.max_tokens})
            for one in trace
        ]
        file.write_text("\n".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "cmjax", "bench", "serve", "--url", url, "--trace", str(file), "--json"]
        command += ["--model", str(path), "--max-model-len", str(engine.settings.max_model_len)]
        command += ["--percentiles", ",".join(f"{p:g}" for p in settings["percentiles"])]
        command += [] if streams else ["--whole"]
        command += [word for name, limit in settings["slo_ms"].items() for word in ("--slo", f"{name}:{limit:g}")]
        before = cpu_s()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        used = cpu_s() - before
    report: dict[str, Any] = json.loads(done.stdout)["results"]["url"]
    return report | {"server_cpu_us_per_token": used * 1e6 / max(report["total_output_tokens"], 1)}


@contextlib.contextmanager
def _server(engine: "Engine", path: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """A server in a thread: its address, and the seconds of CPU that the thread has used so far."""
    import uvicorn

    from cmjax.serve.http import ServerSettings, create_app
    from cmjax.serve.http.template import ChatTemplate

    tokenizer = find_tokenizer(path)
    template = None if tokenizer is None else ChatTemplate.find(path, tokenizer)
    app = create_app(engine, ServerSettings(model_name=path.name), tokenizer, template)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
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


def _table(report: dict[str, Any], percentiles: Sequence[float]) -> "Table":
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
    return table

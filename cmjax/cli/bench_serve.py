"""`cmjax bench serve`: a request trace against an engine or a server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import Progress

from cmjax.bench import serving
from cmjax.bench.load import ClientSettings
from cmjax.bench.serving import FigureSettings
from cmjax.bench.trace import TraceSettings, make_trace
from cmjax.checkpoint import ModelFormats
from cmjax.cli.flags import Given, options_for
from cmjax.cli.options import HELDOUT, find_model, json_option, model_option
from cmjax.cli.running import DEFAULT_MODEL_LEN, find_tokenizer, serving_options, start_engine
from cmjax.cli.tables import print_report
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout
from cmjax.serve import EngineSettings


@click.command(
    epilog="""\b
    Examples:
      cmjax bench serve --ep 64 --num-prompts 200 --request-rate 10     an engine in this process
      cmjax bench serve --url http://localhost:8000 --num-prompts 100   any server with OpenAI's API
      cmjax bench serve --trace requests.jsonl --slo ttft:2000 --slo tpot:100 --plot load.png
      cmjax bench serve --compare --num-prompts 1000                    engine, HTTP whole, HTTP streaming"""
)
@options_for("client", ClientSettings)
@options_for("trace", TraceSettings)
@options_for("wanted", FigureSettings)
@click.option("--plot", "picture", type=click.Path(), help="Draw the load to this file; needs cmjax[plot].")
@model_option
@options_for("layout", InstanceLayout)
@options_for("formats", ModelFormats)
@serving_options
@json_option
def serve(
    folder: str,
    client: ClientSettings,
    trace: TraceSettings,
    wanted: FigureSettings,
    picture: str | None,
    layout: InstanceLayout,
    formats: ModelFormats,
    engine: Given[EngineSettings],
    as_json: bool,
) -> None:
    """Time to first token, time per output token, throughput and goodput of an engine or a server under a trace."""
    path = find_model(folder)
    tokenizer = find_tokenizer(path)
    if client.url:
        if tokenizer is None:
            raise UserError("--url: --model must have a tokenizer, which says what ids there are")
        longest = engine.get("max_model_len") or DEFAULT_MODEL_LEN
        requests = make_trace(trace, tokenizer, HELDOUT, vocab_size=tokenizer.vocab_size, max_model_len=longest)
        load = serving.Load(requests, client, wanted)
        with _bar(len(requests)) as on_progress:
            results, records = serving.run_on_url(load, on_progress)
    else:
        started = start_engine(path, layout, formats, engine)
        try:
            longest, vocab_size = started.settings.max_model_len, started.model.config.vocab_size
            requests = make_trace(trace, tokenizer, HELDOUT, vocab_size=vocab_size, max_model_len=longest)
            load = serving.Load(requests, client, wanted)
            with _bar(len(requests)) as on_progress:
                results, records = serving.run_on_engine(started, load, on_progress)
            if client.compare:
                results |= serving.run_over_http(started, path, tokenizer, load)
        finally:
            started.shutdown(timeout=0)
    if picture:
        serving.plot(records, picture)
    report = serving.make_report(results, load)
    print_report(report, serving.tables(report, wanted.each_percentile), as_json)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A callback for each request that has ended, which draws a bar on a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("requests", total=total)
        yield lambda _: bars.advance(task)

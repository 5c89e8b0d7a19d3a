"""`cmjax bench serve`: a request trace against an engine or a server."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from cmjax.bench import serving
from cmjax.bench.figures import FigureSettings
from cmjax.bench.load import ClientSettings
from cmjax.bench.trace import SAMPLED, TraceSettings, make_trace
from cmjax.checkpoint import ModelFormats
from cmjax.cli.flags import Given, given_options_for, options_for
from cmjax.cli.options import HELDOUT, find_model, json_option, model_option
from cmjax.cli.progress import shown_progress
from cmjax.cli.running import DEFAULT_MODEL_LEN, find_tokenizer, serving_options, start_engine
from cmjax.cli.tables import print_report
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout
from cmjax.serve import EngineSettings, SamplingParams

# A request says what is given here, and nothing else. The command's `--seed` is the trace's.
_SENT = [name for name in SAMPLED if name != "seed"]


@click.command(
    epilog="""\b
    Examples:
      cmjax bench serve --ep 64 --num-prompts 200 --request-rate 10     an engine in this process
      cmjax bench serve --url http://localhost:8000 --num-prompts 100   any server with OpenAI's API
      cmjax bench serve --trace requests.jsonl --slo ttft:2000 --slo tpot:100 --plot load.png
      cmjax bench serve --url http://localhost:8000 --temperature 0 --max-concurrency 8
      cmjax bench serve --url http://localhost:8000 --large-bodies 4    what others see of bodies of 15 MB
      cmjax bench serve --compare --num-prompts 1000                    engine, HTTP whole, HTTP streaming
    \b
    Sampling is sent as given: without --temperature and the like a request says nothing, as most clients do, and the
    API's defaults hold: temperature 1. The end of a text is ignored, so that all generate as much as they ask for."""
)
@options_for("client", ClientSettings)
@options_for("trace", TraceSettings)
@given_options_for("sampling", SamplingParams, dict.fromkeys(_SENT, "not sent"), only=_SENT)
@options_for("wanted", FigureSettings)
@model_option
@options_for("layout", InstanceLayout)
@options_for("formats", ModelFormats)
@serving_options
@json_option
def serve(
    folder: str,
    client: ClientSettings,
    trace: TraceSettings,
    sampling: Given[SamplingParams],
    wanted: FigureSettings,
    layout: InstanceLayout,
    formats: ModelFormats,
    engine: Given[EngineSettings],
    as_json: bool,
) -> None:
    """Time to first token, time per output token, throughput and goodput of an engine or a server under a trace."""
    path = find_model(folder)
    tokenizer = find_tokenizer(path)

    def load(vocab_size: int, longest: int) -> serving.Load:
        sizes = {"vocab_size": vocab_size, "max_model_len": longest}
        return serving.Load(make_trace(trace, tokenizer, HELDOUT, sampling=sampling.values, **sizes), client, wanted)

    if client.url:
        if tokenizer is None:
            raise UserError("--url: --model must have a tokenizer, which says what ids there are")
        sent = load(tokenizer.vocab_size, engine.get("max_model_len") or DEFAULT_MODEL_LEN)
        with each_done("requests", len(sent.trace)) as on_progress:
            results, records = serving.run_on_url(sent, on_progress)
    else:
        started = start_engine(path, layout, formats, engine)
        try:
            sent = load(started.model.config.vocab_size, started.settings.max_model_len)
            with each_done("requests", len(sent.trace)) as on_progress:
                results, records = serving.run_on_engine(started, sent, on_progress)
            if client.compare:
                results |= serving.run_over_http(started, path, tokenizer, sent)
        finally:
            started.shutdown(timeout=0)
    if wanted.plot:
        serving.plot(records, wanted.plot)
    report = serving.make_report(results, sent)
    print_report(report, serving.tables(report, wanted.each_percentile), as_json)


@contextmanager
def each_done(unit: str, total: int) -> Iterator[Callable[[], None]]:
    """A callback for each of so many things that has been done, which shows how far the command is."""
    with shown_progress(unit) as show:
        done = itertools.count(1)
        yield lambda: show("sending", next(done), total)

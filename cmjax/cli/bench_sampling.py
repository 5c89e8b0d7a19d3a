"""`cmjax bench sampling`: kinds of requests beside greedy ones, on an engine or a server."""

import asyncio
from collections.abc import Callable

import click
import numpy as np

from cmjax.bench import sampling
from cmjax.bench.load import ClientSettings, EngineTarget, UrlTarget
from cmjax.bench.sampling import KINDS, SamplingBenchSettings
from cmjax.bench.trace import Prompts
from cmjax.checkpoint import ModelFormats
from cmjax.cli.bench_serve import each_done
from cmjax.cli.flags import Given, options_for
from cmjax.cli.options import HELDOUT, find_model, json_option, model_option
from cmjax.cli.running import find_tokenizer, serving_options, start_engine
from cmjax.cli.tables import print_report
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout
from cmjax.serve import EngineSettings


@click.command(
    "sampling",
    epilog="""\b
    Examples:
      cmjax bench sampling --ep 8                            an engine in this process
      cmjax bench sampling --url http://localhost:8000       any server with OpenAI's API
      cmjax bench sampling --ep 8 --concurrency 1,4,16 --input-len 500 --json""",
)
@options_for("client", ClientSettings, only=("url", "api_key", "model"))
@options_for("settings", SamplingBenchSettings)
@model_option
@options_for("layout", InstanceLayout)
@options_for("formats", ModelFormats)
@serving_options
@json_option
def bench_sampling(
    folder: str,
    client: ClientSettings,
    settings: SamplingBenchSettings,
    layout: InstanceLayout,
    formats: ModelFormats,
    engine: Given[EngineSettings],
    as_json: bool,
) -> None:
    """Time to first token and per output token of sampled requests, with penalties and log probabilities, beside greedy
    ones, in turn in one run."""
    path = find_model(folder)
    tokenizer = find_tokenizer(path)
    rng, total = (
        np.random.default_rng(settings.seed),
        (settings.rounds + 1) * len(settings.each_concurrency) * len(KINDS),
    )
    if client.url:
        if tokenizer is None:
            raise UserError("--url: --model must have a tokenizer, which says what ids there are")
        prompts = Prompts(rng, tokenizer.vocab_size, tokenizer, HELDOUT)

        async def on_url(on_progress: Callable[[], None]) -> list[sampling.Sample]:
            async with UrlTarget.of(client) as target:
                return await sampling.measure(settings, prompts, target, on_progress)

        with each_done("turns", total) as on_progress:
            samples = asyncio.run(on_url(on_progress))
    else:
        started = start_engine(path, layout, formats, engine)
        try:
            prompts = Prompts(rng, started.model.config.vocab_size, tokenizer, HELDOUT)
            with each_done("turns", total) as on_progress:
                samples = asyncio.run(sampling.measure(settings, prompts, EngineTarget(started), on_progress))
        finally:
            started.shutdown(timeout=0)
    report = sampling.make_report(settings, samples)
    print_report(report, sampling.tables(report), as_json)

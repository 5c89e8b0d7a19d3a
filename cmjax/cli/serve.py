"""`cmjax serve`: the engine behind an OpenAI-compatible API."""

import dataclasses
import os

import click

from cmjax.checkpoint import GenerationConfig, ModelFormats
from cmjax.cli.flags import Given, given_options_for, options_for
from cmjax.cli.options import config_option, find_model, model_option
from cmjax.cli.running import find_tokenizer, serving_options, start_engine
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout
from cmjax.serve import Bounds, EngineSettings, RatioPolicy
from cmjax.serve.settings import ListenSettings, ServerSettings

EXIT_CUT = 3  # answers were not finished


@click.command(
    epilog="""\b
    Examples:
      cmjax serve                                    the demonstration model at EP320, on port 8000
      cmjax serve --model DIR --ep 64 --mtp 1 --api-key SECRET
      cmjax serve --config serve.yaml --port 9000
    \b
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "import os"}'"""
)
@model_option
@config_option
@options_for("listen", ListenSettings)
@given_options_for("server", ServerSettings)
@click.option("--chat-template", help="Jinja file or text.  [default: the model's own]")
@click.option("--max-prefill-instances", type=click.IntRange(min=1), help="Let their number follow the load up to it.")
@options_for("layout", InstanceLayout)
@options_for("formats", ModelFormats)
@serving_options
def serve(
    folder: str,
    listen: ListenSettings,
    server: Given[ServerSettings],
    chat_template: str | None,
    max_prefill_instances: int | None,
    layout: InstanceLayout,
    formats: ModelFormats,
    engine: Given[EngineSettings],
) -> int:
    """Serve a model over HTTP, with OpenAI's API; the status page is at /, metrics at /metrics.

    SIGTERM or Ctrl-C: what runs is finished, new requests get a 503, and the exit status is 0; it is 3 where something
    was cut, after --drain-timeout or by a second signal.
    """
    try:
        from cmjax.api import ChatTemplate
        from cmjax.serve.http import create_app, known_keys, run_server
    except ImportError as error:
        raise UserError(f"cmjax serve needs pip install 'cmjax[serve]' ({error})") from error

    path = find_model(folder)
    tokenizer = find_tokenizer(path)
    template = None if tokenizer is None else ChatTemplate.find(path, tokenizer, chat_template)
    settings = server.make(model_name=path.resolve().name)
    keys = known_keys(settings, os.environ)
    generation = GenerationConfig.find(path, settings.generation_config)
    started = start_engine(path, layout, formats, engine)
    pools = started.pools
    if max_prefill_instances is not None:
        prefill = Bounds(len(pools.prefill), max_prefill_instances)
        decode = Bounds(len(pools.decode), len(pools.decode))
        started.follow_load(RatioPolicy({"prefill": prefill, "decode": decode}))
    try:
        app = create_app(started, dataclasses.replace(settings, api_keys=keys), tokenizer, template, generation)
        drain = run_server(
            app, listen, lambda address: click.echo(f"serving {settings.model_name} on {address}", err=True)
        )
    finally:
        started.shutdown(timeout=0)
    if drain.num_cut:
        noun = "request was" if drain.num_cut == 1 else "requests were"
        click.echo(f"cmjax: {drain.num_cut} {noun} cut: not finished within {drain.seconds:.1f} s", err=True)
        return EXIT_CUT
    return 0

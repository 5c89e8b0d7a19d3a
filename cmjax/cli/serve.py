"""`cmjax serve`: the engine behind an OpenAI-compatible API."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from cmjax.checkpoint import GenerationConfig, ModelFormats
from cmjax.cli.flags import Given, given_options_for, options_for
from cmjax.cli.options import config_option, find_model, model_option
from cmjax.cli.running import ease_collector, find_tokenizer, serving_options, start_engine, tell_start
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout, Pools
from cmjax.serve import Bounds, Engine, EngineSettings, RatioPolicy, StartProgress
from cmjax.serve.caching import CacheSettings
from cmjax.serve.settings import ListenSettings, ServerSettings

if TYPE_CHECKING:
    from cmjax.serve.http import WaitingRoom

EXIT_CUT = 3  # answers were not finished
_END_S = 2.0  # for the engine's threads to end


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
@options_for("cache", CacheSettings)
@options_for("layout", InstanceLayout)
@options_for("formats", ModelFormats)
@serving_options
def serve(
    folder: str,
    listen: ListenSettings,
    server: Given[ServerSettings],
    chat_template: str | None,
    max_prefill_instances: int | None,
    cache: CacheSettings,
    layout: InstanceLayout,
    formats: ModelFormats,
    engine: Given[EngineSettings],
) -> int:
    """Serve a model over HTTP, with OpenAI's API; the status page is at /, metrics at /metrics.

    SIGTERM or Ctrl-C: what runs is finished, new requests get a 503, and the exit status is 0; it is 3 where something
    was cut, after --drain-timeout or by a second signal. The port answers from the beginning: with 503 until the first
    request can be served, before most steps are compiled.
    """
    try:
        from cmjax.api import ChatTemplate
        from cmjax.serve.http import create_app, known_keys, run_server, waiting_room
    except ImportError as error:
        raise UserError(f"cmjax serve needs pip install 'cmjax[serve]' ({error})") from error

    path = find_model(folder)
    tokenizer = find_tokenizer(path)
    cache = cache.for_model(thinks=tokenizer is not None and tokenizer.thinks)
    template = None if tokenizer is None else ChatTemplate.find(path, tokenizer, chat_template)
    settings = server.make(model_name=path.resolve().name)
    keys = known_keys(settings, os.environ)
    settings = dataclasses.replace(settings, api_keys=keys, share_prefix_cache=cache.share)
    generation = GenerationConfig.find(path, settings.generation_config)

    def start(room: "WaitingRoom") -> Engine:
        def tell(progress: StartProgress) -> None:
            room.tell(progress)
            tell_start(progress)

        started = start_engine(path, layout, formats, engine, tell, wait=False, cache=cache)
        if max_prefill_instances is not None:
            started.follow_load(_ratio(started.pools, max_prefill_instances))
        return started

    with _ending_at_once(), waiting_room(listen) as room:
        started = start(room)
        try:
            app = create_app(started, settings, tokenizer, template, generation)
            ease_collector()  # the app, too, lives as long as the process
            room.close()
            name = settings.model_name
            drain = run_server(app, listen, lambda at: click.echo(f"serving {name} on {at}", err=True), room.socket)
        finally:
            ending = threading.Thread(target=started.shutdown, args=(0,), daemon=True)
            ending.start()
            ending.join(_END_S)
    if drain.num_cut:
        noun = "request was" if drain.num_cut == 1 else "requests were"
        click.echo(f"cmjax: {drain.num_cut} {noun} cut: not finished within {drain.seconds:.1f} s", err=True)
    status = EXIT_CUT if drain.num_cut else 0
    if ending.is_alive():
        _leave(status)
    return status


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """What comes up ends at once when it is told to, with status 0 after SIGTERM, 130 after Ctrl-C."""

    def end(*_: object) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as told:
        _leave(130 if isinstance(told, KeyboardInterrupt) else int(told.code or 0))
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(status: int) -> None:
    """End the process without its threads: a step that is being compiled cannot be interrupted, and takes as long as
    half a minute."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _ratio(pools: Pools, max_prefill_instances: int) -> RatioPolicy:
    """Prefill instances follow the load, decode instances stay."""
    prefill, decode = len(pools.prefill), len(pools.decode)
    return RatioPolicy({"prefill": Bounds(prefill, max_prefill_instances), "decode": Bounds(decode, decode)})

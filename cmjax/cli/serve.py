"""`cmjax serve`: the engine behind an OpenAI-compatible API."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmjax.cli.options import engine_options, find_model, instance_options, model_option
from cmjax.cli.running import carve_from, ease_collector, find_tokenizer, load_from, memory_errors
from cmjax.errors import UserError

if TYPE_CHECKING:
    from cmjax.model import ModelConfig
    from cmjax.serve import EngineSettings

DEFAULT_SEQS_PER_RANK = 8
DEFAULT_MODEL_LEN = 2048


def read_config(context: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Take defaults from a YAML file: an option's name, with - or _, and its value; the command line comes first."""
    if path is None:
        return None
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"--config needs pip install 'cmjax[serve]' ({error})") from error
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: must hold names of options and their values")
    names = {
        option.removeprefix("--"): parameter
        for parameter in context.command.params
        for option in parameter.opts
        if option.startswith("--") and option not in ("--config", "--help")
    }
    defaults: dict[str, Any] = {}
    for key, value in given.items():
        parameter = names.get(str(key).replace("_", "-"))
        if parameter is None or parameter.name is None:
            raise UserError(f"{path}: there is no option {key!r}; see cmjax serve --help")
        if parameter.multiple and isinstance(value, str):
            value = [value]
        defaults[parameter.name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


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
@click.option("--config", callback=read_config, is_eager=True, expose_value=False, help="YAML of options and values.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--uds", help="Listen on this Unix socket instead.")
@click.option("--api-key", "api_keys", multiple=True, help="Ask for it; several: a tenant each, served in turns.")
@click.option("--served-model-name", help="What clients call the model.  [default: the folder's name]")
@click.option("--chat-template", help="Jinja file or text.  [default: the model's own]")
@click.option("--tpot-slo-ms", type=float, help="Run as many sequences together as keep to it, in milliseconds.")
@click.option("--num-kv-blocks", type=click.IntRange(min=1), help="Cache blocks of a decode rank.  [default: for all]")
@click.option("--max-prefill-instances", type=click.IntRange(min=1), help="Let their number follow the load up to it.")
@click.option("--max-body-mb", type=float, default=16.0, show_default=True, help="Largest request body.")
@click.option(
    "--max-concurrent-requests", type=click.IntRange(min=1), default=10_000, show_default=True, help="More get a 429."
)
@click.option(
    "--min-priority", type=int, default=0, show_default=True, help="Most urgent priority a client may ask for."
)
@click.option("--metrics-prefix", default="vllm:", show_default=True, help="Of the Prometheus names.")
@click.option("--drain-timeout", type=float, default=30.0, show_default=True, help="Seconds for what runs at the end.")
@click.option(
    "--log-level",
    type=click.Choice(("critical", "error", "warning", "info", "debug")),
    default="warning",
    show_default=True,
    help="Of the server; debug logs every request.",
)
@instance_options
@engine_options
def serve(folder: str, **options: Any) -> None:
    """Serve a model over HTTP, with OpenAI's API; the status page is at /, metrics at /metrics."""
    try:
        from cmjax.serve.http import ServerSettings, create_app, run_server
        from cmjax.serve.http.template import ChatTemplate
    except ImportError as error:
        raise UserError(f"cmjax serve needs pip install 'cmjax[serve]' ({error})") from error
    from cmjax.serve import Bounds, Engine, RatioPolicy

    path = find_model(folder)
    tokenizer = find_tokenizer(path)
    template = None if tokenizer is None else ChatTemplate.find(path, tokenizer, options["chat_template"])
    pools = carve_from(options)
    model = load_from(path, options, options["max_num_seqs"] or DEFAULT_SEQS_PER_RANK)
    settings = serving_settings(options, model.config)
    server = ServerSettings(
        model_name=options["served_model_name"] or path.resolve().name,
        api_keys=tuple(options["api_keys"]),
        max_body_bytes=int(options["max_body_mb"] * 1e6),
        max_concurrent_requests=options["max_concurrent_requests"],
        metrics_prefix=options["metrics_prefix"],
        min_priority=options["min_priority"],
    )
    with memory_errors(settings):
        engine = Engine(model, pools, settings=settings)
        engine.start(lambda what: click.echo(f"compiling {what}", err=True))
    ease_collector()
    if options["max_prefill_instances"] is not None:
        prefill = Bounds(len(pools.prefill), options["max_prefill_instances"])
        decode = Bounds(len(pools.decode), len(pools.decode))
        engine.follow_load(RatioPolicy({"prefill": prefill, "decode": decode}))
    app = create_app(engine, server, tokenizer, template)
    try:
        run_server(
            app,
            host=options["host"],
            port=options["port"],
            uds=options["uds"],
            drain_timeout_s=options["drain_timeout"],
            log_level=options["log_level"],
            on_ready=lambda address: click.echo(f"serving {server.model_name} on {address}", err=True),
        )
    finally:
        engine.shutdown(timeout=0)


def serving_settings(options: dict[str, Any], config: "ModelConfig") -> "EngineSettings":
    """What the options say; a server's sizes do not follow from prompts."""
    from cmjax.serve import EngineSettings

    longest = min(DEFAULT_MODEL_LEN, config.max_position_embeddings)
    return EngineSettings(
        max_model_len=options["max_model_len"] or longest,
        max_num_seqs_per_rank=options["max_num_seqs"] or DEFAULT_SEQS_PER_RANK,
        block_size=options["block_size"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        steps_per_call=options["steps_per_call"],
        num_speculative_tokens=options["mtp"],
        microbatches="auto" if options["microbatches"] == "auto" else int(options["microbatches"]),
        dispatch_dtype=options["dispatch_dtype"],
        combine_dtype=options["combine_dtype"],
        num_redundant_experts=options["redundant_experts"],
        num_shared_replicas=options["shared_replicas"],
        num_kv_blocks=options["num_kv_blocks"],
        tpot_slo_ms=options["tpot_slo_ms"],
    )

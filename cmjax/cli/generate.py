"""`cmjax generate`: prompts in, their continuations out, over prefill and decode instances."""

import json
import sys
import time

import click
from rich.console import Console

from cmjax.checkpoint import ModelFormats
from cmjax.cli.flags import Given, TokenIds, options_for
from cmjax.cli.options import find_model, json_option, model_option
from cmjax.cli.report import run_report
from cmjax.cli.running import (
    carve,
    find_tokenizer,
    load_in,
    memory_errors,
    progress_bar,
    prompt_sized,
    prompt_sized_options,
    seqs_per_rank,
)
from cmjax.cli.tables import outputs_table, placement_table, result_tables
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout, fabric
from cmjax.serve import Engine, EngineSettings, SamplingParams


@click.command(
    epilog="""\b
    Examples:
      cmjax generate --prompt "def mean(values):" --max-tokens 32 --ep 8
      cmjax generate --model DIR --prompt-ids 1,2,3 --prompt-ids 7,8 --ep 64 --json
      cmjax generate --model DIR --prompt-ids 1,2,3 --dispatch-dtype int8 --stop-token-ids 257
    \b
    The best token is taken unless --temperature is given. The model's own eos_token_id ends nothing unless
    --stop-token-ids names it."""
)
@model_option
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; give it several times.")
@click.option(
    "--prompt-ids", "ids", type=TokenIds(), multiple=True, help="One of token ids; those of --prompt come before it."
)
@options_for("sampling", SamplingParams)
@options_for("layout", InstanceLayout)
@options_for("formats", ModelFormats)
@prompt_sized_options
@json_option
def generate(
    folder: str,
    texts: tuple[str, ...],
    ids: tuple[tuple[int, ...], ...],
    sampling: SamplingParams,
    layout: InstanceLayout,
    formats: ModelFormats,
    engine: Given[EngineSettings],
    as_json: bool,
) -> None:
    """Continue prompts, through prefill instances and an expert-parallel decode instance."""
    begin = time.perf_counter()
    if not texts and not ids:
        raise UserError("no prompt: give --prompt TEXT or --prompt-ids 1,2,3")
    path = find_model(folder)
    tokenizer = find_tokenizer(path, must_exist=bool(texts))
    prompts = [*map(tokenizer.encode, texts), *ids] if tokenizer else ids
    pools = carve(layout)
    model = load_in(path, formats, seqs_per_rank(engine, len(prompts), pools))
    settings = prompt_sized(engine, model.config, prompts, sampling.max_tokens, pools)
    load_s = time.perf_counter() - begin
    with memory_errors(settings), progress_bar(Console(stderr=True)) as progress:
        running = Engine(model, pools, settings=settings)
        result = running.generate(prompts, sampling, progress=progress)
    report = run_report(running, result, fabric.traffic.snapshot(), tokenizer)
    report["timings"] |= {"load_s": load_s, "total_s": time.perf_counter() - begin}
    if as_json:
        click.echo(json.dumps(report))
        return
    console = Console(file=sys.stdout)
    for table in (placement_table(report), outputs_table(report["outputs"]), *result_tables(report)):
        console.print(table)

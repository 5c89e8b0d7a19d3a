"""`cmjax generate`: prompts in, their continuations out, over prefill and decode instances."""

import json
import sys
import time
from collections.abc import Sequence

import click
from rich.console import Console

from cmjax.checkpoint import ModelFormats
from cmjax.cli.flags import Given, TokenIds, options_for
from cmjax.cli.options import find_model, json_option, model_option
from cmjax.cli.report import run_report
from cmjax.cli.running import (
    carve,
    find_tokenizer,
    generation_progress,
    load_in,
    memory_errors,
    prompt_sized,
    prompt_sized_options,
    seqs_per_rank,
)
from cmjax.cli.tables import outputs_table, placement_table, print_tables, readable, result_tables
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout, fabric
from cmjax.serve import Engine, EngineSettings, SamplingParams
from cmjax.text import JsonObject


@click.command(
    epilog="""\b
    Examples:
      cmjax generate --prompt "def mean(values):" --max-tokens 32 --ep 8
      cmjax generate --model DIR --prompt-ids 1,2,3 --prompt-ids 7,8 --ep 64 --json
      cmjax generate --model DIR --prompt-ids 1,2,3 --dispatch-dtype int8 --stop-token-ids 257
      cmjax generate --prompt "import os" --stats
    \b
    Standard output has each prompt and what follows it: as text, or as token ids where the model has no tokenizer.
    How it went is said on standard error.
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
@click.option("--stats", is_flag=True, help="Then tables: tokens, phases, experts, and what travelled.")
@json_option
def generate(
    folder: str,
    texts: tuple[str, ...],
    ids: tuple[tuple[int, ...], ...],
    sampling: SamplingParams,
    layout: InstanceLayout,
    formats: ModelFormats,
    engine: Given[EngineSettings],
    stats: bool,
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
    with memory_errors(settings), generation_progress() as progress:
        running = Engine(model, pools, settings=settings)
        result = running.generate(prompts, sampling, progress=progress)
    report = run_report(running, result, fabric.traffic.snapshot(), tokenizer)
    report["timings"] |= {"load_s": load_s, "total_s": time.perf_counter() - begin}
    if as_json:
        click.echo(json.dumps(report))
        return
    console = Console(file=sys.stdout)
    _print_outputs(console, report["outputs"])
    click.echo(_summary(report), err=True)
    if stats:
        tables = (outputs_table(report["outputs"]), placement_table(report), *result_tables(report))
        print_tables(console, tables)


def _print_outputs(console: Console, outputs: Sequence[JsonObject]) -> None:
    """Each prompt and its continuation, to a terminal with the two told apart and nothing that would control it; of
    several, each has a heading, as `head` gives files."""
    for index, output in enumerate(outputs):
        if index:
            click.echo()
        if len(outputs) > 1:
            click.echo(f"==> prompt {index + 1} of {len(outputs)} <==")
        if "text" in output:
            parts = [output["prompt"], output["text"]]
        else:
            parts = [",".join(map(str, output[name])) for name in ("prompt_ids", "token_ids")]
            parts.insert(1, " -> ")
        if console.is_terminal:
            *before, after = map(readable, parts)
            after.stylize("bold green")
            console.print(*before, after, sep="", soft_wrap=True)
        else:
            click.echo("".join(parts))


def _summary(report: JsonObject) -> str:
    outputs, seconds = report["outputs"], report["timings"]
    num_tokens = sum(len(output["token_ids"]) for output in outputs)
    reasons = ", ".join(sorted({output["finish_reason"] for output in outputs}))
    load_s, compile_s = seconds["load_s"], seconds["compile_s"]
    return (
        f"{num_tokens:,} tokens (ended by {reasons}) in {seconds['total_s'] - load_s - compile_s:.1f} s, after "
        f"{load_s:.1f} s of loading and {compile_s:.1f} s of compiling"
    )

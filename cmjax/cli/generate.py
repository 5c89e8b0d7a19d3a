"""`cmjax generate`: prompts in, greedy continuations out, over prefill and decode instances."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cmjax.cli.options import engine_options, find_model, instance_options, json_option, model_option, sampling_options
from cmjax.cli.running import (
    carve_from,
    find_tokenizer,
    load_from,
    memory_errors,
    progress_bar,
    seqs_per_rank,
    settings_from,
)
from cmjax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from cmjax.checkpoint import Tokenizer
    from cmjax.mesh.fabric import TrafficSnapshot
    from cmjax.model import ModelConfig
    from cmjax.serve import Engine, GenerateResult

MAX_TOKEN_ID = 2**31 - 1
IDS_SHOWN = 12
CHARACTERS_SHOWN = 400


class TokenIds(click.ParamType):
    """Token ids with commas between them: `1,2,3`."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        ids = []
        for word in str(value).split(","):
            try:
                ids.append(int(word))
            except ValueError:
                self.fail(f"{word.strip()!r} in {value!r} is not a token id; give integers such as 1,2,3", param, ctx)
            if abs(ids[-1]) > MAX_TOKEN_ID:
                self.fail(f"token id {ids[-1]} is outside every vocabulary", param, ctx)
        return tuple(ids)


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
@click.option("--max-tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens to generate.")
@click.option("--stop-token-ids", type=TokenIds(), default=(), help="A generated token among these ends the request.")
@sampling_options
@instance_options
@engine_options
@json_option
def generate(
    folder: str,
    texts: tuple[str, ...],
    ids: tuple[tuple[int, ...], ...],
    max_tokens: int,
    stop_token_ids: tuple[int, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Continue prompts, through prefill instances and an expert-parallel decode instance."""
    begin = time.perf_counter()
    if not texts and not ids:
        raise UserError("no prompt: give --prompt TEXT or --prompt-ids 1,2,3")
    from rich.console import Console

    from cmjax.mesh import fabric
    from cmjax.serve import Engine, SamplingParams

    chosen = {field.name: options[field.name] for field in dataclasses.fields(SamplingParams) if field.name in options}
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids, **chosen)
    path = find_model(folder)
    tokenizer = find_tokenizer(path, must_exist=bool(texts))
    prompts = [*map(tokenizer.encode, texts), *ids] if tokenizer else ids
    pools = carve_from(options)
    model = load_from(path, options, seqs_per_rank(options, len(prompts), pools))
    settings = settings_from(options, model.config, prompts, max_tokens, pools)
    load_s = time.perf_counter() - begin
    with memory_errors(settings), progress_bar(Console(stderr=True)) as progress:
        engine = Engine(model, pools, settings=settings)
        result = engine.generate(prompts, sampling, progress=progress)
    report = collect(engine, result, fabric.traffic.snapshot(), tokenizer)
    report["timings"] |= {"load_s": load_s, "total_s": time.perf_counter() - begin}
    if as_json:
        click.echo(json.dumps(report))
    else:
        show(report)


# -- the report -------------------------------------------------------------------------------------------------------


def collect(
    engine: "Engine", result: "GenerateResult", traffic: "TrafficSnapshot", tokenizer: "Tokenizer | None"
) -> dict[str, Any]:
    """All that `cmjax generate` says, as JSON-ready values; outputs have text where there is a tokenizer."""
    from cmjax.cli.info import collect as collect_info

    machine = collect_info(engine.pools)
    instances = zip(machine["instances"], (*engine.prefill, *engine.fleet.decode.values()), strict=True)
    config = engine.model.config
    settings = dataclasses.asdict(engine.settings)
    settings["exchange"] = engine.settings.exchange.__name__
    # What was not asked for (log probabilities) is not there.
    outputs = [{k: v for k, v in dataclasses.asdict(output).items() if v is not None} for output in result.outputs]
    if tokenizer is not None:
        for output in outputs:
            output |= {"prompt": tokenizer.decode(output["prompt_ids"]), "text": tokenizer.decode(output["token_ids"])}
    return {
        "outputs": outputs,
        "timings": timings(result),
        "kept_drafts": result.kept_drafts.tolist(),
        "traffic": traffic_by_plane(traffic),
        "expert_load": {
            "prefill": load_by_layer(config, result.prefill_load),
            "decode": load_by_layer(config, result.decode_load),
        },
        "instances": [described | {"placement": placement(one)} for described, one in instances],
        "settings": settings,
        **{name: machine[name] for name in ("versions", "devices", "supernode", "planes", "collectives")},
        "prefill_shares_decode_devices": machine["prefill_shares_decode_devices"],
    }


def timings(result: "GenerateResult") -> dict[str, float]:
    """Seconds, counts and rates of a generation."""
    rates = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return dataclasses.asdict(result.timings) | {name: getattr(result.timings, name) for name in rates}


def traffic_by_plane(traffic: "TrafficSnapshot") -> dict[str, dict[str, dict[str, int]]]:
    """Calls and bytes of each collective on each plane; `bytes` left their device, `local_bytes` did not."""
    planes: dict[str, dict[str, dict[str, int]]] = {}
    for entry in traffic.entries:
        counts = {"calls": entry.calls, "bytes": entry.wire_bytes, "local_bytes": entry.local_bytes}
        planes.setdefault(entry.plane, {})[entry.collective] = counts
    return planes


def load_by_layer(config: "ModelConfig", load: Any) -> dict[str, list[int]]:
    """Rows by routed expert for each MoE layer; the MTP module's layer is "mtp"."""
    from cmjax.model import placed_layer_names

    names = placed_layer_names(config)
    return {name: row.tolist() for name, row in zip(names, load, strict=True)}


def placement(instance: Any) -> dict[str, int] | None:
    """The counts of an instance's expert placement, None for a model without experts."""
    placed = instance.placement
    if placed is None:
        return None
    counts = ("num_routed_experts", "num_redundant_experts", "num_shared_replicas", "num_experts_per_rank")
    return {name: getattr(placed, name) for name in counts}


# -- tables -----------------------------------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    for table in (placement_table(report), outputs_table(report["outputs"]), *result_tables(report)):
        console.print(table)


def result_tables(report: dict[str, Any]) -> "tuple[Table, ...]":
    """How fast it was, what travelled, and how evenly the experts were used."""
    return (
        timings_table(report["timings"], report["kept_drafts"]),
        traffic_table(report["traffic"]),
        load_table(report["expert_load"]),
    )


def new_table(title: str, *columns: str, numbers_from: int | None = None) -> "Table":
    """An empty table; columns from `numbers_from` on are aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        is_number = numbers_from is not None and index >= numbers_from
        table.add_column(column, overflow="fold", justify="right" if is_number else "left")
    return table


def placement_table(report: dict[str, Any]) -> "Table":
    """How many copies of the experts each instance holds."""
    columns = ("instance", "EP", "routed", "redundant", "shared replicas", "experts a rank")
    table = new_table("Expert placement", *columns, numbers_from=1)
    for one in report["instances"]:
        counts = ["-"] * 4 if one["placement"] is None else [str(count) for count in one["placement"].values()]
        if counts[2] == "0":
            counts[2] = "on every rank"
        table.add_row(one["name"], str(one["ep_size"]), *counts)
    return table


def outputs_table(outputs: Sequence[dict[str, Any]], max_outputs: int | None = None) -> "Table":
    """Prompts and what follows them, as text where there is text; at most `max_outputs` of them."""
    from rich.text import Text

    has_text = any("text" in output for output in outputs)
    table = new_table("Generated", "prompt", "tokens", "continuation" if has_text else "token ids", "ended by")
    for output in outputs[:max_outputs]:
        if has_text:
            before, after = readable(output["prompt"], CHARACTERS_SHOWN), readable(output["text"])
        else:
            before = Text(_shortened(output["prompt_ids"]))
            after = Text(" ".join(str(token) for token in output["token_ids"]))
        # Text of several lines needs a gap below it.
        table.add_row(before, str(len(output["token_ids"])), after, output["finish_reason"], end_section=has_text)
    if max_outputs is not None and len(outputs) > max_outputs:
        table.caption = f"and {len(outputs) - max_outputs} more"
    return table


def readable(text: str, max_characters: int | None = None) -> "Text":
    """Text for the terminal as it is: no markup, and what would control the terminal as an escape sequence.

    Of a text longer than `max_characters`, its end.
    """
    from rich.text import Text

    if max_characters is not None and len(text) > max_characters:
        text = f"... {text[-max_characters:]}"
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return Text("".join(shown))


def _shortened(ids: Sequence[int]) -> str:
    shown = " ".join(str(token) for token in ids[:IDS_SHOWN])
    return shown if len(ids) <= IDS_SHOWN else f"{shown} ... ({len(ids)})"


def timings_table(seconds: dict[str, float], kept_drafts: list[int]) -> "Table":
    """Each phase with its tokens and rate, and how many drafts the steps kept."""
    table = new_table("Phases", "phase", "seconds", "tokens", "tokens/s", numbers_from=1)
    for name, phase in (("load_s", "load"), ("compile_s", "compile, run once on padding")):
        if name in seconds:
            table.add_row(phase, f"{seconds[name]:.2f}", "", "")
    for phase in ("prefill", "decode"):
        if phase == "decode":
            table.add_row("hand-off of the KV", f"{seconds['handoff_s']:.2f}", "", "")
        tokens, rate = seconds[f"{phase}_tokens"], seconds[f"{phase}_tokens_per_s"]
        table.add_row(phase, f"{seconds[f'{phase}_s']:.2f}", f"{tokens:,}", f"{rate:,.0f}")
    offered = (len(kept_drafts) - 1) * sum(kept_drafts)
    if offered:
        kept = sum(index * count for index, count in enumerate(kept_drafts))
        table.caption = f"{kept:,} of {offered:,} drafts of the MTP module were kept ({kept / offered:.0%})"
    return table


def traffic_table(planes: dict[str, dict[str, dict[str, int]]]) -> "Table":
    """Calls and bytes by plane and collective."""
    columns = ("plane", "collective", "calls", "MB between ranks", "MB within a rank")
    table = new_table("Traffic of prefill, hand-off and decode", *columns, numbers_from=2)
    for plane, collectives in planes.items():
        for name, counts in collectives.items():
            sizes = (f"{counts[key] / 1e6:,.2f}" for key in ("bytes", "local_bytes"))
            table.add_row(plane, name, f"{counts['calls']:,}", *sizes)
    if not planes:
        table.caption = "none: a single rank exchanges nothing, and lax collectives are not counted"
    return table


def load_table(expert_load: dict[str, dict[str, list[int]]]) -> "Table":
    """How evenly each MoE layer's rows fell on its routed experts; layers that ran no row are left out."""
    columns = ("phase", "layer", "rows", "mean", "most", "most / mean", "by expert", "idle")
    table = new_table("Load of the routed experts, in token rows", *columns, numbers_from=1)
    for phase, layers in expert_load.items():
        for layer, rows in layers.items():
            total = sum(rows)
            if not total:
                continue
            mean, most = total / len(rows), max(rows)
            cells = (f"{total:,}", f"{mean:.1f}", f"{most:,}", f"{most / mean:.2f}", str(rows.index(most)))
            table.add_row(phase, layer, *cells, str(rows.count(0)))
    return table

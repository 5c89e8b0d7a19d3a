"""`cmjax demo`: the whole way of a batch of prompts through 384 virtual devices, compared with a reference."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from cmjax.bench.reference import Reference, compare, compare_to_one_device
from cmjax.checkpoint import ModelFormats
from cmjax.cli.flags import Given, options_for
from cmjax.cli.options import count_option, find_model, json_option, model_option
from cmjax.cli.report import machine_report, placed_instances, run_report
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
from cmjax.cli.tables import outputs_table, placement_table, print_tables, readable, result_tables, topology_tables
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout, fabric
from cmjax.mesh.fabric import TrafficSnapshot
from cmjax.moe import ExpertPlacement
from cmjax.serve import Engine, EngineSettings, GenerateResult, SamplingParams
from cmjax.text import JsonObject

OUTPUTS_SHOWN = 3
EXIT_DIFFERENT = 1


@click.command(
    epilog="""\b
    Examples:
      cmjax demo                        384 virtual devices: prefill 2 x EP32, decode EP320
      cmjax demo --ep 8 --prompts 16    a small machine
      cmjax demo --json | jq .reference
    \b
    A model given with --model needs a reference.json beside the weights (scripts/make_demo_reference.py).
    A quantized model (--quant int8) is compared with itself on one device instead.
    Ends with status 1 where the tokens are not those that they are compared with."""
)
@model_option
@count_option("--prompts", 320, "How many; beyond those of the reference, they come again.")
@count_option("--max-tokens", 32, "Tokens to generate for each, at most those of the reference.")
@click.option("--out", "out", type=Path, default=Path("out"), show_default=True, help="Folder for the picture.")
@options_for("layout", InstanceLayout)
@options_for("formats", ModelFormats)
@prompt_sized_options
@json_option
@click.pass_context
def demo(
    context: click.Context,
    folder: str,
    prompts: int,
    max_tokens: int,
    out: Path,
    layout: InstanceLayout,
    formats: ModelFormats,
    engine: Given[EngineSettings],
    as_json: bool,
) -> None:
    """Let a small DeepSeek-V3 write Python on a virtual supernode, and compare its tokens with a reference.

    Prompts are prefilled on EP32 instances, their KV is handed over to the decode instance, and EP320 generates.
    """
    begin = time.perf_counter()
    path = find_model(folder)
    reference = Reference.read(path)
    tokenizer = find_tokenizer(path)
    pools = carve(layout)
    model = load_in(path, formats, seqs_per_rank(engine, prompts, pools))
    reference.check_vocabulary(model.config.vocab_size)
    expected = reference.take(prompts, max_tokens)
    prompt_ids = [one.prompt_ids for one in expected]
    sampling = [SamplingParams(max_tokens=len(one.token_ids)) for one in expected]
    settings = prompt_sized(engine, model.config, prompt_ids, max(one.max_tokens for one in sampling), pools)
    load_s = time.perf_counter() - begin
    stdout = Console(file=sys.stdout)
    with memory_errors(settings), generation_progress() as progress:
        running = Engine(model, pools, settings=settings)
        if not as_json:
            _show_machine(running, stdout)
        result = running.generate(prompt_ids, sampling, progress=progress)
    traffic = fabric.traffic.snapshot()
    report = run_report(running, result, traffic, tokenizer)
    generated = [output.token_ids for output in result.outputs]
    if model.quant is None:
        source, unclear = reference.source, "come after a close call"
        comparison = compare(expected, generated)
    else:
        source, unclear = f"the same model in {model.quant} on one device", "are close calls"
        comparison = compare_to_one_device(model, prompt_ids, generated)
    picture = draw(running, result, traffic, out)
    report["timings"] |= {"load_s": load_s, "total_s": time.perf_counter() - begin}
    report["reference"] = {"source": source, **dataclasses.asdict(comparison)}
    report["picture"] = picture and str(picture)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _show_result(report, comparison.sentence(unclear), stdout)
    if not comparison.is_equal:
        context.exit(EXIT_DIFFERENT)


# -- what is shown ----------------------------------------------------------------------------------------------------


def _show_machine(engine: Engine, console: Console) -> None:
    report = machine_report(engine.pools)
    report["instances"] = placed_instances(engine, report)
    print_tables(console, (*topology_tables(report), placement_table(report)))


def _show_result(report: JsonObject, verdict: str, console: Console) -> None:
    outputs = report["outputs"]
    if "text" in outputs[0]:
        for line in completion_lines(outputs):
            console.print(line, soft_wrap=True)
    else:
        print_tables(console, [outputs_table(outputs, OUTPUTS_SHOWN)])
    print_tables(console, result_tables(report))
    picture = report["picture"]
    drawn = f"Picture: {picture}" if picture else "No picture: matplotlib is missing (pip install 'cmjax[plot]')"
    source = f"Reference: {report['reference']['source']}."
    for text in (verdict, source, f"{drawn}. {report['timings']['total_s']:.0f} s in all."):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def completion_lines(outputs: Sequence[JsonObject]) -> Iterator[Text]:
    """The first completions as text: the prompt dimmed behind a bar, what was generated bright behind an angle."""
    shown = outputs[:OUTPUTS_SHOWN]
    yield Text(f"Generated: {len(shown)} of {len(outputs)} completions, | prompt, > continuation", style="italic")
    for output in shown:
        yield Text()
        prompt, continuation = readable(output["prompt"]), readable(output["text"])
        prompt.stylize("dim")
        continuation.stylize("bold green")
        num_prompt_lines = prompt.plain.count("\n") + 1
        for index, line in enumerate((prompt + continuation).split("\n")):
            yield Text("  | ", style="dim") + line if index < num_prompt_lines else Text("  > ", style="green") + line
    yield Text()


def draw(engine: Engine, result: GenerateResult, traffic: TrafficSnapshot, folder: Path) -> Path | None:
    """Draw the expert load and the traffic of the decode instance; None where matplotlib is missing."""
    try:
        from cmjax.cli.picture import draw_picture
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return None
    config, devices = engine.model.config, [device.id for device in engine.pools.decode[0].devices]
    sent = traffic.matrix("ub", "ragged_all_to_all")
    matrix = sent[min(devices) : max(devices) + 1, min(devices) : max(devices) + 1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kinds = rank_kinds(engine.decode.placement)
        return draw_picture(folder / "demo.png", config.moe_layer_ids, result.decode_load, matrix, kinds)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from error


def rank_kinds(placement: ExpertPlacement | None) -> dict[str, range]:
    """Which ranks hold shared replicas, routed and redundant experts, where each rank holds one expert."""
    if placement is None or placement.num_local_experts != 1:
        return {}
    routed = placement.num_shared_replicas
    redundant = routed + placement.num_routed_experts
    kinds = {"shared": range(routed), "routed": range(routed, redundant)}
    return kinds | {"redundant": range(redundant, placement.num_physical_experts)}

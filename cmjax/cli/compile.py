"""`cmjax compile`: the engine's steps, compiled for accelerators that need not be there."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click
from rich.console import Console

from cmjax.checkpoint import ModelFormats
from cmjax.checkpoint.configs import FoundConfig, find_config, shipped_models
from cmjax.cli.compile_tables import collectives_table, counts_table, machines_table, reasons, steps_table
from cmjax.cli.flags import Given, given_options_for, options_for
from cmjax.cli.options import json_option, model_config_option
from cmjax.cli.progress import shown_progress
from cmjax.cli.tables import print_tables
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout
from cmjax.mesh.topology import DEFAULT_EP_SIZE, MAX_DEFAULT_PREFILL_EP_SIZE
from cmjax.perf.xla import Counts, beside_compiled
from cmjax.serve import EngineSettings
from cmjax.targets import HERE, StepReport, StepRequest, Target, compile_apart, machines
from cmjax.text import JsonObject

# Those that shape a step.
_SETTINGS = (
    "max_model_len",
    "max_num_seqs_per_rank",
    "block_size",
    "max_num_batched_tokens",
    "steps_per_call",
    "num_speculative_tokens",
    "microbatches",
    "dispatch_dtype",
    "combine_dtype",
    "num_redundant_experts",
    "num_shared_replicas",
    "num_kv_blocks",
    "num_prefill_kv_blocks",
)
EXIT_NOT_COMPILED = 1


@click.command(
    "compile",
    epilog="""\b
    Examples:
      cmjax compile --target v5p:8x8x5 --quant int8 --mtp 1       DeepSeek-R1 at EP320 on 320 TPU v5p
      cmjax compile --target h100:320 --max-num-seqs 96 --max-model-len 4096 --role decode
      cmjax compile --model DIR --target b200 --ep 64 --json | jq '.steps[].total'
      cmjax compile --target here --ep 8 --model DIR --run 5      on the devices of this machine, and run
      cmjax compile --list                                        targets and models
    \b
    The exit status is 1 where a step does not compile or does not fit.""",
)
@model_config_option
@click.option("--target", "target_name", metavar="TARGET", help="v5p:8x8x5, h100:320, b200, here, ...; see --list.")
@click.option("--list", "is_list", is_flag=True, help="List targets and models, and do nothing else.")
@click.option(
    "--role",
    type=click.Choice(["both", "decode", "prefill"]),
    default="both",
    show_default=True,
    help="Of the instances whose steps are compiled.",
)
@given_options_for(
    "layout",
    InstanceLayout,
    {"ep_size": "the devices of --target, else 320", "prefill_ep_size": "min(ep, 32)"},
    only=("ep_size", "prefill_ep_size"),
)
@options_for("formats", ModelFormats, defaults={"dtype": "bfloat16"})
@options_for("engine", EngineSettings, only=_SETTINGS)
@click.option(
    "--any-sampling", is_flag=True, help="For all that a server's clients may ask for, not for greedy requests alone."
)
@click.option(
    "--ragged",
    type=click.Choice(["auto", "native", "padded"]),
    default="auto",
    show_default=True,
    help="Exchange of rows: XLA's own, which auto takes where there is one, or an all-to-all of worst-case size.",
)
@click.option("--output", metavar="DIR", help="Write the programs there, as lowered and as compiled.")
@click.option("--run", "num_runs", type=click.IntRange(min=0), default=0, help="Run each so often; with --target here.")
@json_option
def compile_command(
    model: str,
    target_name: str | None,
    is_list: bool,
    role: str,
    layout: Given[InstanceLayout],
    formats: ModelFormats,
    engine: EngineSettings,
    **own: Any,
) -> int:
    """Compile an engine's steps for accelerators that need not be there: TPUs, GPUs.

    It says whether they compile, what they take of a device's memory, what is exchanged, and what XLA expects of the
    time. Each step is compiled in a process of its own. A target needs its compiler: pip install 'jax[tpu]', or
    'jax[cuda13]'.
    """
    as_json = own["as_json"]
    if is_list:
        return _list(as_json)
    if target_name is None:
        raise UserError("no target: give --target, such as v5p:8x8x5; --list names them")
    target = Target.parse(target_name)
    if own["num_runs"] and target.machine is not None:
        raise UserError(f"--run needs --target {HERE}: {target_name} is not a machine that is here")
    found = find_config(model)
    ep_size = layout.get("ep_size") or target.num_devices or DEFAULT_EP_SIZE
    sizes = {"decode": ep_size, "prefill": layout.get("prefill_ep_size") or min(ep_size, MAX_DEFAULT_PREFILL_EP_SIZE)}
    common: dict[str, Any] = {
        "target": target_name,
        "config": found.config.to_hf(),
        "dtype": formats.dtype,
        "quant": _quant(formats, found),
        **{name: own[name] for name in ("any_sampling", "ragged", "output", "num_runs")},
    }
    roles: Any = ("decode", "prefill") if role == "both" else (role,)
    requests = [
        StepRequest(role=one, ep_size=sizes[one], settings=settings, **common)
        for one in roles
        for settings in _settings(engine)
    ]
    steps, counts = [], dict[str, Counts | None]()
    with shown_progress("steps") as progress:
        for number, request in enumerate(requests):
            progress(f"compiling {request.name} for {target_name}", number, len(requests))
            steps.append((request, compile_apart(request)))
            counts[request.name] = beside_compiled(*steps[-1])
    if as_json:
        click.echo(json.dumps(_report(found, steps, counts)))
    else:
        _print(found, target_name, steps, counts)
    return 0 if all(report.status == "ok" for _, report in steps) else EXIT_NOT_COMPILED


def _quant(formats: ModelFormats, found: FoundConfig) -> str | None:
    if formats.quant == "auto":
        raise UserError("--quant auto measures this machine: give int8 or none")
    if formats.quant is None:
        return "int8" if found.is_int8 else None
    return None if formats.quant == "none" else formats.quant


def _settings(engine: EngineSettings) -> Iterator[JsonObject]:
    """Plain values, once for each number of microbatches."""
    values = {name: getattr(engine, name) for name in _SETTINGS}
    for microbatches in (1, 2) if engine.microbatches == "auto" else (engine.microbatches,):
        settings = values | {"microbatches": microbatches}
        EngineSettings(**settings)  # what does not divide is refused before anything is compiled
        yield settings


def _list(as_json: bool) -> int:
    names = shipped_models()
    if as_json:
        targets = {key: {**one.facts, "memory_bytes": one.memory_bytes} for key, one in machines().items()}
        click.echo(json.dumps({"targets": targets, "models": names}))
        return 0
    print_tables(Console(file=sys.stdout), [machines_table()])
    click.echo(f"{HERE}: the devices that JAX finds on this machine\nmodels: {', '.join(names)}")
    return 0


def _report(
    found: FoundConfig, steps: list[tuple[StepRequest, StepReport]], counts: Mapping[str, Counts | None]
) -> JsonObject:
    each = []
    for request, report in steps:
        asked = {name: getattr(request, name) for name in ("target", "role", "ep_size", "settings", "dtype", "quant")}
        later = {"fits": report.fits, "counts": counts[request.name]}
        each.append({**asked, "ragged": request.ragged, **dataclasses.asdict(report), **later})
    return {"model": found.name, "steps": each}


def _print(
    found: FoundConfig,
    target_name: str,
    steps: list[tuple[StepRequest, StepReport]],
    counts: Mapping[str, Counts | None],
) -> None:
    console = Console(file=sys.stdout)
    tables = [steps_table(f"{found.name} on {target_name}", steps)]
    if any(report.collectives for _, report in steps):
        tables.append(collectives_table(steps))
    if any(counts.values()):
        tables.append(counts_table(counts))
    print_tables(console, tables)
    for line in reasons(steps):
        console.print(line, highlight=False, soft_wrap=True, markup=False)

"""`cmjax bench engine`: the engine's own calls under requests."""

from typing import TYPE_CHECKING, Any

import click

from cmjax.cli.generate import new_table
from cmjax.cli.options import find_model, json_option, model_option

if TYPE_CHECKING:
    from rich.table import Table


@click.command(
    epilog="""\b
    Examples:
      cmjax bench engine
      cmjax bench engine --ep 64 --seqs-per-rank 4 --json"""
)
@model_option
@click.option(
    "--ep", type=click.IntRange(min=1), default=320, show_default=True, help="Devices of the decode instance."
)
@click.option("--seqs-per-rank", type=click.IntRange(min=1), default=8, show_default=True, help="Places of a rank.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=2), default=4096, show_default=True, help="Of the long prompt."
)
@click.option("--steps", type=click.IntRange(min=1), default=8, show_default=True, help="Decode steps in a call.")
@click.option("--rounds", type=int, hidden=True, help="Taken, for `bench all`, and not used.")
@json_option
def engine(folder: str, ep: int, seqs_per_rank: int, prompt_tokens: int, steps: int, as_json: bool, **_: Any) -> None:
    """A full decode step beside one with one request, and how long decode waits while a long prompt is prefilled."""
    from cmjax.bench import engine as bench_engine
    from cmjax.checkpoint import load
    from cmjax.cli.bench import print_report

    report = bench_engine.run(
        load(find_model(folder)), ep_size=ep, seqs_per_rank=seqs_per_rank, prompt_tokens=prompt_tokens, num_steps=steps
    )
    print_report(report, [table(report)], as_json)


def table(report: dict[str, Any]) -> "Table":
    """The report as a table."""
    settings, results, bounds = report["settings"], report["results"], report["bounds"]
    title = (
        f"EP{settings['ep_size']}, {settings['seqs_per_rank']} places a rank, {settings['num_steps']} steps a call, "
        f"{settings['prefill_instances']} prefill instances"
    )
    found = new_table(title, "measure", "ms", "of", "ratio", "bound", numbers_from=1)
    step, gap = report["step_s"], report["gap_s"]
    rows = (
        ("full step", step["full"], f"{step['one'] * 1e3:.0f} for one request", "full_over_one"),
        (
            f"longest gap, prefill of {settings['prompt_tokens']:,} tokens",
            gap["longest"],
            f"{gap['median'] * 1e3:.0f} median of {gap['calls']}",
            "longest_gap_over_median",
        ),
    )
    for name, seconds, of, key in rows:
        found.add_row(name, f"{seconds * 1e3:.0f}", of, f"{results[key]:.2f}", f"{bounds[key]:g}")
    costs = report["bookkeeping_ms"]
    parts = ", ".join(f"{part} {costs[part]:.1f}" for part in ("plan", "pickle", "unpickle", "commit"))
    name = f"bookkeeping of a call, {costs['rows']:,} rows"
    found.add_row(name, f"{costs['total']:.1f}", parts, "", f"{bounds['bookkeeping_ms']:g} ms")
    found.caption = "\n".join(f"{name}: {text}" for name, text in report["definitions"].items())
    return found

"""How reports are shown: tables of what `cmjax.cli.report` says, and the benchmarks' own under their machine."""

import json
import re
import sys
from collections.abc import Iterable, Sequence

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cmjax.bench.tables import new_table
from cmjax.text import JsonObject

GB = 1e9
IDS_SHOWN = 12


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    """Print tables. Where the console is too narrow, cells go on in the next line between two words, and never inside
    one: a name that is cut can be neither searched for nor copied."""
    unbounded = console.options.update(width=sys.maxsize)
    for table in tables:
        for column in table.columns:
            cells = [Measurement.get(console, unbounded, cell) for cell in (column.header, *column.cells)]
            column.min_width = max(cell.minimum for cell in cells)
            column.no_wrap = column.min_width == max(cell.maximum for cell in cells)
        needed = Measurement.get(console, unbounded, table).minimum
        if needed > console.width:
            table.width = needed
        with console.capture() as printed:
            console.print(table, crop=False)
        # Blanks at the end of lines would go on in the next line of a terminal that is narrower than the table.
        text = re.sub(r"(?: |\x1b\[[\d;]*m)+$", lambda found: found[0].replace(" ", ""), printed.get(), flags=re.M)
        console.out(text, end="", highlight=False)


def topology_tables(report: JsonObject) -> tuple[Table, ...]:
    """The supernode, its instances and its planes; `cmjax demo` opens with the same tables."""
    machine = report["supernode"]
    parts = new_table(f"Supernode {machine['name']}", "part", "number")
    per_rank = "an NPU" if machine["ranks_per_npu"] == 1 else f"1/{machine['ranks_per_npu']} of an NPU"
    for part, number in (
        ("nodes", machine["num_nodes"]),
        ("NPUs (dies)", f"{machine['num_npus']} ({machine['num_dies']})"),
        ("CPUs", machine["num_cpus"]),
        (f"ranks, each {per_rank}", machine["num_ranks"]),
        ("memory a rank", f"{machine['rank_memory_bytes'] / GB:g} GB"),
        ("UB switch chips L1, L2", f"{machine['num_l1_chips']}, {machine['num_l2_chips']}"),
    ):
        parts.add_row(part, str(number))
    shared = " (prefill shares decode's devices)" if report["prefill_shares_decode_devices"] else ""
    instances = new_table(f"Instances{shared}", "name", "role", "EP", "ranks", "NPUs", "nodes")
    for one in report["instances"]:
        spans = (f"{low}-{high}" if low < high else str(low) for low, high in (one["ranks"], one["npus"], one["nodes"]))
        instances.add_row(one["name"], one["role"], str(one["ep_size"]), *spans)
    return parts, instances, _planes_table(report["planes"])


def _planes_table(planes: list[JsonObject]) -> Table:
    table = new_table(
        "Planes: GB/s one way of a die (vpc: of a node), latency in us, between nodes and within one",
        *("plane", "path", "GB/s between", "within", "us between", "within"),
    )
    for plane in planes:
        rows: dict[str, dict[bool, tuple[float, float]]] = {}
        for row in plane["figures"]:
            path = f"{row['path'].replace('_', '-').upper()} {row['op']}"
            rows.setdefault(path, {})[row["inter_node"]] = (row["bytes_per_s"] / GB, row["latency_s"] * 1e6)
        if all(reach == next(iter(rows.values())) for reach in rows.values()):
            rows = {"any": next(iter(rows.values()))}
        for path, reach in rows.items():
            figures = (reach[True][0], reach[False][0], reach[True][1], reach[False][1])
            table.add_row(plane["name"], path, *(f"{figure:g}" for figure in figures))
    table.caption = "\n".join(f"{plane['name']}: {plane['source']}" for plane in planes)
    return table


def forms_table(title: str, column: str, statuses: dict[str, dict[str, str]]) -> Table:
    """Which form each collective or kernel takes, and why; those of one form for one reason share a row."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, status in statuses.items():
        names.setdefault((status["form"], status["reason"]), []).append(name)
    table = new_table(title, column, "form", "why")
    for (form, reason), alike in names.items():
        table.add_row("\n".join(alike), form, reason)
    return table


def result_tables(report: JsonObject) -> tuple[Table, ...]:
    """How fast it was, what travelled, and how evenly the experts were used."""
    return (
        timings_table(report["timings"], report["kept_drafts"]),
        traffic_table(report["traffic"]),
        load_table(report["expert_load"]),
    )


def placement_table(report: JsonObject) -> Table:
    """How many copies of the experts each instance holds."""
    columns = ("instance", "EP", "routed", "redundant", "shared replicas", "experts a rank")
    table = new_table("Expert placement", *columns, numbers_from=1)
    for one in report["instances"]:
        counts = ["-"] * 4 if one["placement"] is None else [str(count) for count in one["placement"].values()]
        if counts[2] == "0":
            counts[2] = "on every rank"
        table.add_row(one["name"], str(one["ep_size"]), *counts)
    return table


def outputs_table(outputs: Sequence[JsonObject], max_outputs: int | None = None) -> Table:
    """The token ids of prompts and of what follows them, and what ended it; at most `max_outputs` of them."""
    table = new_table("Generated", "prompt", "tokens", "token ids", "ended by")
    for output in outputs[:max_outputs]:
        before, after = _shortened(output["prompt_ids"]), " ".join(str(token) for token in output["token_ids"])
        table.add_row(before, f"{len(output['token_ids']):,}", after, output["finish_reason"])
    if max_outputs is not None and len(outputs) > max_outputs:
        table.caption = f"and {len(outputs) - max_outputs} more"
    return table


def readable(text: str) -> Text:
    """Text for the terminal as it is: no markup, and what would control the terminal as an escape sequence."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return Text("".join(shown))


def _shortened(ids: Sequence[int]) -> str:
    shown = " ".join(str(token) for token in ids[:IDS_SHOWN])
    return shown if len(ids) <= IDS_SHOWN else f"{shown} ... ({len(ids)})"


def timings_table(seconds: dict[str, float], kept_drafts: list[int]) -> Table:
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


def traffic_table(planes: dict[str, dict[str, dict[str, int]]]) -> Table:
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


def load_table(expert_load: dict[str, dict[str, list[int]]]) -> Table:
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


# -- reports of benchmarks --------------------------------------------------------------------------------------------


def print_report(report: JsonObject, tables: Sequence[Table], as_json: bool) -> None:
    """Print a report as tables under its machine, or as one JSON object."""
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    console = Console(file=sys.stdout)
    console.print(machine_line(report["machine"]), highlight=False, soft_wrap=True)
    print_tables(console, tables)


def machine_line(machine: JsonObject) -> str:
    """The machine, versions and commit in one line."""
    packages = ("jax", "torch", "transformers")
    versions = ", ".join(f"{name} {machine[name]}" for name in packages if name in machine)
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, "
        f"Python {machine['python']}, {versions}{commit}"
    )

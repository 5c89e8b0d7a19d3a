"""How `cmjax compile` shows what came of its steps."""

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from cmjax.bench.tables import define, new_table, number
from cmjax.targets import StepReport, StepRequest, machines

GIB = 2**30
Steps = Sequence[tuple[StepRequest, StepReport]]

_DEFINITIONS = {
    "batch": "sequences of a decode rank, or tokens of a prefill step of all ranks",
    "exchange": "receive buffers of dispatch and combine at their worst, of all temporaries",
    "other": "the rest of them, and code",
    "XLA": "what the compiler expects of its instructions, one after the other and without exchanges, in a call",
}


def steps_table(title: str, steps: Steps) -> Table:
    """Sizes in GiB a device."""
    columns = ["step", "EP", "micro", "drafts", "batch", "weights", "cache", "exchange", "other", "total", "of", "XLA"]
    is_run = any("run_median" in report.seconds for _, report in steps)
    table = new_table(f"{title}: GiB a device", *columns, *(["run"] if is_run else []), "compiled", numbers_from=1)
    for request, report in steps:
        batch = report.sequences if request.role == "decode" else report.tokens
        other = None
        if report.temporaries is not None and report.code is not None:
            other = max(report.temporaries - report.exchange, 0) + report.code
        sizes = (report.weights, report.cache, report.exchange, other, report.total, report.memory)
        is_placed = report.status in ("ok", "too large")
        table.add_row(
            request.role,
            str(request.ep_size),
            str(request.settings.get("microbatches", 1)),
            str(request.settings.get("num_speculative_tokens", 0)),
            f"{batch:,}" if is_placed else "-",
            *(number(size if is_placed else None, "{:.2f}", 1 / GIB) for size in sizes),
            number(report.estimate_s, "{:.1f} ms", 1e3),
            *([number(report.seconds.get("run_median"), "{:.1f} ms", 1e3)] if is_run else []),
            number(report.seconds.get("compile"), "{:.0f} s") if report.status == "ok" else report.status,
        )
    return define(table, _DEFINITIONS)


def collectives_table(steps: Steps) -> Table:
    """What is left of the exchanges in the compiled programs."""
    table = new_table("Collectives of a device in a call", "step", "collective", "calls", "MB given", numbers_from=2)
    for request, report in steps:
        for kind, use in report.collectives.items():
            table.add_row(request.name, kind, f"{use['calls']:,}", f"{use['num_bytes'] / 1e6:,.1f}")
    table.caption = "ragged ones at their worst: as if all rows of the buffer travelled"
    return table


def reasons(steps: Steps) -> Iterator[str]:
    """A line for each step that does not compile or fit, and what to change."""
    for request, report in steps:
        if report.reason is not None:
            yield f"{request.name}: {report.reason}"
        for one in report.advice:
            yield f"  {one}"


def machines_table() -> Table:
    """All targets."""
    table = new_table("Targets", "target", "device", "GiB", "compiler", "described by")
    for key, machine in machines().items():
        size = f"{machine.memory_bytes / GIB:.2f}"
        example = f"{key}:{machine.layouts(320)[0]}" if machine.platform == "tpu" else f"{key}:320"
        table.add_row(example, machine.name, size, escape(machine.wheel), machine.facts["source"])
    return table

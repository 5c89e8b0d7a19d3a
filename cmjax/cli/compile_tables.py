"""How `cmjax compile` shows what came of its steps."""

from collections.abc import Iterator, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from cmjax.bench.tables import define, new_table, number
from cmjax.perf.xla import Counts
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


def counts_table(counts: Mapping[str, Counts | None]) -> Table:
    """XLA's operations and bytes of each step beside ours."""
    columns = ("step", "XLA GFLOP", "ours once", "ours", "XLA GB", "ours once", "ours")
    table = new_table("What a device computes and moves in a step", *columns, numbers_from=1)
    for name, found in counts.items():
        if found is not None:
            values = [found[of].get(what) for what in ("flops", "memory_bytes") for of in ("xla", "once", "expected")]
            table.add_row(name, *(number(value, "{:,.4g}", 1e-9) for value in values))
    return define(table, _COUNTS)


_COUNTS = {
    "XLA": "counts the body of each loop once (of layers, keys and experts), elementwise arithmetic, and every buffer "
    "of a fusion, arrays that it takes a part of as a whole; of the C++ kernels of a CPU nothing",
    "ours once": "products and what they read and write, each loop's body once as well: the difference from XLA is "
    "elementwise arithmetic and fusions' buffers",
    "ours": "each loop as often as it is expected to run: what `cmjax simulate` prices",
}


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
        example = f"{key}:{machine.layouts(320)[0]}" if machine.compiler == "tpu" else f"{key}:320"
        table.add_row(example, machine.name, size, escape(machine.wheel), machine.facts["source"])
    return table

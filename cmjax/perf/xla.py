"""XLA's own counts of a compiled step beside ours.

They differ on purpose. XLA counts the body of a loop once, scans over layers and data-dependent loops alike, since it
does not always know how often one runs; it counts elementwise arithmetic, and every buffer that an instruction of its
own fusion reads or writes; and it sees nothing inside a custom call (the C++ kernels of a CPU). Ours are what is
expected of the whole step, by matrix products and memory alone.
"""

from collections.abc import Sequence
from typing import Any

from cmjax.perf.work import Expected, StageWork, total


def xla_counts(compiled: Any) -> dict[str, float]:
    """Operations and bytes that `compiled.cost_analysis()` says, of one device; empty where it says nothing."""
    said = compiled.cost_analysis()
    cost = said[0] if isinstance(said, list | tuple) and said else said
    names = {"flops": "flops", "bytes accessed": "memory_bytes"}
    return {ours: float(cost[theirs]) for theirs, ours in names.items() if cost and theirs in cost}


def beside(stages: Sequence[StageWork], expected: Sequence[Expected], compiled: Any) -> dict[str, dict[str, float]]:
    """Three counts of a step, by what was counted: "xla", "once" (ours, every loop's body once, as XLA has it) and
    "expected" (ours).

    Args:
        stages: of the step, as `Layout.counts` gives them.
        expected: what the data is expected to be, for each of them.
        compiled: of the same step.
    """
    once = total(stage.once() for stage in stages)
    whole = total(stage.expected(data).times(stage.calls) for stage, data in zip(stages, expected, strict=True))
    ours = {
        name: {"flops": work.flops, "memory_bytes": work.memory_bytes}
        for name, work in (("once", once), ("expected", whole))
    }
    return {"xla": xla_counts(compiled), **ours}

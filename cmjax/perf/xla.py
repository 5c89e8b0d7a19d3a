"""XLA's own counts of a compiled step beside ours.

They differ on purpose. XLA counts the body of a loop once, scans over layers and data-dependent loops alike, since it
does not always know how often one runs; it counts elementwise arithmetic, and every buffer that an instruction of its
own fusion reads or writes; and it sees nothing inside a custom call (the C++ kernels of a CPU). Ours are what is
expected of the whole step, by matrix products and memory alone.
"""

from collections.abc import Mapping, Sequence

from cmjax.errors import UserError
from cmjax.model import ModelConfig
from cmjax.perf.layout import Layout
from cmjax.perf.work import Expected, StageWork, total
from cmjax.targets import StepReport, StepRequest

Counts = dict[str, dict[str, float]]


def beside(stages: Sequence[StageWork], expected: Sequence[Expected], xla: Mapping[str, float]) -> Counts:
    """Three counts of a step, by what was counted: "xla", "once" (ours, every loop's body once, as XLA has it) and
    "expected" (ours).

    Args:
        stages: of the step, as `Layout.counts` gives them.
        expected: what the data is expected to be, for each of them.
        xla: of the same step compiled, as `cmjax.targets.hlo.xla_counts` gives it.
    """
    once = total(stage.once() for stage in stages)
    whole = total(stage.expected(data).times(stage.calls) for stage, data in zip(stages, expected, strict=True))
    ours = {
        name: {"flops": work.flops, "memory_bytes": work.memory_bytes}
        for name, work in (("once", once), ("expected", whole))
    }
    return {"xla": dict(xla), **ours}


def beside_compiled(request: StepRequest, report: StepReport) -> Counts | None:
    """The counts of a step that was compiled, contexts as long as they may be; None where either side has none."""
    if not report.xla:
        return None
    settings = request.settings
    longest = settings["max_model_len"]
    is_decode = request.role == "decode"
    try:
        layout = Layout(
            config=ModelConfig.from_hf(request.config),
            phase=request.role,
            ep_size=request.ep_size,
            batch=settings["max_num_seqs_per_rank"] if is_decode else report.tokens // request.ep_size,
            context=longest if is_decode else min(longest, report.tokens),
            drafts=settings["num_speculative_tokens"] if is_decode else 0,
            microbatches=settings["microbatches"],
            quant="int8" if request.quant == "int8" else None,
            num_redundant_experts=settings["num_redundant_experts"],
            num_shared_replicas=settings["num_shared_replicas"],
        )
        stages = layout.counts()
    except UserError:  # more than is ever priced; it compiles all the same
        return None
    data = [layout.expected(layout.tokens // (2 if stage.lane else 1)) for stage in stages]
    return beside(stages, data, report.xla)

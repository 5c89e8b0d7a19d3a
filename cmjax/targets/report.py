"""What is asked of a compilation, and what came of it: plain values, which travel between processes."""

import dataclasses
from typing import Any, Literal

Status = Literal["ok", "too large", "failed", "crashed"]


@dataclasses.dataclass(frozen=True)
class StepRequest:
    """What to compile, as plain values.

    Attributes:
        target: see `Target.parse`.
        role, ep_size: of the instance.
        config: of the model, as `ModelConfig.to_hf` gives it.
        settings: fields of `EngineSettings` that are not its defaults; microbatches 1 or 2.
        dtype, quant: of the weights.
        any_sampling: for all that a server's clients may ask for, instead of greedy requests alone.
        ragged: form of the ragged exchange.
        output: folder for the program; None: it is not kept.
        num_runs: times that it is run, where its devices are here.
    """

    target: str
    role: Literal["decode", "prefill"]
    ep_size: int
    config: dict[str, Any]
    settings: dict[str, Any]
    dtype: str = "bfloat16"
    quant: Literal["int8", "fake"] | None = None
    any_sampling: bool = False
    ragged: Literal["auto", "native", "padded"] = "auto"
    output: str | None = None
    num_runs: int = 0

    @property
    def name(self) -> str:
        """Of files, and in messages."""
        return f"{self.role}-ep{self.ep_size}-mb{self.settings.get('microbatches', 1)}"


@dataclasses.dataclass
class StepReport:
    """What came of it; sizes in bytes a device.

    Attributes:
        status: "ok", "too large" (for the device's memory, as the compiler or the sum says), "failed" or "crashed".
        reason: one line, where it is not ok.
        tokens: of the step, of all ranks; `sequences`, of a decode rank.
        weights, cache, exchange: of the arrays as the engine has them; `exchange` at its worst.
        arguments, temporaries, outputs, code: as the compiler laid them out, alignment included; None where it did not
            get so far. What is returned in place of an argument counts once. Temporaries hold the exchange buffers.
        total: of all, weights that the step leaves alone included; what the compiler asked for where it did not fit.
        memory: of the device; None where it is shared or unknown.
        collectives: kind -> calls and bytes of a device in one call of the step.
        estimate_s: what the compiler expects its instructions to take, exchanges not counted; None: it does not say.
        xla: operations and bytes of a device as the compiler counts them, each loop's body once; {}: it does not say.
        copies: the largest copies of arrays that the compiler has added, as bytes, shape and scope: what other
            temporaries are often made of.
        advice: settings to change first, where it does not fit.
        seconds: of tracing and compiling, and of the runs.
        versions: of what compiled it.
    """

    status: Status = "ok"
    reason: str | None = None
    tokens: int = 0
    sequences: int | None = None
    weights: int = 0
    cache: int = 0
    exchange: int = 0
    arguments: int | None = None
    temporaries: int | None = None
    outputs: int | None = None
    code: int | None = None
    total: int | None = None
    memory: int | None = None
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    estimate_s: float | None = None
    xla: dict[str, float] = dataclasses.field(default_factory=dict)
    copies: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)
    advice: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool | None:
        """Whether it fits the device's memory; None where that is not known."""
        if self.total is None or self.memory is None:
            return None if self.status != "too large" else False
        return self.total <= self.memory

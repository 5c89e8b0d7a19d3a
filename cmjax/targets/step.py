"""Compile one step of an instance for a target, in this process: a compiler that crashes takes it down, so the command
does it in a process of its own (`cmjax.targets.apart`)."""

import dataclasses
import importlib.metadata
import os
import re
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cmjax.errors import UserError
from cmjax.targets.advice import advice
from cmjax.targets.hlo import Program
from cmjax.targets.machines import GIB, Target

Status = Literal["ok", "too large", "failed", "crashed"]
# What libtpu asks for on a machine without a TPU, lest it looks for one; and JAX must not either.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # each describes machines of its own, and touches none
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_PACKAGES = {"tpu": "libtpu", "cuda": "jax-cuda13-pjrt"}


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


def compile_step(request: StepRequest) -> StepReport:
    """Lower and compile it.

    Raises:
        UserError: the target, the model or the settings are wrong.
    """
    for key, value in ENVIRONMENT.items():
        if key != "JAX_PLATFORMS" or request.target != "here":
            os.environ.setdefault(key, value)
    import jax
    from jax.sharding import Mesh

    from cmjax.mesh import EP_AXIS, fabric
    from cmjax.model import ModelConfig
    from cmjax.schedule import SERVING_SHAPES
    from cmjax.serve import EngineSettings
    from cmjax.serve.instances import AbstractInstance

    target = Target.parse(request.target)
    fabric.configure(ragged=request.ragged)
    devices = target.devices(request.ep_size)
    instance = AbstractInstance(
        request.role,
        ModelConfig.from_hf(request.config),
        EngineSettings(**request.settings),
        Mesh(np.array(devices), (EP_AXIS,)),
        dtype=np.dtype(jax.numpy.dtype(request.dtype)),
        quant=request.quant,
        shape=SERVING_SHAPES[-1 if request.any_sampling else 0],
    )
    report = StepReport(
        tokens=instance.num_tokens,
        sequences=instance.settings.max_num_seqs_per_rank if request.role == "decode" else None,
        weights=instance.local_bytes(instance.params),
        cache=instance.cache_bytes,
        exchange=instance.exchange_bytes,
        memory=_memory_of(target, devices),
        versions=_versions(target),
    )
    begin = time.perf_counter()
    lowered = instance.trace().lower()
    report.seconds["trace"] = time.perf_counter() - begin
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        _explain(report, str(error))
    else:
        report.seconds["compile"] = time.perf_counter() - begin
        _measure(report, compiled, target)
    if report.status == "too large":
        report.advice = advice(report, request)
    if report.status != "ok":
        return report
    if request.output is not None:
        _write(Path(request.output), request.name, lowered, compiled)
    if request.num_runs:
        from cmjax.targets.running import run_step

        report.seconds |= run_step(instance, compiled, request.num_runs)
    return report


def _memory_of(target: Target, devices: Any) -> int | None:
    if target.machine is not None:
        return target.machine.memory_bytes
    from cmjax.mesh import Memory

    memory = Memory.of(devices)
    return None if memory.is_shared or not np.isfinite(memory.free_bytes) else int(memory.free_bytes)


def _versions(target: Target) -> dict[str, str]:
    names = ["jax", "jaxlib"]
    if target.machine is not None:
        names.append(_PACKAGES[target.machine.platform])
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _measure(report: StepReport, compiled: Any, target: Target) -> None:
    stats = compiled.memory_analysis()
    report.arguments = stats.argument_size_in_bytes
    report.temporaries = stats.temp_size_in_bytes
    report.outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    report.code = stats.generated_code_size_in_bytes
    # A step without drafts leaves the MTP module's weights alone, but the instance has them.
    held = max(report.arguments, report.weights + report.cache)
    report.total = held + report.temporaries + report.outputs + report.code
    program = Program(compiled.as_text())
    report.collectives = {kind: dataclasses.asdict(use) for kind, use in program.collectives().items()}
    report.copies = program.copies(8)
    cycles = program.estimated_cycles()
    if cycles is not None and target.machine is not None:
        report.estimate_s = cycles / target.machine.clock_hz
    if report.fits is False:
        report.status = "too large"
        assert report.memory is not None
        report.reason = f"needs {report.total / GIB:.1f} GiB of {report.memory / GIB:.1f}"


def _explain(report: StepReport, message: str) -> None:
    """What a compiler's error says, in one line."""
    line = (message.splitlines() or ["no reason given"])[0]
    needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available", message)
    if "RESOURCE_EXHAUSTED" not in message:
        report.status, report.reason = "failed", line
        return
    report.status = "too large"
    if needed is None:
        report.reason = line
        return
    report.total = round(float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[needed[2]])
    of = f" of {report.memory / GIB:.1f}" if report.memory is not None else ""
    report.reason = f"needs {report.total / GIB:.1f} GiB{of}"


def _write(folder: Path, name: str, lowered: Any, compiled: Any) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.stablehlo.mlir").write_text(lowered.as_text(), encoding="utf-8")
        (folder / f"{name}.hlo.txt").write_text(compiled.as_text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error

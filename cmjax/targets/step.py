"""Compile one step of an instance for a target, in this process: a compiler that crashes takes it down, so the command
does it in a process of its own (`cmjax.targets.apart`)."""

import dataclasses
import importlib.metadata
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.errors import UserError
from cmjax.mesh import ABSENT_TPU
from cmjax.targets.advice import advice
from cmjax.targets.hlo import Program, xla_counts
from cmjax.targets.machines import GIB, Target
from cmjax.targets.report import StepReport, StepRequest

# JAX must not look for a TPU either.
ENVIRONMENT = {**ABSENT_TPU, "JAX_PLATFORMS": "cpu"}
_PACKAGES = {"tpu": "libtpu", "cuda": "jax-cuda13-pjrt"}


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
    if request.output is not None:
        _make_folder(Path(request.output))  # before minutes of work
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
        names.append(_PACKAGES[target.machine.compiler])
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
    report.xla = xla_counts(compiled)
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


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def _write(folder: Path, name: str, lowered: Any, compiled: Any) -> None:
    try:
        (folder / f"{name}.stablehlo.mlir").write_text(lowered.as_text(), encoding="utf-8")
        (folder / f"{name}.hlo.txt").write_text(compiled.as_text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error

"""The steps of an engine, compiled for accelerators that need not be there."""

from cmjax.targets.apart import compile_apart
from cmjax.targets.machines import HERE, Machine, Target, machines
from cmjax.targets.report import StepReport, StepRequest

__all__ = ["HERE", "Machine", "StepReport", "StepRequest", "Target", "compile_apart", "machines"]

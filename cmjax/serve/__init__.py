"""Serving: the jitted steps, the instances that run them, the KV hand-off, and the engine that drives all."""

from cmjax.schedule import (
    Bounds,
    Change,
    EngineStats,
    InstanceStats,
    RatioPolicy,
    RequestOutput,
    RequestUpdate,
    SamplingParams,
    TokenLogprobs,
)
from cmjax.serve.engine import Engine
from cmjax.serve.handle import RequestError, RequestHandle
from cmjax.serve.instances import DecodeExecutor, PrefillExecutor, Scorer, TextScores, plan_windows, score_together
from cmjax.serve.offline import GenerateResult, Timings
from cmjax.serve.settings import EngineSettings
from cmjax.serve.startup import StartProgress
from cmjax.serve.steps import (
    DecodeOutput,
    DecodeState,
    Extras,
    PrefillOutput,
    StepSpec,
    decode,
    prefill,
    score,
)
from cmjax.serve.transfer import prefill_tp_rank

__all__ = [
    "Bounds",
    "Change",
    "DecodeExecutor",
    "DecodeOutput",
    "DecodeState",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "Extras",
    "GenerateResult",
    "InstanceStats",
    "PrefillExecutor",
    "PrefillOutput",
    "RatioPolicy",
    "RequestError",
    "RequestHandle",
    "RequestOutput",
    "RequestUpdate",
    "SamplingParams",
    "Scorer",
    "StartProgress",
    "StepSpec",
    "TextScores",
    "Timings",
    "TokenLogprobs",
    "decode",
    "plan_windows",
    "prefill",
    "prefill_tp_rank",
    "score",
    "score_together",
]

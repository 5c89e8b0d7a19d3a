"""Serving: the jitted prefill and decode steps, the KV hand-off, and the engine that drives them."""

from cmjax.schedule import (
    BlockPool,
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
from cmjax.serve.instances.decode import DecodeExecutor
from cmjax.serve.instances.prefill import PrefillExecutor
from cmjax.serve.instances.scoring import Scorer, TextScores, plan_windows, score_together
from cmjax.serve.offline import GenerateResult, Timings
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps.decode import DecodeOutput, DecodeState, Settled, decode
from cmjax.serve.steps.prefill import PrefillOutput, StepSpec, new_cache, prefill, score
from cmjax.serve.transfer.handoff import Move, hand_off, prefill_tp_rank

__all__ = [
    "BlockPool",
    "Bounds",
    "Change",
    "DecodeExecutor",
    "DecodeOutput",
    "DecodeState",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "GenerateResult",
    "InstanceStats",
    "Move",
    "PrefillExecutor",
    "PrefillOutput",
    "RatioPolicy",
    "RequestError",
    "RequestHandle",
    "RequestOutput",
    "RequestUpdate",
    "SamplingParams",
    "Scorer",
    "Settled",
    "StepSpec",
    "TextScores",
    "Timings",
    "TokenLogprobs",
    "decode",
    "hand_off",
    "new_cache",
    "plan_windows",
    "prefill",
    "prefill_tp_rank",
    "score",
    "score_together",
]

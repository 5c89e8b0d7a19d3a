"""Serving: the jitted prefill and decode steps, the KV hand-off, and the engine that drives them."""

from cmjax.serve.block_pool import BlockPool
from cmjax.serve.decode_instance import DecodeInstance
from cmjax.serve.decode_step import DecodeOutput, DecodeState, Settled, decode
from cmjax.serve.engine import Engine
from cmjax.serve.handle import RequestError, RequestHandle, RequestUpdate
from cmjax.serve.offline import GenerateResult, Timings
from cmjax.serve.prefill_instance import PrefillInstance
from cmjax.serve.ratio import Bounds, Change, RatioPolicy
from cmjax.serve.request import RequestOutput, SamplingParams, TokenLogprobs
from cmjax.serve.scoring import ScoringInstance, TextScores, plan_windows, score_together
from cmjax.serve.settings import EngineSettings
from cmjax.serve.stats import EngineStats, InstanceStats
from cmjax.serve.steps import PrefillOutput, StepSpec, new_cache, prefill, score
from cmjax.serve.transfer import hand_off, prefill_tp_rank

__all__ = [
    "BlockPool",
    "Bounds",
    "Change",
    "DecodeInstance",
    "DecodeOutput",
    "DecodeState",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "GenerateResult",
    "InstanceStats",
    "PrefillInstance",
    "PrefillOutput",
    "RatioPolicy",
    "RequestError",
    "RequestHandle",
    "RequestOutput",
    "RequestUpdate",
    "SamplingParams",
    "ScoringInstance",
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

"""The jitted steps: what an instance's devices run, one `shard_map` each."""

from cmjax.serve.steps.decode import DecodeOutput, DecodeState, Settled, decode
from cmjax.serve.steps.prefill import PrefillOutput, prefill
from cmjax.serve.steps.sampling import Logprobs
from cmjax.serve.steps.sampling_state import PackedSampling, SamplingState
from cmjax.serve.steps.score import Reference, ScoreOutput, score
from cmjax.serve.steps.spec import BY_RANK, EVERYWHERE, SECOND_BY_RANK, Extras, StepSpec, new_cache

__all__ = [
    "BY_RANK",
    "EVERYWHERE",
    "SECOND_BY_RANK",
    "DecodeOutput",
    "DecodeState",
    "Extras",
    "Logprobs",
    "PackedSampling",
    "PrefillOutput",
    "Reference",
    "SamplingState",
    "ScoreOutput",
    "Settled",
    "StepSpec",
    "decode",
    "new_cache",
    "prefill",
    "score",
]

"""Instances: a model on devices, and what runs plans on it."""

from cmjax.serve.instances.abstract import AbstractInstance
from cmjax.serve.instances.decode import DecodeExecutor
from cmjax.serve.instances.executor import JaxExecutor
from cmjax.serve.instances.prefill import PrefillExecutor
from cmjax.serve.instances.scoring import Scorer, TextScores, plan_windows, score_together

__all__ = [
    "AbstractInstance",
    "DecodeExecutor",
    "JaxExecutor",
    "PrefillExecutor",
    "Scorer",
    "TextScores",
    "plan_windows",
    "score_together",
]

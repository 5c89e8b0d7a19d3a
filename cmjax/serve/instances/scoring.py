"""Teacher-forced scoring: what a model, or several side by side, expect at every token of given texts."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from cmjax.errors import UserError
from cmjax.mesh import Instance
from cmjax.model import Model
from cmjax.schedule import (
    NOT_FINITE,
    NOT_FINITE_MESSAGE,
    PrefillPlan,
    PrefillPlanner,
    PrefillResult,
    Request,
    SamplingParams,
    Scheduler,
    SlotLoad,
    blocks_for,
)
from cmjax.serve.instances.executor import host_load
from cmjax.serve.instances.prefill import PrefillExecutor
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import Reference, ScoreOutput, score


@dataclasses.dataclass(frozen=True)
class TextScores:
    """What was expected of each token of a text but the first, `[tokens - 1]` each.

    Attributes:
        logprobs: float32, natural logarithm of the token's probability.
        is_top1: whether it was the most probable.
        draft_agrees: whether the MTP module's greedy token there is the model's; at the second token of the text, which
            nothing drafts, and without an MTP module, False.
        kl_divergence: float32, nats by which the distribution is off that of the first of several models; 0 for it.
    """

    logprobs: np.ndarray
    is_top1: np.ndarray
    draft_agrees: np.ndarray
    kl_divergence: np.ndarray

    @classmethod
    def empty(cls, length: int) -> "TextScores":
        """To be filled, for a text of `length` tokens."""
        return cls(*(np.zeros(length - 1, dtype) for dtype in (np.float32, bool, bool, np.float32)))


@dataclasses.dataclass(frozen=True)
class Window:
    """Part of a text seen at once: its tokens `[start, stop)`, of which those from `first_scored` on count."""

    text: int
    start: int
    stop: int
    first_scored: int


def plan_windows(lengths: Sequence[int], context: int, stride: int) -> list[Window]:
    """Cut texts into windows of at most `context` tokens, `stride` apart: each token but a text's first counts once,
    in the first window that holds it, after at least `context - stride` tokens or all that there are.
    """
    windows = []
    for text, length in enumerate(lengths):
        start, scored = 0, 1
        while scored < length:
            stop = min(length, start + context)
            windows.append(Window(text, start, stop, scored))
            start, scored = start + stride, stop
    return windows


class Scorer:
    """Scores texts on an instance's devices, any number of ranks.

    Args:
        model: from `cmjax.load`.
        instance: its devices.
        context: most tokens that the model looks at together.
        stride: distance between windows; less than `context`, so that no token is scored without context.
        settings: sizes and formats; `max_model_len` is taken from `context`.

    Attributes:
        executor: what runs the steps.
        slot_load: rows that its experts received.
    """

    def __init__(
        self, model: Model, instance: Instance, *, context: int, stride: int, settings: EngineSettings | None = None
    ) -> None:
        longest = model.config.max_position_embeddings
        if not 2 <= context <= longest:
            raise UserError(f"context {context}: must be 2 to the model's max_position_embeddings, {longest}")
        if not 1 <= stride < context:
            raise UserError(f"stride {stride}: must be 1 to {context - 1}, less than the context")
        settings = dataclasses.replace(settings or EngineSettings(), max_model_len=context, microbatches=1)
        self.context, self.stride = context, stride
        # A step's worth of windows, and one that begins in it.
        budget = blocks_for(settings.max_num_batched_tokens, settings.block_size)
        self.executor = PrefillExecutor(model, instance, settings, settings.max_blocks + budget)
        self.slot_load = SlotLoad()

    def expert_load(self) -> np.ndarray:
        """Rows per logical expert so far, see `PrefillExecutor.logical_load`."""
        return self.executor.logical_load(self.slot_load.total)

    def step(self, plan: PrefillPlan, reference: Reference | None) -> ScoreOutput:
        """Score a step's chunks; `reference`: see `score`."""
        one = self.executor
        output = score(one.params, one.expert_to_slot, one.cache, one.pack(plan), reference, spec=one.spec)
        one.cache = output.cache
        self.slot_load.add(host_load(output.slot_load))
        return output

    @property
    def head(self) -> jax.Array:
        """Of the model, on the devices."""
        params = self.executor.params
        return params.embed if params.head is None else params.head


def score_together(
    scorers: Sequence[Scorer], texts: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
) -> list[list[TextScores]]:
    """Score texts of token ids, each of at least two tokens, with several models step by step.

    Args:
        scorers: on the same devices, with the same context, stride and settings; the others' distributions are compared
            with the first one's.
        texts: lists of token ids, the first of each being what the text begins with (bos).
        progress: called with the number of tokens done.

    Returns:
        The scores of each scorer, text by text.
    """
    first = scorers[0]
    windows = plan_windows([len(text) for text in texts], first.context, first.stride)
    scores = [[TextScores.empty(len(text)) for text in texts] for _ in scorers]
    parts = [texts[window.text][window.start : window.stop] for window in windows]
    for window, found in zip(windows, _expectations(scorers, windows, parts), strict=True):
        for own, expectations in zip(scores, found, strict=True):
            _enter(own[window.text], window, texts[window.text], expectations)
        if progress is not None:
            progress(window.stop - window.first_scored)
    return scores


@dataclasses.dataclass(frozen=True)
class _Expectations:
    """What one model makes of the tokens of a window, `[tokens]` each; see `ScoreOutput`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    draft_ids: np.ndarray | None
    kl_divergence: np.ndarray | None

    @classmethod
    def of(cls, output: ScoreOutput) -> "_Expectations":
        """On the host."""
        return cls(
            *jax.tree.map(np.asarray, (output.token_ids, output.logprobs, output.draft_ids, output.kl_divergence))
        )

    def part(self, index: slice) -> "_Expectations":
        """Some of the tokens."""
        return jax.tree.map(lambda values: values[index], self)


jax.tree_util.register_dataclass(_Expectations)


def _enter(scores: TextScores, window: Window, text: Sequence[int], found: _Expectations) -> None:
    """Write the scored part of a window; token t is expected at t - 1, and drafted at t - 2."""
    first, stop, start = window.first_scored, window.stop, window.start
    expected, known = slice(first - 1 - start, stop - 1 - start), slice(first - 1, stop - 1)
    scores.logprobs[known] = found.logprobs[expected]
    scores.is_top1[known] = found.token_ids[expected] == np.asarray(text[first:stop])
    if found.kl_divergence is not None:
        scores.kl_divergence[known] = found.kl_divergence[expected]
    if found.draft_ids is not None:
        begin = max(first, start + 2)  # nothing is drafted before two tokens have been seen
        drafts = found.draft_ids[begin - 2 - start : stop - 2 - start]
        scores.draft_agrees[begin - 1 : stop - 1] = drafts == found.token_ids[begin - 1 - start : stop - 1 - start]


def _expectations(
    scorers: Sequence[Scorer], windows: Sequence[Window], parts: Sequence[Sequence[int]]
) -> Iterator[tuple[_Expectations, ...]]:
    """Run windows, `parts` of their texts, through as many steps as they need; yield what each scorer makes of each, in
    order."""
    planner, number_of = _plan_prompts(scorers[0].executor, windows, parts)
    found: dict[int, list[tuple[_Expectations, ...]]] = {index: [] for index in range(len(windows))}
    done = 0
    while (plan := planner.plan(0.0)) is not None:
        assert isinstance(plan, PrefillPlan)
        expectations = _run_step(scorers, plan)
        begin = 0
        for attempt_id, start, stop in zip(plan.attempt_ids.tolist(), plan.starts, plan.stops, strict=True):
            request = planner.attempts[attempt_id].request
            here = tuple(one.part(slice(begin, begin + int(stop - start))) for one in expectations)
            if any((one.token_ids == NOT_FINITE).any() for one in here):
                raise UserError(f"{request.request_id}: {NOT_FINITE_MESSAGE}")
            found[number_of[request]].append(here)
            begin += int(stop - start)
        planner.commit(plan, PrefillResult(np.zeros(len(plan.places), np.int32), np.zeros((0, 0), np.int64), 0.0), 0.0)
        while done < len(windows) and sum(len(here[0].token_ids) for here in found[done]) == len(parts[done]):
            pieces = found.pop(done)
            yield tuple(jax.tree.map(lambda *arrays: np.concatenate(arrays), *own) for own in zip(*pieces, strict=True))
            done += 1


def _plan_prompts(
    executor: PrefillExecutor, windows: Sequence[Window], parts: Sequence[Sequence[int]]
) -> tuple[PrefillPlanner, dict[Request, int]]:
    """Bookkeeping of windows as prompts that come one after another, and the number of each."""
    scheduler, sampling = Scheduler(handoff_timeout_s=float("inf")), SamplingParams(max_tokens=1)
    planner = executor.make_planner("scorer", scheduler)
    planner.is_compiled = True
    requests = [
        Request(f"text {window.text}", list(part), sampling, model=executor.model.digest)
        for window, part in zip(windows, parts, strict=True)
    ]
    for request in requests:
        scheduler.submit(request)
    return planner, {request: number for number, request in enumerate(requests)}


def _run_step(scorers: Sequence[Scorer], plan: PrefillPlan) -> list[_Expectations]:
    """A step of each model, its expectations beside the first one's."""
    found, reference = [], None
    for one in scorers:
        output = one.step(plan, reference)
        if reference is None and len(scorers) > 1:
            reference = output.hidden, one.head
        found.append(_Expectations.of(output))
    return found

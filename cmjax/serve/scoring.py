"""Teacher-forced scoring: what a model, or several side by side, expect at every token of given texts."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from cmjax.errors import UserError
from cmjax.mesh import Instance
from cmjax.model import Model
from cmjax.serve.block_pool import blocks_for
from cmjax.serve.instance import NOT_FINITE_MESSAGE
from cmjax.serve.prefill_instance import PrefillInstance
from cmjax.serve.request import Request, SamplingParams
from cmjax.serve.sampling import NOT_FINITE
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import ScoreOutput, score


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


class ScoringInstance(PrefillInstance):
    """Scores texts on an instance's devices, any number of ranks.

    Args:
        model: from `cmjax.load`.
        instance: its devices.
        context: most tokens that the model looks at together.
        stride: distance between windows; less than `context`, so that no token is scored without context.
        settings: sizes and formats; `max_model_len` is taken from `context`.
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
        super().__init__(model, instance, settings, settings.max_blocks + budget)

    def score_texts(
        self, texts: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
    ) -> list[TextScores]:
        """Score texts of token ids: `score_together` of this instance alone."""
        return score_together([self], texts, progress)[0]


def score_together(
    scorers: Sequence[ScoringInstance], texts: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
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
    waiting = [Request(f"text {w.text}", list(texts[w.text][w.start : w.stop]), SamplingParams()) for w in windows]
    begin = 0
    while begin < len(waiting):
        end = begin + 1
        while end < len(waiting) and first.router.can_hold(waiting[begin : end + 1]):
            end += 1
        for window, found in zip(windows[begin:end], _expectations(scorers, waiting[begin:end]), strict=True):
            for own, expectations in zip(scores, found, strict=True):
                _enter(own[window.text], window, texts[window.text], expectations)
            if progress is not None:
                progress(window.stop - window.first_scored)
        begin = end
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
        found = cls(output.token_ids, output.logprobs, output.draft_ids, output.kl_divergence)
        return jax.tree.map(np.asarray, found)

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
    scorers: Sequence[ScoringInstance], windows: Sequence[Request]
) -> Iterator[tuple[_Expectations, ...]]:
    """Run windows through as many steps as they need; yield what each scorer makes of each, in order."""
    first = scorers[0]  # whose blocks are everybody's: the caches have one size
    parts: dict[Request, list[tuple[_Expectations, ...]]] = {window: [] for window in windows}
    for window in windows:
        first.router.add(window)
    while chunks := first.router.next_step(first.num_step_tokens, first.max_sequences):
        found, reference, batch = [], None, first.pack(chunks)
        for one in scorers:
            output = score(one.params, one.expert_to_slot, one.cache, batch, reference, spec=one.spec)
            one.cache = output.cache
            one.record_load(output.slot_load)
            if reference is None and len(scorers) > 1:
                reference = output.hidden, one.params.embed if one.params.head is None else one.params.head
            found.append(_Expectations.of(output))
        first.router.computed(chunks)
        begin = 0
        for chunk in chunks:
            end = begin + chunk.stop - chunk.start
            here = tuple(expectations.part(slice(begin, end)) for expectations in found)
            if any((expectations.token_ids == NOT_FINITE).any() for expectations in here):
                raise UserError(f"{chunk.request.request_id}: {NOT_FINITE_MESSAGE}")
            parts[chunk.request].append(here)
            begin = end
    for window in windows:
        first.router.release(window)
    for part in parts.values():
        yield tuple(jax.tree.map(lambda *arrays: np.concatenate(arrays), *own) for own in zip(*part, strict=True))

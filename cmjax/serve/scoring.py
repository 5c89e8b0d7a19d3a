"""Teacher-forced scoring: what a model expects at every token of given texts."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cmjax.errors import UserError
from cmjax.mesh import Instance
from cmjax.model import Model
from cmjax.serve.block_pool import blocks_for
from cmjax.serve.instance import PrefillInstance, check_finite
from cmjax.serve.request import Request, SamplingParams, plan_chunks
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import score


@dataclasses.dataclass(frozen=True)
class TextScores:
    """What was expected of each token of a text but the first, `[tokens - 1]` each.

    Attributes:
        logprobs: float32, natural logarithm of the token's probability.
        is_top1: whether it was the most probable.
        draft_agrees: whether the MTP module's greedy token there is the model's; at the second token of the text, which
            nothing drafts, and without an MTP module, False.
    """

    logprobs: np.ndarray
    is_top1: np.ndarray
    draft_agrees: np.ndarray


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
        settings = dataclasses.replace(settings or EngineSettings(), max_model_len=context)
        self.context, self.stride = context, stride
        # A step's worth of windows, and one that begins in it.
        budget = blocks_for(settings.max_num_batched_tokens, settings.block_size)
        super().__init__(model, instance, settings, settings.max_blocks + budget)

    def score_texts(
        self, texts: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
    ) -> list[TextScores]:
        """Score texts of token ids, each of at least two tokens.

        Args:
            texts: lists of token ids, the first of each being what the text begins with (bos).
            progress: called with the number of tokens done.
        """
        windows = plan_windows([len(text) for text in texts], self.context, self.stride)
        scores = [
            TextScores(np.zeros(len(t) - 1, np.float32), np.zeros(len(t) - 1, bool), np.zeros(len(t) - 1, bool))
            for t in texts
        ]
        waiting = [Request(w.text, list(texts[w.text][w.start : w.stop]), SamplingParams()) for w in windows]
        begin = 0
        while begin < len(waiting):
            end = begin + 1
            while end < len(waiting) and self.can_hold(waiting[begin : end + 1]):
                end += 1
            group = waiting[begin:end]
            for window, (token_ids, logprobs, drafts) in zip(
                windows[begin:end], self._expectations(group), strict=True
            ):
                self._enter(scores[window.text], window, texts[window.text], token_ids, logprobs, drafts)
                if progress is not None:
                    progress(window.stop - window.first_scored)
            begin = end
        return scores

    def _enter(
        self,
        scores: TextScores,
        window: Window,
        text: Sequence[int],
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        drafts: np.ndarray | None,
    ) -> None:
        """Write the scored part of a window; token t is expected at t - 1, and drafted at t - 2."""
        first, stop, start = window.first_scored, window.stop, window.start
        scores.logprobs[first - 1 : stop - 1] = logprobs[first - 1 - start : stop - 1 - start]
        expected = token_ids[first - 1 - start : stop - 1 - start]
        scores.is_top1[first - 1 : stop - 1] = expected == np.asarray(text[first:stop])
        if drafts is not None:
            begin = max(first, start + 2)  # nothing is drafted before two tokens have been seen
            agrees = drafts[begin - 2 - start : stop - 2 - start] == token_ids[begin - 1 - start : stop - 1 - start]
            scores.draft_agrees[begin - 1 : stop - 1] = agrees

    def _expectations(self, windows: Sequence[Request]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Run windows through as many steps as they need; yield each one's arrays `[tokens]`, in order."""
        tables = [self.pool.take(blocks_for(len(w.prompt_ids), self.settings.block_size)) for w in windows]
        parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in windows]
        for chunks in plan_chunks([len(w.prompt_ids) for w in windows], self.num_step_tokens, self.max_sequences):
            batch = self.pack(windows, tables, chunks)
            output = score(self.params, self.expert_to_slot, self.cache, batch, spec=self.spec)
            self.cache = output.cache
            self.record_load(output.slot_load)
            found = [output.token_ids, output.logprobs] + ([] if output.draft_ids is None else [output.draft_ids])
            arrays = [np.asarray(array) for array in found]
            begin = 0
            for chunk in chunks:
                end = begin + chunk.stop - chunk.start
                check_finite(arrays[0][begin:end], f"text {windows[chunk.index].request_id}")
                parts[chunk.index].append(tuple(array[begin:end] for array in arrays))
                begin = end
        for table in tables:
            self.pool.free(table)
        for part in parts:
            token_ids, logprobs, *drafts = (np.concatenate(arrays) for arrays in zip(*part, strict=True))
            yield token_ids, logprobs, drafts[0] if drafts else None

"""How many sequences run together under a target for the time per output token (paper table 4)."""

import dataclasses
from collections.abc import Sequence

# Weight of the newest call in the running mean of its size.
_NEWEST = 0.2
# Calls of a size before its mean is believed.
_LEAST_CALLS = 5
# Calls before a size that was too slow is tried again; doubled each time that it fails, up to the second figure.
_PATIENCE, _MOST_PATIENCE = 50, 1600


@dataclasses.dataclass
class _Size:
    """What is known of one number of sequences: seconds per token, from how many calls, and when to try it again."""

    tpot_s: float = 0.0
    num_calls: int = 0
    retry_at: int = 0
    patience: int = _PATIENCE


class SloController:
    """Picks how many sequences a rank decodes together: the most that keep the time per output token at its target.

    Plain arithmetic on what it is told; no clock. It starts with the smallest size, and goes up where a larger one is
    known or expected to hold the target, and down at once where the mean of the present one does not. A size that
    failed is tried again after a while, since contexts grow and shrink.

    Args:
        target_s: seconds per output token (TPOT), drafts that were kept counted as tokens.
        sizes: numbers of sequences that the step is compiled for, ascending.
    """

    def __init__(self, target_s: float, sizes: Sequence[int]) -> None:
        self.target_s = target_s
        self.sizes = list(sizes)
        self.limit = self.sizes[0]
        self._known = {size: _Size() for size in self.sizes}
        self._num_calls = 0

    def observe(self, num_seqs: int, call_s: float, tokens_per_seq: float) -> None:
        """Take note of a call.

        Args:
            num_seqs: sequences of the fullest rank.
            call_s: seconds from the last call's end to this one's.
            tokens_per_seq: mean of the tokens that its sequences got.
        """
        if num_seqs == 0 or tokens_per_seq <= 0:
            return
        self._num_calls += 1
        size = min((one for one in self.sizes if one >= num_seqs), default=self.sizes[-1])
        known, tpot_s = self._known[size], call_s / tokens_per_seq
        # A plain mean of the first few, so that one odd call does not set it.
        weight = max(_NEWEST, 1 / (known.num_calls + 1))
        known.tpot_s += weight * (tpot_s - known.tpot_s)
        known.num_calls += 1
        if size == self.limit and known.num_calls >= _LEAST_CALLS:
            self._adjust(known)

    def _adjust(self, known: _Size) -> None:
        index = self.sizes.index(self.limit)
        if known.tpot_s > self.target_s:
            known.retry_at = self._num_calls + known.patience
            known.patience = min(2 * known.patience, _MOST_PATIENCE)
            known.num_calls = 0  # measured anew when it is tried again
            self.limit = self.sizes[max(index - 1, 0)]
        elif index + 1 < len(self.sizes):
            larger = self.sizes[index + 1]
            other = self._known[larger]
            is_tried = other.retry_at > 0
            if self._num_calls >= other.retry_at and (is_tried or self._expect(larger) <= self.target_s):
                self.limit = larger

    def _expect(self, larger: int) -> float:
        """Seconds per token of a size not tried yet, by the line through the two largest known ones; with one alone,
        the same, so that it is tried."""
        known = [size for size in self.sizes if size < larger and self._known[size].num_calls]
        if len(known) < 2:
            return self._known[self.limit].tpot_s
        low, high = known[-2:]
        slope = (self._known[high].tpot_s - self._known[low].tpot_s) / (high - low)
        return self._known[high].tpot_s + max(slope, 0.0) * (larger - high)

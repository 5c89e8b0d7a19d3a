"""Which of several compiled variants is fastest, found while they work."""

import collections
import math
from collections.abc import Sequence

import numpy as np


class Autotune:
    """Each variant in turn for a few calls, then the best.

    Args:
        variants: to choose from.
    """

    ROUNDS = 4

    def __init__(self, variants: Sequence[int]) -> None:
        self._seconds: dict[int, list[float]] = {variant: [] for variant in variants}

    @property
    def choice(self) -> int:
        """The variant for the next call."""
        untried = [variant for variant, taken in self._seconds.items() if len(taken) < self.ROUNDS]
        if len(self._seconds) > 1 and untried:
            return min(untried, key=lambda variant: len(self._seconds[variant]))
        return min(self._seconds, key=lambda variant: float(np.median(self._seconds[variant] or [0.0])))

    def add(self, variant: int, seconds: float) -> None:
        """Take note of a call, as long as variants are tried."""
        if len(self._seconds[variant]) < self.ROUNDS:
            self._seconds[variant].append(seconds)


_MOST_UNITS = 1024  # of tokens, that work is counted in


class StepTimes:
    """How long steps of a few sizes take, and so how work that has come is best cut into steps.

    Example: where steps for 128, 512 and 2,048 tokens take 30, 45 and 150 ms, 600 tokens are computed sooner as 512 and
    128 than as 2,048 with padding; where they take 100, 110 and 150 ms, they are not.
    """

    NUM_KEPT = 8
    # Steps after which the times of a size that had none since are forgotten, so that it is tried again.
    MOST_AGE = 256

    def __init__(self) -> None:
        self._seconds: dict[int, collections.deque[float]] = {}
        self._newest: dict[int, int] = {}
        self._num_steps = 0

    def add(self, size: int, seconds: float) -> None:
        """Take note of a step for `size` tokens."""
        self._num_steps += 1
        self._newest[size] = self._num_steps
        self._seconds.setdefault(size, collections.deque(maxlen=self.NUM_KEPT)).append(seconds)
        for old in [one for one, newest in self._newest.items() if self._num_steps - newest > self.MOST_AGE]:
            del self._newest[old], self._seconds[old]

    @property
    def token_s(self) -> float | None:
        """Seconds for a token, in steps of the size that takes the least; None where nothing is known."""
        return min((float(np.median(taken)) / size for size, taken in self._seconds.items()), default=None)

    def first_step(self, num_tokens: int, sizes: Sequence[int]) -> int:
        """The largest of the steps for `sizes` tokens (ascending) that together compute `num_tokens` in the least time,
        in the fewest steps where that takes as long.

        A size of which nothing is known is hoped to be as fast as it can be, so that it is tried.
        """
        costs = [self._least_cost(size) for size in sizes]
        unit = max(math.gcd(*sizes), -(-sizes[-1] // _MOST_UNITS))
        # (seconds, steps, largest step) for so many times `unit` tokens.
        best = [(0.0, 0, 0)]
        for count in range(1, -(-num_tokens // unit) + 1):
            options = []
            for size, cost in zip(sizes, costs, strict=True):
                seconds, num_steps, largest = best[max(count - size // unit, 0)]
                options.append((seconds + cost, num_steps + 1, max(largest, size)))
            best.append(min(options))
        return best[-1][2]

    def _least_cost(self, size: int) -> float:
        """Seconds of a step; where they are not known, the least that they can be: those of a smaller step, or as many
        a token as in a larger one; 0 where nothing is known.
        """
        smaller, larger = ([one for one in self._seconds if (one <= size) == is_it] for is_it in (True, False))
        if smaller:
            return float(np.median(self._seconds[max(smaller)]))
        if larger:
            return float(np.median(self._seconds[min(larger)])) * size / min(larger)
        return 0.0

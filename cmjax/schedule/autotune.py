"""Which of several compiled variants is fastest, found while they work."""

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

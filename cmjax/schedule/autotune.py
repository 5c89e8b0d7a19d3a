"""Which of several compiled forms is fastest, found while they work."""

from collections.abc import Sequence

import numpy as np


class Autotune:
    """Each form in turn for a few calls, then the best.

    Args:
        forms: to choose from.
    """

    ROUNDS = 4

    def __init__(self, forms: Sequence[int]) -> None:
        self._seconds: dict[int, list[float]] = {form: [] for form in forms}

    @property
    def choice(self) -> int:
        """The form for the next call."""
        untried = [form for form, taken in self._seconds.items() if len(taken) < self.ROUNDS]
        if len(self._seconds) > 1 and untried:
            return min(untried, key=lambda form: len(self._seconds[form]))
        return min(self._seconds, key=lambda form: float(np.median(self._seconds[form] or [0.0])))

    @property
    def is_settled(self) -> bool:
        """Whether every form has been tried."""
        return all(len(taken) == self.ROUNDS for taken in self._seconds.values())

    def add(self, form: int, seconds: float) -> None:
        """Take note of a call, as long as forms are tried."""
        if len(self._seconds[form]) < self.ROUNDS:
            self._seconds[form].append(seconds)

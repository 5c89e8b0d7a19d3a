"""Stop strings in a text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, and holds back what could still become one.

    Args:
        stops: empty ones end nothing.
        is_shown: the one that is found is part of what may be shown.
    """

    def __init__(self, stops: Sequence[str], is_shown: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._begun = [_Begun(stop) for stop in self._stops]
        self._is_shown = is_shown
        self._held = ""
        self._num_early = 0  # characters of it that came when the text might not end

    def feed(self, text: str, may_end: bool = True) -> tuple[str, str | None]:
        """Take the next piece: `(what may be shown, the stop string that ends it)`.

        Args:
            may_end: whether a stop string may end with this piece; one that has come whole before never counts.
        """
        if not self._stops:
            return text, None
        held = self._held + text
        if not may_end:
            self._num_early = len(held)
        early = self._num_early
        found = [(held.find(stop, max(early - len(stop) + 1, 0)), order) for order, stop in enumerate(self._stops)]
        first = min((one for one in found if one[0] >= 0), default=None)
        if first is not None:
            self._held, stop = "", self._stops[first[1]]
            return held[: first[0]] + (stop if self._is_shown else ""), stop
        keep = max(begun.feed(text) for begun in self._begun)
        self._held = held[len(held) - keep :]
        self._num_early = max(early - (len(held) - keep), 0)
        return held[: len(held) - keep], None

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held, self._num_early = self._held, "", 0
        return held


class _Begun:
    """How much of a stop string a text ends with, as it grows: each character costs the same, however long they are."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._length = 0
        self._shorter = [0, 0]  # beginnings -> the longest shorter one that each ends with; as far as it is known

    def feed(self, text: str) -> int:
        """Length of the longest end of all text so far that is a beginning of the stop string, but not all of it."""
        stop, length = self._stop, self._length
        for character in text:
            while length and stop[length] != character:
                length = self._shorter_of(length)
            length += stop[length] == character
            if length == len(stop):
                length = self._shorter_of(length)
        self._length = length
        return length

    def _shorter_of(self, length: int) -> int:
        stop, known = self._stop, self._shorter
        while len(known) <= length:
            one = known[-1]
            character = stop[len(known) - 1]
            while one and stop[one] != character:
                one = known[one]
            known.append(one + (stop[one] == character))
        return known[length]

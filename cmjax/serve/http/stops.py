"""Stop strings in a text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, and holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take the next piece: `(what may be shown, the stop string that ends it)`."""
        if not self._stops:
            return text, None
        held = self._held + text
        found = [(held.find(stop), order) for order, stop in enumerate(self._stops)]
        first = min((one for one in found if one[0] >= 0), default=None)
        if first is not None:
            self._held = ""
            return held[: first[0]], self._stops[first[1]]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

"""How many instances of each role: the ratio of prefill to decode follows the load (paper section 4.1)."""

import dataclasses
from collections.abc import Sequence

from cmjax.schedule.stats import EngineStats, InstanceStats, Role


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Fewest and most instances of a role."""

    least: int
    most: int


@dataclasses.dataclass(frozen=True)
class Change:
    """What to do next: bring up an instance of a role, or take one out by name."""

    add: Role | None = None
    remove: str | None = None


class RatioPolicy:
    """Decides when a role gets another instance, and when it gives one up.

    Plain arithmetic on statistics; `now` is an argument. How loaded prefill is says the share of time that its
    instances work, how loaded decode is the share of its places that are taken; and a role is loaded only while
    requests wait. One that is for `patience_s` gets an instance, on free devices, or on those of the other role where
    that one idles; one that idles for as long gives one up.

    Args:
        bounds: of each role.
        high, low: shares above which a role is loaded, and below which it idles.
        patience_s: how long it must be so.
    """

    def __init__(
        self, bounds: dict[Role, Bounds], *, high: float = 0.85, low: float = 0.3, patience_s: float = 10.0
    ) -> None:
        self.bounds, self.high, self.low, self.patience_s = bounds, high, low, patience_s
        self._last: tuple[float, EngineStats] | None = None
        self._since: dict[tuple[Role, str], float] = {}

    def decide(self, now: float, stats: EngineStats, can_add: dict[Role, bool]) -> Change | None:
        """What the statistics of this moment call for.

        Args:
            now: seconds.
            stats: the engine's; called again and again, so that busy shares can be told.
            can_add: whether devices are free for another instance of a role.
        """
        previous, self._last = self._last, (now, stats)
        if previous is None or now <= previous[0]:
            return None
        states = {role: self._state(role, now, stats, previous) for role in self.bounds}
        lasting = {role: state for role, state in states.items() if self._lasts(role, state, now)}
        roles: tuple[tuple[Role, Role], ...] = (("prefill", "decode"), ("decode", "prefill"))
        for role, other in roles:
            if lasting.get(role) == "loaded" and self._count(role, stats) < self.bounds[role].most:
                if can_add[role]:
                    return self._changed(Change(add=role))
                if states[other] == "idle" and self._count(other, stats) > self.bounds[other].least:
                    return self._changed(Change(remove=self._least_busy(other, stats)))
        for role in self.bounds:
            if lasting.get(role) == "idle" and self._count(role, stats) > self.bounds[role].least:
                return self._changed(Change(remove=self._least_busy(role, stats)))
        return None

    def _state(self, role: Role, now: float, stats: EngineStats, previous: tuple[float, EngineStats]) -> str:
        ours = _ready(role, stats)
        if role == "decode":
            taken = sum(one.num_running + one.num_waiting for one in ours)
            share = taken / max(sum(one.num_places for one in ours), 1)
        else:
            before = {one.name: one.busy_s for one in previous[1].instances}
            busy = sum(one.busy_s - before.get(one.name, one.busy_s) for one in ours)
            share = busy / (max(len(ours), 1) * (now - previous[0]))
        waits = stats.num_waiting > 0 or (role == "prefill" and any(one.num_waiting for one in ours))
        if share >= self.high and waits:
            return "loaded"
        return "idle" if share <= self.low else "even"

    def _lasts(self, role: Role, state: str, now: float) -> bool:
        for key in [key for key in self._since if key[0] == role and key[1] != state]:
            del self._since[key]
        return now - self._since.setdefault((role, state), now) >= self.patience_s

    def _changed(self, change: Change) -> Change:
        self._since.clear()
        return change

    def _count(self, role: Role, stats: EngineStats) -> int:
        return len(_ready(role, stats))

    def _least_busy(self, role: Role, stats: EngineStats) -> str:
        return min(_ready(role, stats), key=lambda one: (one.num_running + one.num_waiting, one.busy_s, one.name)).name


def _ready(role: Role, stats: EngineStats) -> Sequence[InstanceStats]:
    return [one for one in stats.instances if one.role == role and one.status == "ready"]

"""The scheduler of an engine: which request goes next, where it is prefilled and decodes, and what becomes of it when
something fails (paper sections 2 and 4.3.3).

Policy alone: no arrays of a device, threads or clocks. Any prefill instance may take any request and any decode rank
any sequence, by load only, wherever a cache happens to lie.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cmjax.schedule.decode import DecodePlanner
from cmjax.schedule.planner import Planner
from cmjax.schedule.prefill import PrefillPlanner
from cmjax.schedule.request import Attempt, FinishReason, Request, RequestUpdate
from cmjax.schedule.stats import CacheStats, Role
from cmjax.schedule.transfer import Transfer, plan_rounds
from cmjax.schedule.waiting import WaitingQueue

MAX_FAILURES = 3


class Scheduler:
    """Requests, attempts, hand-offs and the planners of all instances; the `Owner` of what the planners work on.

    The request whose turn it is waits for room and holds up those behind it: a long prompt is not overtaken for ever by
    short ones.

    Args:
        handoff_timeout_s: how long a hand-off may take.

    Attributes:
        prefill, decode: planners by name.
        num_...: counts since the start.
        cache_counts: of the prefix cache.
    """

    def __init__(self, handoff_timeout_s: float) -> None:
        self.handoff_timeout_s = handoff_timeout_s
        self.prefill: dict[str, PrefillPlanner] = {}
        self.decode: dict[str, DecodePlanner] = {}
        self.waiting = WaitingQueue()
        self.num_running = 0
        self.num_preemptions = self.num_handoffs = self.num_failed_handoffs = 0
        self.num_prompt_tokens = self.num_generation_tokens = 0
        self.cache_counts = CacheStats()
        self._transfers: dict[int, Transfer] = {}
        self._transfer_of: dict[int, Transfer] = {}  # attempt's id -> its hand-off
        self._past_drafts = np.zeros(1, np.int64)  # of instances that have been taken out
        self._changed: dict[Request, None] = {}
        self._ids = itertools.count()

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Take a new request."""
        self.waiting.submit(request)
        if self.waiting.first() is request:
            self.admit()
        self._fail_hopeless()

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is. What a plan under way has of it is free when that has been committed."""
        if request.finish_reason is None:
            self._end(request, "abort")
            self.admit()

    def take_updates(self) -> list[tuple[Request, RequestUpdate]]:
        """Return and forget what is new of all requests."""
        changed, self._changed = self._changed, {}
        return [(request, request.take_update()) for request in changed]

    @property
    def has_updates(self) -> bool:
        """Whether `take_updates` would return any."""
        return bool(self._changed)

    @property
    def kept_drafts(self) -> np.ndarray:
        """`int64[k + 1]`, in how many of the requests' steps 0, 1, ... k drafts were kept."""
        return sum((one.kept_drafts for one in self.decode.values()), self._past_drafts)

    # -- instances ----------------------------------------------------------------------------------------------------

    @property
    def planners(self) -> list[Planner]:
        """All, prefill first."""
        return [*self.prefill.values(), *self.decode.values()]

    def planner(self, name: str) -> Planner:
        """An instance's, by name."""
        return self.prefill[name] if name in self.prefill else self.decode[name]

    def of_role(self, role: Role) -> list[Planner]:
        """Those of a role."""
        return [one for one in self.planners if one.role == role]

    def lose(self, name: str, error: BaseException) -> None:
        """An instance is gone with all it held: its requests start over elsewhere."""
        self.planner(name).lose(error)
        self._fail_hopeless()

    def remove(self, name: str) -> None:
        """Take an instance out; what it has starts over elsewhere, through no fault of anybody's."""
        planner = self.planner(name)
        for attempt in list(planner.attempts.values())[::-1]:
            self._restart(attempt)
        planner.close(RuntimeError(f"{name} has been taken out"))
        if name in self.decode:
            self._past_drafts = self._past_drafts + self.decode[name].kept_drafts
        self.prefill.pop(name, None)
        self.decode.pop(name, None)
        self._fail_hopeless()
        self.admit()

    # -- time and place -----------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Start over those whose latents have been on their way for too long; admit what has room."""
        for transfer in [one for one in self._transfers.values() if now > one.deadline]:
            error = f"its KV did not arrive at {transfer.target} within {self.handoff_timeout_s:g} s"
            self._fail_transfer(transfer, error, transfer.target)
        self._fail_hopeless()
        self.admit()

    def admit(self) -> None:
        """Give waiting requests their places: first on the decode side, then with the prefill instance that has the
        least to do."""
        while (request := self.waiting.first()) is not None:
            attempt = self._place(request)
            if attempt is None:
                return
            self.waiting.remove(request)
            request.attempt = attempt
            self.num_running += 1
            self.waiting.served(request.tenant, attempt.num_prefill)
            self.prefill[attempt.source].add(attempt)

    # -- told by the planners -----------------------------------------------------------------------------------------

    def generated(self, taken: Sequence[tuple[Request, int]], num_prompt_tokens: int = 0) -> None:
        """Requests have got so many tokens each, perhaps none; see `Owner`."""
        self.num_prompt_tokens += num_prompt_tokens
        by_tenant: dict[str, int] = defaultdict(int)
        for request, num_tokens in taken:
            by_tenant[request.tenant] += num_tokens
            self._changed[request] = None
        for tenant, num_tokens in by_tenant.items():
            self.num_generation_tokens += num_tokens
            self.waiting.served(tenant, num_tokens)

    def finish(self, request: Request) -> None:
        """A request has all its tokens; its `finish_reason` is set."""
        assert request.finish_reason is not None
        self._end(request, request.finish_reason)

    def refuse(self, request: Request, error: str) -> None:
        """A request ends with an error of its own making."""
        self._end(request, "error", error)

    def hit(self, attempt: Attempt, error: str, at: str) -> None:
        """What was under way for an attempt is lost through a failure at an instance: its request starts over from its
        tokens, elsewhere where there is an elsewhere, or ends with `error` if that has happened too often."""
        request = attempt.request
        request.num_failures, request.failed_at = request.num_failures + 1, at
        if request.num_failures >= MAX_FAILURES:
            self._end(request, "error", error)
        else:
            self._restart(attempt)

    def preempt(self, attempt: Attempt) -> None:
        """An attempt makes room; its request starts over when there is some."""
        self.num_preemptions += 1
        attempt.request.num_preemptions += 1
        self._restart(attempt)

    def hand_off(self, source: str, target: str, step: int, ended: Sequence[tuple[Attempt, int]], now: float) -> None:
        """Send prompts that a step of `source` has ended, with their rows in it, to the places reserved for them."""
        attempts, rows = [attempt for attempt, _ in ended], [row for _, row in ended]
        planner = self.decode[target]
        ranks = [attempt.decode.rank for attempt in attempts if attempt.decode is not None]
        lengths = [attempt.num_prefill for attempt in attempts]
        transfer = Transfer(
            id=next(self._ids),
            source=source,
            target=target,
            step=step,
            deadline=now + self.handoff_timeout_s,
            attempts=attempts,
            step_rows=rows,
            rounds=plan_rounds(ranks, lengths, planner.sizes.round_tokens),
            missing={attempt.id: attempt.num_prefill for attempt in attempts},
        )
        self._transfers[transfer.id] = transfer
        for attempt in attempts:
            attempt.stage = "handoff"
            self._transfer_of[attempt.id] = transfer
        self.prefill[source].send(transfer)

    def sending_failed(self, transfer_id: int, error: str) -> None:
        """A round of a hand-off could not be sent."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._fail_transfer(transfer, f"its KV could not be sent to {transfer.target}: {error}", transfer.source)

    def arrived(self, attempt: Attempt) -> None:
        """A prompt is whole at its decode instance."""
        self.num_handoffs += 1
        attempt.stage = "decode"
        self._leave_transfer(attempt)

    def transfer(self, transfer_id: int) -> Transfer | None:
        """A hand-off that somebody still waits for."""
        return self._transfers.get(transfer_id)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _place(self, request: Request) -> Attempt | None:
        """Choose and reserve; None, and nothing is held, where there is no room."""
        sources = [one for one in self.prefill.values() if one.has_room and one.model == request.model]
        if not sources:
            return None
        # After a failure, rather somebody else; the load decides among equals.
        source = min(sources, key=lambda one: (one.name == request.failed_at, one.load, one.name))
        attempt = Attempt(next(self._ids), request, source.name, None, request.num_cached)
        if request.will_decode:
            targets = [one for one in self.decode.values() if one.status == "ready" and one.model == request.model]
            for target in sorted(targets, key=lambda one: (one.name == request.failed_at, one.load, one.name)):
                if target.reserve(attempt):
                    attempt.target = target.name
                    break
            else:
                return None
        return attempt

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        if request.attempt is None:
            self.waiting.remove(request)
        else:
            self._end_attempt(request.attempt)
        request.finish_reason, request.error = reason, error
        self._changed[request] = None

    def _restart(self, attempt: Attempt) -> None:
        self._end_attempt(attempt)
        self.waiting.add(attempt.request, first=True)

    def _end_attempt(self, attempt: Attempt) -> None:
        """Give back all that an attempt holds; from now on nothing has an effect on it."""
        self._leave_transfer(attempt)
        for planner in (self.prefill.get(attempt.source), self.decode.get(attempt.target or "")):
            if planner is not None:
                planner.drop(attempt)
        attempt.end()
        attempt.request.attempt = None
        self.num_running -= 1

    def _leave_transfer(self, attempt: Attempt) -> None:
        transfer = self._transfer_of.pop(attempt.id, None)
        if transfer is not None:
            del transfer.missing[attempt.id]
            if not transfer.missing:
                del self._transfers[transfer.id]

    def _fail_transfer(self, transfer: Transfer, error: str, at: str) -> None:
        for attempt in transfer.attempts[::-1]:
            if attempt.id in transfer.missing:
                self.num_failed_handoffs += 1
                self.hit(attempt, f"{attempt.request.request_id}: {error}", at)

    def _fail_hopeless(self) -> None:
        """End what waits for a role that no instance has any more."""
        if not self.waiting:
            return
        for role in ("prefill", "decode"):
            if all(one.is_lost or one.is_draining for one in self.of_role(role)):
                for request in [one for one in self.waiting if role == "prefill" or one.will_decode]:
                    self._end(request, "error", f"{request.request_id}: no {role} instance is left")

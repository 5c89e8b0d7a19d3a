"""The global scheduler: which request goes next, where it decodes, and who prefills it (paper sections 2 and 4.3.3).

Policy alone: no arrays, threads or clocks. Those who run steps tell it what has happened, and it says what follows. Any
prefill instance may take any request and any decode rank any sequence, by load only, wherever a cache happens to lie.
"""

import dataclasses
from collections import defaultdict, deque
from collections.abc import Iterator

from cmjax.serve.request import FinishReason, Request
from cmjax.serve.router import DecodeRouter, PrefillRouter
from cmjax.serve.stats import Status

MAX_FAILURES = 3


@dataclasses.dataclass
class PrefillPeer:
    """A prefill instance, as the scheduler sees it.

    Attributes:
        step_tokens: of one of its steps; it is given about two steps of work, so that what waits can still be put in
            another order, or elsewhere.
    """

    router: PrefillRouter
    step_tokens: int
    status: Status = "ready"


@dataclasses.dataclass
class DecodePeer:
    """A decode instance, as the scheduler sees it; `call_tokens`: what a sequence can gain in a call."""

    router: DecodeRouter
    call_tokens: int
    status: Status = "ready"


class Scheduler:
    """Requests and peers.

    Waiting requests go by priority; of one priority, tenants take turns by what they have been served (prompt and
    generated tokens), each tenant's requests in the order they came. The one whose turn it is waits for room and holds
    up those behind it: a long prompt is not overtaken for ever by short ones.

    Attributes:
        prefill, decode: the peers by name.
        handoffs: request -> when its prefill ended, for those whose latents are on their way.
    """

    def __init__(self, handoff_timeout_s: float) -> None:
        self.handoff_timeout_s = handoff_timeout_s
        self.prefill: dict[str, PrefillPeer] = {}
        self.decode: dict[str, DecodePeer] = {}
        self.handoffs: dict[Request, float] = {}
        self.num_preemptions = 0
        self.num_failed_handoffs = 0
        self._waiting: dict[int, dict[str, deque[Request]]] = defaultdict(dict)
        self._served: dict[str, float] = defaultdict(float)
        self._ended: list[Request] = []

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests without a place."""
        return sum(len(queue) for tenants in self._waiting.values() for queue in tenants.values())

    @property
    def num_running(self) -> int:
        """Requests that prefill, travel or decode."""
        at_prefill = sum(not request.will_decode for peer in self.prefill.values() for request in peer.router.queue)
        return at_prefill + sum(peer.router.num_requests for peer in self.decode.values())

    def submit(self, request: Request) -> None:
        """Take a new request."""
        active = {tenant for tenants in self._waiting.values() for tenant, queue in tenants.items() if queue}
        if request.tenant not in active:
            # One that asked for nothing has saved up nothing.
            least = min((self._served[tenant] for tenant in active), default=0.0)
            self._served[request.tenant] = max(self._served[request.tenant], least)
        self._enqueue(request)

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is. One that a step is working on may only be cancelled between its calls."""
        if request.stage != "done":
            self._end(request, "abort")

    def fail(self, request: Request, error: str) -> None:
        """End a request with an error."""
        if request.stage != "done":
            self._end(request, "error", error)

    def finish(self, request: Request) -> None:
        """End a request that has all its tokens; its `finish_reason` is set."""
        assert request.finish_reason is not None
        self._end(request, request.finish_reason)

    @property
    def has_ended(self) -> bool:
        """Whether `take_ended` would return any."""
        return bool(self._ended)

    def take_ended(self) -> list[Request]:
        """Return and forget the requests that have ended."""
        ended, self._ended = self._ended, []
        return ended

    # -- the way of a request -----------------------------------------------------------------------------------------

    def admit(self) -> list[Request]:
        """Give waiting requests their places: first on the decode side, then with the prefill instance that has the
        least to do; returns those that were given one."""
        admitted = []
        while (request := self._first_waiting()) is not None and self._place(request):
            self._dequeue(request)
            request.stage = "prefill"
            request.num_attempts += 1
            self._served[request.tenant] += request.num_cached
            self.prefill[request.prefill_name].router.add(request)
            admitted.append(request)
        return admitted

    def prefilled(self, request: Request, now: float) -> None:
        """A prompt has been computed, and its latents are about to travel; the prefill side needs it no longer after
        `PrefillRouter.release`."""
        request.stage = "handoff"
        self.handoffs[request] = now

    def handed_off(self, request: Request) -> None:
        """Its latents have arrived: it decodes from now on."""
        self.handoffs.pop(request, None)
        request.stage = "decode"

    def send_again(self, request: Request, error: str) -> None:
        """What was under way for a request is lost: start over from its tokens, elsewhere where there is an elsewhere,
        or end it with `error` if that has happened too often."""
        if request.stage == "done":
            return
        request.num_failures += 1
        self._leave(request)
        if request.num_failures >= MAX_FAILURES:
            self.fail(request, error)
        else:
            self._enqueue(request, first=True)

    def expire(self, now: float) -> None:
        """Send again those whose latents have been on their way for too long."""
        for request, since in list(self.handoffs.items()):
            if now - since > self.handoff_timeout_s:
                self.num_failed_handoffs += 1
                self.send_again(
                    request,
                    f"{request.request_id}: its KV did not arrive at {request.decode_name} within "
                    f"{self.handoff_timeout_s:g} s",
                )

    def before_call(self, name: str) -> bool:
        """Give the sequences of a decode instance their blocks for the next call, and take places from the least
        urgent where there are too few; returns whether any was preempted."""
        peer = self.decode[name]
        preempted = peer.router.grow(peer.call_tokens)
        for request in preempted:
            self.num_preemptions += 1
            if request.handle is not None:
                request.handle.num_preemptions += 1
            self._enqueue(request, first=True)
        return bool(preempted)

    def generated(self, request: Request, num_tokens: int) -> None:
        """A request has got so many tokens."""
        self._served[request.tenant] += num_tokens

    # -- peers --------------------------------------------------------------------------------------------------------

    def peer(self, name: str) -> PrefillPeer | DecodePeer:
        """An instance by name."""
        return self.prefill[name] if name in self.prefill else self.decode[name]

    def forget(self, name: str) -> None:
        """An instance has been taken out; it holds nothing any more."""
        self.prefill.pop(name, None)
        self.decode.pop(name, None)

    def move_all(self, name: str) -> None:
        """Have the requests of an instance start over elsewhere, through no fault of anybody's."""
        for request in list(self.requests_of(name)):
            self._leave(request)
            self._enqueue(request, first=True)

    def lose(self, name: str, error: str, status: Status = "lost") -> None:
        """An instance is gone with all it held: its requests start over elsewhere."""
        self.peer(name).status = status
        for request in list(self.requests_of(name)):
            self.send_again(request, error)
        self.fail_hopeless()

    def requests_of(self, name: str) -> Iterator[Request]:
        """The requests that an instance holds, or that are on their way to it."""
        if name in self.prefill:
            yield from self.prefill[name].router.queue
            yield from (r for r in self.handoffs if r.prefill_name == name)
        else:
            yield from self.decode[name].router.placed()

    def is_idle(self, name: str) -> bool:
        """Whether an instance holds no request."""
        return next(self.requests_of(name), None) is None

    def fail_hopeless(self) -> None:
        """End what waits for a role that no instance has any more."""
        for role, peers in (("prefill", self.prefill), ("decode", self.decode)):
            if all(peer.status == "lost" for peer in peers.values()):
                for request in list(self._all_waiting()):
                    if role == "prefill" or request.will_decode:
                        self.fail(request, f"{request.request_id}: no {role} instance is left")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _place(self, request: Request) -> bool:
        """Choose and reserve; False, and nothing is held, where there is no room."""
        sources = [
            (peer.router.load, name)
            for name, peer in self.prefill.items()
            if peer.status == "ready" and peer.router.load < 2 * peer.step_tokens
        ]
        if not sources:
            return False
        # After a failure, rather somebody else; the load decides among equals.
        source = min(sources, key=lambda one: (bool(request.num_failures) and one[1] == request.prefill_name, *one))[1]
        if request.will_decode:
            targets = [(peer.router.load, name) for name, peer in self.decode.items() if peer.status == "ready"]
            for _, name in sorted(targets):
                if self.decode[name].router.reserve(request, self.decode[name].call_tokens):
                    request.decode_name = name
                    break
            else:
                return False
        request.prefill_name = source
        return True

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self._leave(request)
        request.stage, request.finish_reason, request.error = "done", reason, error
        self._ended.append(request)

    def _leave(self, request: Request) -> None:
        """Give back all that a request holds."""
        if request.stage == "waiting":
            self._dequeue(request)
            return
        self.handoffs.pop(request, None)
        if request.prefill_blocks or request.stage == "prefill":
            self.prefill[request.prefill_name].router.release(request)
        if request.decode_rank >= 0:
            self.decode[request.decode_name].router.release(request)

    def _enqueue(self, request: Request, first: bool = False) -> None:
        request.stage = "waiting"
        queue = self._waiting[request.priority].setdefault(request.tenant, deque())
        if first:
            queue.appendleft(request)
        else:
            queue.append(request)

    def _dequeue(self, request: Request) -> None:
        tenants = self._waiting[request.priority]
        tenants[request.tenant].remove(request)
        if not tenants[request.tenant]:
            del tenants[request.tenant]
        if not tenants:
            del self._waiting[request.priority]

    def _first_waiting(self) -> Request | None:
        if not self._waiting:
            return None
        tenants = self._waiting[min(self._waiting)]
        tenant = min(tenants, key=lambda one: (self._served[one], tenants[one][0].arrival, one))
        return tenants[tenant][0]

    def _all_waiting(self) -> Iterator[Request]:
        for tenants in list(self._waiting.values()):
            for queue in list(tenants.values()):
                yield from list(queue)

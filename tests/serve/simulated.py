"""A cluster without arrays: the scheduler and the routers of the engine, with steps that take virtual time."""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Sequence

from cmjax.serve import SamplingParams
from cmjax.serve.request import Request
from cmjax.serve.router import DecodeRouter, PrefillRouter
from cmjax.serve.scheduler import DecodePeer, PrefillPeer, Scheduler


def token_after(tokens: Sequence[int]) -> int:
    """The "model": the next token follows from all before it, so that a lost or doubled one shows."""
    return (31 * tokens[-1] + 7 * len(tokens) + sum(tokens)) % 9973


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What a request must end with."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(token_after(tokens))
    return tokens[len(prompt) :]


@dataclasses.dataclass
class Cluster:
    """Instances that take steps one after another, each in its own virtual time.

    Attributes:
        prefill_s, call_s: seconds of a prefill step of so many tokens, of a decode call of so many sequences.
        handoff_s: seconds of the n-th hand-off; None: it never arrives.
    """

    prefill_s: Callable[[int], float] = lambda tokens: 0.1 + tokens / 1000
    call_s: Callable[[int], float] = lambda seqs: 0.2 + seqs / 100
    handoff_s: Callable[[int], float | None] = lambda index: 0.05
    num_steps: int = 4
    step_tokens: int = 64
    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(self.timeout_s)
        self.requests: list[Request] = []
        self.call_times: list[float] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._busy: set[str] = set()
        self._num_handoffs = itertools.count()

    def add_prefill(self, name: str, num_blocks: int = 64, block_size: int = 4) -> None:
        self.scheduler.prefill[name] = PrefillPeer(PrefillRouter(num_blocks, block_size), self.step_tokens)

    def add_decode(self, name: str, ranks: int = 4, places: int = 2, num_blocks: int = 64, block_size: int = 4) -> None:
        router = DecodeRouter(ranks, places, num_blocks, block_size, max_blocks=64)
        self.scheduler.decode[name] = DecodePeer(router, self.num_steps)

    def submit(self, prompt: Sequence[int], max_tokens: int, at: float = 0.0, **fields) -> Request:
        name = f"request {len(self.requests)}"
        request = Request(name, list(prompt), SamplingParams(max_tokens=max_tokens), arrival=at, **fields)
        self.requests.append(request)
        self.at(at, lambda: self.scheduler.submit(request))
        return request

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), action))

    def run(self, until: float = 10_000.0) -> None:
        """Let time pass until nothing happens any more."""
        while self._events:
            when, _, action = heapq.heappop(self._events)
            assert when <= until, "nothing comes to an end"
            self.now = max(self.now, when)
            action()
            self._start_what_can()

    def _start_what_can(self) -> None:
        scheduler = self.scheduler
        scheduler.expire(self.now)
        scheduler.admit()
        scheduler.fail_hopeless()
        scheduler.take_ended()
        for name, peer in scheduler.prefill.items():
            if name not in self._busy and peer.status != "lost":
                chunks = peer.router.next_step(self.step_tokens, 8)
                if chunks:
                    self._busy.add(name)
                    tokens = sum(c.stop - c.start for c in chunks)
                    self.at(self.now + self.prefill_s(tokens), lambda n=name, c=chunks: self._end_prefill(n, c))
        for name, peer in scheduler.decode.items():
            if name not in self._busy and peer.status != "lost" and peer.router.running():
                scheduler.before_call(name)
                batch = [request for some in peer.router.batch() for request in some]
                if batch:
                    self._busy.add(name)
                    self.at(self.now + self.call_s(len(batch)), lambda n=name, b=batch: self._end_call(n, b))

    def _end_prefill(self, name: str, chunks) -> None:
        self._busy.discard(name)
        peer = self.scheduler.prefill[name]
        if peer.status == "lost":
            return
        for request in peer.router.computed(chunks):
            if not request.is_resumed:
                request.append([token_after(request.prompt_ids)])
            if request.finish_reason:
                self.scheduler.finish(request)
                continue
            self.scheduler.prefilled(request, self.now)
            peer.router.release(request)
            seconds, attempt = self.handoff_s(next(self._num_handoffs)), request.num_attempts
            when = self.timeout_s + 0.01 if seconds is None else seconds
            self.at(self.now + when, lambda r=request, a=attempt, s=seconds: self._arrive(r, a, s))

    def _arrive(self, request: Request, attempt: int, seconds: float | None) -> None:
        if seconds is not None and request.num_attempts == attempt and request.stage == "handoff":
            self.scheduler.handed_off(request)

    def _end_call(self, name: str, batch: Sequence[Request]) -> None:
        self._busy.discard(name)
        self.call_times.append(self.now)
        if self.scheduler.decode[name].status == "lost":
            return
        for request in batch:
            held = len(request.decode_blocks) * 4
            for _ in range(self.num_steps):
                if request.finish_reason:
                    break
                assert request.num_cached < held, "a token without a block"
                tokens = [*request.prompt_ids, *request.token_ids]
                request.append([token_after(tokens)])
                self.scheduler.generated(request, 1)
            if request.finish_reason:
                self.scheduler.finish(request)

    def check_nothing_is_held(self) -> None:
        """No block, place or entry is left behind."""
        scheduler = self.scheduler
        assert scheduler.num_waiting == scheduler.num_running == 0
        assert not scheduler.handoffs
        for peer in scheduler.prefill.values():
            if peer.status != "lost":
                assert peer.router.pool.num_free == peer.router.pool.num_blocks
        for peer in scheduler.decode.values():
            assert peer.router.num_requests == 0
            assert all(pool.num_free == pool.num_blocks for pool in peer.router.pools)

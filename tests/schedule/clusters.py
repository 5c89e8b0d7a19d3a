"""Small clusters in virtual time, with requests by number."""

import itertools
from collections.abc import Sequence

from cmjax.schedule import (
    SERVING_SHAPES,
    Attempt,
    BlockChain,
    CacheSizes,
    CacheStats,
    DecodePlan,
    DecodeSizes,
    DecodeVariant,
    Plan,
    Planner,
    PrefillPlan,
    PrefillSizes,
    PrefillVariant,
    Request,
    RequestTimes,
    Role,
    SamplingParams,
    SamplingShape,
    Transfer,
    plan_rounds,
)
from cmjax.schedule.virtual import VirtualCluster, VirtualNames, token_after
from tests.schedule.invariants import check_scheduler

BLOCK = 4


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What a request in virtual time must end with."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(token_after(tokens))
    return tokens[len(prompt) :]


def logprob_of(token_id: int) -> float:
    """The "log probability" of a token in virtual time."""
    return -float(token_id)


def prefill_sizes(
    num_blocks: int = 64,
    *,
    step_tokens: int = 64,
    num_places: int = 8,
    shapes: Sequence[SamplingShape] = SERVING_SHAPES,
    cache: CacheSizes | None = None,
) -> PrefillSizes:
    """Of a prefill instance: two sizes of each kind of step."""
    sizes = sorted({max(step_tokens // 4, 1), step_tokens})
    variants = tuple(PrefillVariant(size, shape) for shape in shapes for size in sizes)
    return PrefillSizes(num_blocks, BLOCK, num_places, variants, cache=cache)


def decode_sizes(
    num_ranks: int = 4,
    num_places: int = 2,
    num_blocks: int = 64,
    *,
    max_blocks: int = 64,
    num_steps: int = 4,
    num_drafts: int = 0,
    round_tokens: int = 256,
    shapes: Sequence[SamplingShape] = SERVING_SHAPES,
) -> DecodeSizes:
    """Of a decode instance: a call for one sequence a rank, and for all, of each kind."""
    variants = tuple(
        DecodeVariant(num_slots, num_steps, shape) for shape in shapes for num_slots in sorted({1, num_places})
    )
    return DecodeSizes(num_ranks, num_places, num_blocks, BLOCK, max_blocks, variants, num_drafts, round_tokens)


def run_s(plan: Plan) -> float:
    """Steps take longer the more there is in them, the halves of a hand-off next to nothing."""
    if isinstance(plan, PrefillPlan):
        return 0.1 + len(plan.token_ids) / 1000
    return 0.2 + len(plan.places) / 100 if isinstance(plan, DecodePlan) else 0.01


def make_chain(block_tokens: int = BLOCK, namespace: str = "") -> BlockChain:
    """Names of a request's cached blocks."""
    return BlockChain(VirtualNames(block_tokens), f"a model, {namespace}".encode(), namespace)


def make_request(index: int, prompt: Sequence[int], max_tokens: int = 2, at: float = 0.0, **fields) -> Request:
    """What is no field of a request is one of its sampling."""
    own = {name: fields.pop(name) for name in ("priority", "tenant", "model", "chain") if name in fields}
    sampling = SamplingParams(max_tokens=max_tokens, **fields)
    return Request(f"request {index}", list(prompt), sampling, times=RequestTimes(at), **own)


class Cluster(VirtualCluster):
    """A cluster that keeps its requests, and the plans that have come to their ends, as (name, plan)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.requests: list[Request] = []
        self.ended: list[tuple[str, Plan]] = []
        self.places: dict[tuple[Role, Request], str] = {}  # where each has been prefilled, and has decoded, last
        failure = self.failure

        def noted(name: str, plan: Plan) -> Exception | None:
            self.ended.append((name, plan))
            planner = self.scheduler.prefill.get(name) or self.scheduler.decode.get(name)
            if planner is not None and isinstance(plan, PrefillPlan | DecodePlan):
                for attempt_id in plan.attempt_ids.tolist():
                    if attempt_id in planner.attempts:
                        self.places[planner.role, planner.attempts[attempt_id].request] = name
            return failure(name, plan)

        self.failure = noted

    def count(self, kind: type, name: str = "") -> int:
        """Plans of a kind that have come to their end, of all instances or of one."""
        return sum(isinstance(plan, kind) and name in ("", whose) for whose, plan in self.ended)

    def submit(self, prompt: Sequence[int], max_tokens: int, at: float = 0.0, **fields) -> Request:
        """A request that comes at `at`."""
        request = make_request(len(self.requests), prompt, max_tokens, at, **fields)
        self.requests.append(request)
        self.at(at, lambda: self.scheduler.submit(request))
        return request

    def assert_all_right(self, requests: Sequence[Request] | None = None) -> None:
        """These, or all, have ended with all their tokens, and nothing is held."""
        for request in self.requests if requests is None else requests:
            assert request.finish_reason == "length", (request.request_id, request.finish_reason, request.error)
            assert request.token_ids == expected_tokens(request.prompt_ids, request.sampling.max_tokens)
        self.check_nothing_is_held()

    def check_nothing_is_held(self) -> None:
        """No block, place or entry is left behind."""
        check_scheduler(self.scheduler)
        assert len(self.scheduler.waiting) == self.scheduler.num_running == 0
        for planner in self.scheduler.planners:
            assert planner.is_idle
            assert planner.under_way is None
            assert planner.stats().num_used_blocks == 0


def small_cluster(num_prefill: int = 2, num_decode: int = 1, step_tokens: int = 64, **fields) -> Cluster:
    """A few instances."""
    cluster = Cluster(**{"run_s": run_s} | fields)
    for index in range(num_prefill):
        cluster.add_prefill(f"prefill{index}", prefill_sizes(step_tokens=step_tokens))
    for index in range(num_decode):
        cluster.add_decode(f"decode{index}", decode_sizes(round_tokens=16))
    return cluster


class Recorder:
    """The owner of a planner that stands alone: it takes note of what it is told, and ends attempts as it must."""

    def __init__(self) -> None:
        self.planner: Planner | None = None
        self.told: list[tuple[str, Request]] = []
        self.num_tokens: dict[Request, int] = {}
        self.errors: list[str] = []
        self.handed: list[tuple[str, str, int, list[tuple[Attempt, int]]]] = []
        self.transfers: dict[int, Transfer] = {}
        self.failed_sends: list[int] = []
        self.cache_counts = CacheStats()

    def end(self, attempt: Attempt) -> None:
        """An attempt is over."""
        for transfer in list(self.transfers.values()):
            if transfer.missing.pop(attempt.id, None) is not None and not transfer.missing:
                del self.transfers[transfer.id]
        self.planner.drop(attempt)
        attempt.end()
        attempt.request.attempt = None

    def finish(self, request: Request) -> None:
        self._take("finish", request)

    def refuse(self, request: Request, error: str) -> None:
        self.errors.append(error)
        self._take("refuse", request)

    def hit(self, attempt: Attempt, error: str, at: str) -> None:
        self.errors.append(error)
        self._take("hit", attempt.request)

    def preempt(self, attempt: Attempt) -> None:
        self._take("preempt", attempt.request)

    def _take(self, what: str, request: Request) -> None:
        self.told.append((what, request))
        self.end(request.attempt)

    def generated(self, taken: Sequence[tuple[Request, int]], num_prompt_tokens: int = 0) -> None:
        for request, num_tokens in taken:
            self.num_tokens[request] = self.num_tokens.get(request, 0) + num_tokens

    def hand_off(self, source: str, target: str, step: int, ended: Sequence[tuple[Attempt, int]], now: float) -> None:
        self.handed.append((source, target, step, list(ended)))

    def sending_failed(self, transfer_id: int, error: str) -> None:
        self.failed_sends.append(transfer_id)

    def arrived(self, attempt: Attempt) -> None:
        attempt.stage = "decode"
        for transfer in list(self.transfers.values()):
            if transfer.missing.get(attempt.id) == 0:
                del transfer.missing[attempt.id]
                if not transfer.missing:
                    del self.transfers[transfer.id]

    def transfer(self, transfer_id: int) -> Transfer | None:
        return self.transfers.get(transfer_id)

    def tick(self, now: float) -> None:
        pass


_ids = itertools.count()


def attempt_at(request: Request, source: str = "prefill0", target: str | None = "decode0") -> Attempt:
    """A new attempt at a request."""
    request.attempt = Attempt(next(_ids), request, source, target, request.num_cached)
    return request.attempt


def make_transfer(attempts: Sequence[Attempt], max_tokens: int = 256, step: int = 1) -> Transfer:
    """A hand-off of attempts that have their places on both sides, or on the decode side."""
    for attempt in attempts:
        attempt.stage = "handoff"
    ranks, lengths = [attempt.decode.rank for attempt in attempts], [attempt.num_prefill for attempt in attempts]
    return Transfer(
        id=next(_ids),
        source="prefill0",
        target="decode0",
        step=step,
        deadline=5.0,
        attempts=list(attempts),
        step_rows=list(range(len(attempts))),
        rounds=plan_rounds(ranks, lengths, max_tokens),
        missing={attempt.id: attempt.num_prefill for attempt in attempts},
    )

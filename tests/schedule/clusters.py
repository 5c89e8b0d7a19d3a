"""Small clusters in virtual time, with requests by number."""

from collections.abc import Sequence

from cmjax.schedule import (
    SERVING_SHAPES,
    DecodePlan,
    DecodeSizes,
    DecodeVariant,
    Plan,
    PrefillPlan,
    PrefillSizes,
    PrefillVariant,
    Request,
    RequestTimes,
    SamplingParams,
    SamplingShape,
)
from cmjax.schedule.virtual import VirtualCluster, expected_tokens

BLOCK = 4


def prefill_sizes(
    num_blocks: int = 64,
    *,
    step_tokens: int = 64,
    num_places: int = 8,
    shapes: Sequence[SamplingShape] = SERVING_SHAPES,
) -> PrefillSizes:
    """Of a prefill instance: two sizes of each kind of step."""
    sizes = sorted({max(step_tokens // 4, 1), step_tokens})
    variants = tuple(PrefillVariant(size, shape) for shape in shapes for size in sizes)
    return PrefillSizes(num_blocks, BLOCK, num_places, variants)


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


def make_request(index: int, prompt: Sequence[int], max_tokens: int = 2, at: float = 0.0, **fields) -> Request:
    """What is no field of a request is one of its sampling."""
    own = {name: fields.pop(name) for name in ("priority", "tenant", "model") if name in fields}
    sampling = SamplingParams(max_tokens=max_tokens, **fields)
    return Request(f"request {index}", list(prompt), sampling, times=RequestTimes(at), **own)


class Cluster(VirtualCluster):
    """A cluster that keeps its requests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.requests: list[Request] = []

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
        self.scheduler.check()
        assert len(self.scheduler.waiting) == self.scheduler.num_running == 0
        for planner in self.scheduler.planners:
            assert planner.is_idle
            assert planner.under_way is None
            assert planner.stats().num_used_blocks == 0


def small_cluster(**fields) -> Cluster:
    """Two prefill instances and a decode instance."""
    cluster = Cluster(**{"run_s": run_s} | fields)
    cluster.add_prefill("prefill0", prefill_sizes())
    cluster.add_prefill("prefill1", prefill_sizes())
    cluster.add_decode("decode0", decode_sizes())
    return cluster

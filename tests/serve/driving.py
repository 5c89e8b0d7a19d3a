"""Driving the serving steps by hand: prompts through prefill, hand-off and decode, with every position's logits."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from cmjax.mesh import Supernode, carve
from cmjax.model import Model, token_order
from cmjax.schedule import DecodePlan, DecodeVariant, PrefillPlan, PrefillResult, Ragged, Request
from cmjax.serve import DecodeExecutor, Engine, EngineSettings, Extras, PrefillExecutor, SamplingParams, decode, prefill
from cmjax.serve.caching import CacheSettings
from tests.parity import ParityCase

MACHINE = Supernode.preset("cloudmatrix384")


def make_engine(
    model: Model,
    ep_size: int,
    *,
    prefill_ep_size: int | None = None,
    num_prefill_instances: int | None = 1,
    num_decode_instances: int = 1,
    cache: CacheSettings | None = None,
    **settings: Any,
) -> Engine:
    """An engine on the preset machine, with small settings."""
    pools = carve(
        MACHINE,
        ep_size=ep_size,
        prefill_ep_size=prefill_ep_size,
        num_prefill_instances=num_prefill_instances,
        num_decode_instances=num_decode_instances,
    )
    defaults = {"max_model_len": 96, "max_num_seqs_per_rank": 1, "max_num_batched_tokens": 64, "steps_per_call": 4}
    return Engine(model, pools, settings=EngineSettings(**{**defaults, **settings}), cache=cache)


def model_of(case: ParityCase) -> Model:
    """The model of a parity case."""
    return Model(case.config, case.params, case.digest)


def make_requests(model: Model, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any) -> list[Request]:
    """One request a prompt, all with the same limit; they go in this order."""
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return [
        Request(f"prompt {i}", [int(token) for token in prompt], params, model=model.digest, priority=i)
        for i, prompt in enumerate(prompts)
    ]


def fill_cache(target: DecodeExecutor) -> None:
    """Zeros for latents: a new cache holds whatever the memory did, and a test may decode without a prompt before."""
    target.cache = jax.device_put(np.zeros(target.cache.shape, target.cache.dtype), target.spec.by_rank())


def prefill_logits(source: PrefillExecutor, plan: PrefillPlan) -> tuple[np.ndarray, list[np.ndarray]]:
    """Run a prefill step: `(first tokens of its rows, logits [tokens, V] of each row's chunk)`."""
    output = prefill(
        source.params,
        source.expert_to_slot,
        source.cache,
        source.pack(plan),
        spec=source.spec,
        extras=Extras(logits=True),
    )
    source.cache = output.cache
    source.keep_last_hidden(plan, output.last_hidden)
    order = token_order(plan.variant.num_tokens, source.instance.ep_size, source.spec.rank.microbatches)
    all_logits = np.asarray(output.all_logits)[order]
    ends = np.cumsum(plan.stops - plan.starts)
    return np.asarray(output.token_ids)[: len(ends)], np.split(all_logits[: ends[-1]], ends[:-1])


def chunk_plan(
    source: PrefillExecutor, chunks: Sequence[tuple[int, Sequence[int], Sequence[int], int, int]]
) -> PrefillPlan:
    """A greedy step of the whole budget over chunks: (place, prompt, its blocks, start, stop)."""
    following = [[*prompt, -1][start + 1 : stop + 1] for _, prompt, _, start, stop in chunks]
    joins = [row for row, (_, _, _, start, _) in enumerate(chunks) if start == 0]
    nothing = np.zeros(0, np.int32)

    def ints(values: Iterable[int]) -> np.ndarray:
        return np.array(list(values), np.int32)

    return PrefillPlan(
        number=1,
        variant=source.variants_for(source.num_step_tokens, ())[0],
        microbatches=source.spec.rank.microbatches,
        attempt_ids=np.arange(len(chunks)),
        places=ints(chunk[0] for chunk in chunks),
        starts=ints(chunk[3] for chunk in chunks),
        stops=ints(chunk[4] for chunk in chunks),
        is_last=np.array([stop == len(prompt) for _, prompt, _, _, stop in chunks], bool),
        token_ids=ints(token for _, prompt, _, start, stop in chunks for token in prompt[start:stop]),
        next_token_ids=ints(token for some in following for token in some),
        joins=ints(joins),
        blocks=Ragged.of([chunks[row][2] for row in joins]),
        sampling=None,
        logprob_rows=nothing,
        prompt_logprob_rows=nothing,
        oldest_step=1,
    )


class Drive:
    """The first prefill and the first decode instance of an engine whose threads do not run, plan by plan.

    Attributes:
        logits: request -> `[length, V]` of its prompt.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], variants: tuple[DecodeVariant, ...] | None = None
    ) -> None:
        """`variants`: of decode, where the greedy one will not do."""
        engine.fleet.renew()
        engine.fleet.open()
        scheduler = self.scheduler = engine.core.scheduler
        self.source, self.target = engine.prefill[0], engine.decode
        self.planner, *others = scheduler.prefill.values()
        self.decode_planner = next(iter(scheduler.decode.values()))
        self.decode_planner.is_patient = True
        self.decode_planner.variants = variants or self.decode_planner.variants
        for other in others:
            other.is_draining = True
        self.requests = list(requests)
        self.logits: dict[Request, np.ndarray] = {}
        for request in requests:
            scheduler.submit(request)

    def skip_prefill(self, first_token: int) -> DecodePlan:
        """As `prefill`, but nothing is computed or sent: the caches hold what they did."""
        while True:
            plan, arrivals = self.planner.plan(0.0), []
            if isinstance(plan, PrefillPlan):
                tokens = np.full(len(plan.places), first_token, np.int32)
                self.planner.commit(plan, PrefillResult(tokens, np.zeros((0, 0), np.int64), 0.0), 0.0)
            elif plan is not None:
                arrivals = [(plan.transfer_id, plan.round)]
                self.planner.commit(plan, None, 0.0)
            call = self.decode_planner.plan(0.0, arrivals)
            if isinstance(call, DecodePlan):
                return call
            if call is not None:
                self.decode_planner.commit(call, None, 0.0)

    def prefill(
        self, first_token: Callable[[Request], int] | None = None, on_end: Callable | None = None
    ) -> DecodePlan:
        """Prefill, hand over and place all requests; the first decode call is under way then.

        Args:
            first_token: to go on with in place of the model's.
            on_end: called with each step's plan, when its prompts have been computed and not sent.
        """
        while True:
            plan = self.planner.plan(0.0)
            if isinstance(plan, PrefillPlan):
                self.planner.commit(plan, self._step(plan, first_token), 0.0)
                if on_end is not None:
                    on_end(plan)
            elif plan is not None:
                self.planner.commit(plan, self.source.run(plan), 0.0)
            call = self.decode_planner.plan(0.0, self.target.poll())
            if isinstance(call, DecodePlan):
                return call
            if call is not None:
                self.decode_planner.commit(call, self.target.run(call), 0.0)

    def _step(self, plan: PrefillPlan, first_token: Callable[[Request], int] | None) -> PrefillResult:
        token_ids, logits = prefill_logits(self.source, plan)
        for row, attempt_id in enumerate(plan.attempt_ids.tolist()):
            request = self.planner.attempts[attempt_id].request
            self.logits[request] = np.concatenate([*([self.logits[request]] if plan.starts[row] else []), logits[row]])
            if first_token is not None:
                token_ids = token_ids.copy()
                token_ids[row] = first_token(request)
        return PrefillResult(token_ids, np.zeros((0, 0), np.int64), 0.0)

    def call(self, plan: DecodePlan | None = None) -> DecodePlan:
        """Run a decode call, by default the next one, and commit it."""
        plan = plan or self.decode_planner.plan(0.0)
        assert isinstance(plan, DecodePlan)
        self.decode_planner.commit(plan, self.target.run(plan), 0.0)
        return plan

    def columns(self, plan: DecodePlan) -> list[int]:
        """The row of each request in the arrays `[places of all ranks]` of a call of all places."""
        by_request = {self.decode_planner.attempts[i].request: row for row, i in enumerate(plan.attempt_ids.tolist())}
        return [int(plan.places[by_request[request]]) for request in self.requests]


def step_through(engine: Engine, sequences: Sequence[Sequence[int]], num_prompt: int) -> np.ndarray:
    """Logits `float32[B, S, V]` of `sequences int[B, S]`: the first `num_prompt` tokens by prefill, the rest by decode.

    Decode is fed the sequences token by token.
    """
    sequences = np.asarray(sequences)
    num_steps = sequences.shape[1] - num_prompt
    target = engine.decode
    requests = make_requests(engine.model, sequences[:, :num_prompt], num_steps + 1)
    drive = Drive(engine, requests)
    forced = np.full((num_steps, target.instance.ep_size * target.num_places), -1, np.int32)
    arguments = (target.params, target.expert_to_slot, target.cache)
    state = target.empty_state(target.variants_for(num_steps, ())[0])
    lowered = decode.lower(*arguments, state, forced, spec=target.spec, num_steps=num_steps, extras=Extras(logits=True))
    with ThreadPoolExecutor(1) as threads:
        compiling = threads.submit(lowered.compile)  # compiling is most of the time: both steps at once
        plan = drive.prefill(lambda request: int(sequences[request.priority, num_prompt]))
    columns = drive.columns(plan)
    forced[: num_steps - 1, columns] = sequences[:, num_prompt + 1 :].T
    state = target.enter(plan)
    output = compiling.result()(target.params, target.expert_to_slot, target.cache, state, forced)
    target.cache = output.cache
    decoded = np.asarray(output.logits)[:, columns].transpose(1, 0, 2)
    prompts = np.stack([drive.logits[request] for request in requests])
    return np.concatenate([prompts, decoded], axis=1)

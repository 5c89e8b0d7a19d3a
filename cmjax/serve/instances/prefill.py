"""The prefill role: prompts to latents and first tokens."""

import dataclasses
import time
from collections.abc import Iterable
from typing import ClassVar, Literal

import jax
import numpy as np

from cmjax.mesh import Instance
from cmjax.model import Model, PrefillBatch, token_order
from cmjax.schedule import (
    CompilePlan,
    LogprobArrays,
    News,
    Plan,
    PoolPlan,
    PrefillPlan,
    PrefillPlanner,
    PrefillResult,
    PrefillSizes,
    PrefillVariant,
    Result,
    SamplingParams,
    SamplingRows,
    SamplingShape,
    Scheduler,
    SendPlan,
    Variant,
)
from cmjax.serve import transfer
from cmjax.serve.caching.context import ContextCache
from cmjax.serve.instances.executor import JaxExecutor, host_load, host_logprobs
from cmjax.serve.instances.forms import empty_batch, prefill_places, prefill_step_tokens, serving_step_sizes
from cmjax.serve.instances.prefix_caching import PrefixCaching
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import Extras, PackedSampling, PrefillOutput, SamplingState, prefill


class PrefillExecutor(JaxExecutor):
    """Turns prompts into latents and first tokens; every rank holds the latents of all of them.

    Attributes:
        num_places: prompts that share a step, at most.
        num_step_tokens: of a step of the whole budget.
    """

    role: ClassVar[Literal["prefill"]] = "prefill"

    def __init__(
        self,
        model: Model,
        instance: Instance,
        settings: EngineSettings,
        num_blocks: int,
        wire: transfer.Wire | None = None,
        context: ContextCache | None = None,
    ) -> None:
        super().__init__(
            model,
            instance,
            settings,
            num_blocks,
            params=model.params,
            setting="max_num_batched_tokens",
            expert_counts={},
        )
        self.num_places = prefill_places(settings, instance.ep_size)
        self.num_step_tokens = self._step_tokens(settings.max_num_batched_tokens)
        self.allow_split(may_split=self.num_step_tokens % (2 * instance.ep_size) == 0)
        # Settings of a step whose requests have none, by shape: on the host, and on the devices.
        self._plain: dict[SamplingShape, tuple[PackedSampling, PackedSampling]] = {}
        self._wire = wire or transfer.Wire()
        self.caching = None if context is None else PrefixCaching(self, context)
        self._forget()

    def make_planner(self, name: str, scheduler: Scheduler) -> PrefillPlanner:
        """The bookkeeping of this instance, for a scheduler; until something is compiled, of greedy steps."""
        sizes = PrefillSizes(
            num_blocks=self.num_blocks,
            block_size=self.settings.block_size,
            num_places=self.num_places,
            variants=self.variants_for(self.num_step_tokens, ()),
            microbatches=tuple(self.specs),
            cache=self.caching.sizes if self.caching else None,
        )
        planner = PrefillPlanner(name, self.model.digest, self.instance.ep_size, sizes, scheduler)
        scheduler.prefill[name] = planner
        return planner

    def variants_for(self, num_tokens: int, samplings: Iterable[SamplingParams]) -> tuple[PrefillVariant, ...]:
        """One step for about so many tokens in all, at most `max_num_batched_tokens`."""
        return (PrefillVariant(self._step_tokens(num_tokens), self.shape_for(samplings)),)

    def serving_variants(self) -> tuple[PrefillVariant, ...]:
        """The steps of a server, in a few sizes, for whatever clients ask for: what nobody asks for in a step costs it
        nothing, and more shapes would only take longer to compile."""
        sizes = serving_step_sizes(self.settings, self.instance.ep_size)
        return tuple(PrefillVariant(size, self.serving_shapes[-1]) for size in sizes)

    # -- plans --------------------------------------------------------------------------------------------------------

    def _work(self, plan: Plan) -> Result:
        if isinstance(plan, SendPlan):
            self._send(plan)
            return None
        if isinstance(plan, PoolPlan):
            assert self.caching is not None
            self._take_cache(self.caching.run(plan, self.params))
            return None
        assert isinstance(plan, PrefillPlan)
        return self._run_step(plan)

    def poll(self) -> list[News]:
        return [*self.caching.poll()] if self.caching else []

    @property
    def expects_arrivals(self) -> bool:
        return self.caching is not None and self.caching.port.expects_news

    def _take_cache(self, cache: jax.Array | None) -> None:
        if cache is not None:
            self.cache = cache

    def _forget(self) -> None:
        if self.caching is not None:
            self.caching.forget()
        self._table = np.full((self.num_places, self.settings.max_blocks), -1, np.int32)
        self._last_hidden: dict[int, jax.Array] = {}  # step -> `[places, hidden]`, until it has been sent

    def _run_step(self, plan: PrefillPlan) -> PrefillResult:
        begin = time.perf_counter()
        variant = plan.variant
        arguments = self.pack(plan), self._sampling(variant.sampling, plan.sampling), self._scored(variant, plan)
        output = self.step(*arguments, shape=variant.sampling, microbatches=plan.microbatches)
        token_ids = np.asarray(output.token_ids)[: len(plan.places)]
        seconds = time.perf_counter() - begin
        self.keep_last_hidden(plan, output.last_hidden)
        if self.caching is not None:
            self.caching.keep_hidden(plan, output)
        logprobs = host_logprobs(output.logprobs, plan.logprob_rows) if len(plan.logprob_rows) else None
        return PrefillResult(token_ids, host_load(output.slot_load), seconds, logprobs, self._of_prompts(plan, output))

    def _of_prompts(self, plan: PrefillPlan, output: PrefillOutput) -> LogprobArrays | None:
        if not len(plan.prompt_logprob_rows):
            return None
        order = token_order(plan.variant.num_tokens, self.instance.ep_size, plan.microbatches)
        ends = np.cumsum(plan.stops - plan.starts)
        begins = ends - (plan.stops - plan.starts)
        wanted = [np.arange(begins[row], ends[row]) for row in plan.prompt_logprob_rows]
        return host_logprobs(output.prompt_logprobs, order[np.concatenate(wanted)])

    def _send(self, plan: SendPlan) -> None:
        target = self._wire.receiver(plan.target)
        payload = transfer.read(self, target, plan.segments, plan.step_rows, self.last_hidden(plan.step))
        self._wire.put(plan.target, (plan.transfer_id, plan.round), payload)

    def keep_last_hidden(self, plan: PrefillPlan, last_hidden: jax.Array) -> None:
        """Hold the hidden states at the ends of a step's prompts, `[places, hidden]`, until they have been sent."""
        self._last_hidden = {step: a for step, a in self._last_hidden.items() if step >= plan.oldest_step}
        self._last_hidden[plan.number] = last_hidden

    def last_hidden(self, step: int) -> jax.Array:
        """`[places, hidden]` at the ends of the prompts of a step."""
        return self._last_hidden[step]

    def compile(self, plan: CompilePlan) -> None:
        super().compile(plan)
        # A server that comes up serves its first requests before that.
        if self.caching is not None and len(plan.variants) == len(self.serving_variants()):
            self.caching.compile(self.params, self._take_cache)
        for name in plan.targets:
            transfer.compile_read(self, self._wire.receiver(name))

    def _lowered(self, variant: Variant, microbatches: int) -> jax.stages.Lowered:
        assert isinstance(variant, PrefillVariant)
        static = self._static(variant.sampling, microbatches)
        return prefill.lower(self.params, self.expert_to_slot, self.cache_like, *self._empty(variant), **static)

    def _warm_up(self, variant: Variant, microbatches: int) -> None:
        assert isinstance(variant, PrefillVariant)
        output = self.step(*self._empty(variant), shape=variant.sampling, microbatches=microbatches)
        jax.block_until_ready(output.token_ids)

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(
        self,
        batch: PrefillBatch,
        sampling: PackedSampling | None = None,
        scored: np.ndarray | None = None,
        *,
        shape: SamplingShape | None = None,
        microbatches: int | None = None,
    ) -> PrefillOutput:
        """Run one prefill step; it may still be running when this returns."""
        static = self._static(shape, microbatches)
        output = prefill(self.params, self.expert_to_slot, self.cache, batch, sampling, scored, **static)
        self.cache = output.cache
        return output

    def _static(self, shape: SamplingShape | None, microbatches: int | None) -> dict[str, object]:
        """The arguments of a step that are compiled into it."""
        spec = self.spec if microbatches is None else self.specs[microbatches]
        shape = shape or SamplingShape()
        wants_hidden = self.caching is not None and self.caching.wants_hidden
        return {"spec": spec, "extras": Extras(shape.num_logprobs, shape.num_prompt_logprobs, hidden=wants_hidden)}

    def empty_batch(self, num_tokens: int) -> PrefillBatch:
        """A step of padding, as host arrays."""
        return empty_batch(num_tokens, self.num_places, self.settings.max_blocks)

    def pack(self, plan: PrefillPlan) -> PrefillBatch:
        """A plan's chunks side by side, padded to the tokens of its variant."""
        self._table[plan.places[plan.joins]] = -1
        plan.blocks.write_into(self._table, plan.places[plan.joins])
        batch, block_size = self.empty_batch(plan.variant.num_tokens), self.settings.block_size
        num_rows, num_tokens, lengths = len(plan.places), len(plan.token_ids), plan.stops - plan.starts
        ends = np.cumsum(lengths)
        positions = np.arange(num_tokens) + np.repeat(plan.starts - (ends - lengths), lengths)
        blocks = self._table[np.repeat(plan.places, lengths), positions // block_size]
        batch.token_ids[:num_tokens] = plan.token_ids
        batch.next_token_ids[:num_tokens] = plan.next_token_ids
        batch.positions[:num_tokens] = positions
        batch.slot_mapping[:num_tokens] = blocks * block_size + positions % block_size
        batch.block_table[:num_rows] = self._table[plan.places]
        batch.query_start[1 : num_rows + 1] = ends
        batch.query_start[num_rows + 1 :] = num_tokens
        return batch

    def _empty(self, variant: PrefillVariant) -> tuple[PrefillBatch, PackedSampling | None, np.ndarray | None]:
        """What a step takes, all of it padding."""
        batch, shape = self.empty_batch(variant.num_tokens), variant.sampling
        return batch, self._sampling(shape), self._scored(variant)

    def _sampling(self, shape: SamplingShape, rows: SamplingRows | None = None) -> PackedSampling | None:
        """How the first rows of a step are sampled, on the devices; None where the step only takes the best."""
        if not shape.is_sampled:
            return None
        vocabulary, by_rank = self.model.config.vocab_size, self.spec.by_rank()
        if shape not in self._plain:
            empty = PackedSampling.of(SamplingState.for_shape(self.num_places, shape, vocabulary))
            self._plain[shape] = empty, jax.device_put(empty, by_rank)
        empty, on_devices = self._plain[shape]
        if rows is None:
            return on_devices
        index = np.arange(len(rows.temperature))
        state = SamplingState.for_shape(len(index), shape, vocabulary)
        state.write(index, rows)
        words = np.array(empty.words)
        words[index] = PackedSampling.of(state).words
        return jax.device_put(dataclasses.replace(empty, words=words), by_rank)

    def _scored(self, variant: PrefillVariant, plan: PrefillPlan | None = None) -> np.ndarray | None:
        """The tokens whose log probabilities are asked for, each at the one before it; None where none ever are."""
        if variant.sampling.num_prompt_logprobs is None:
            return None
        scored = np.full(variant.num_tokens, -1, np.int32)
        if plan is not None:
            lengths = plan.stops - plan.starts
            is_asked = np.isin(np.repeat(np.arange(len(lengths)), lengths), plan.prompt_logprob_rows)
            scored[: len(is_asked)] = np.where(is_asked, plan.next_token_ids, -1)
        return scored

    def _step_tokens(self, wanted: int) -> int:
        """One of a few shapes for `wanted` tokens, within the budget (of at least a token a rank)."""
        return prefill_step_tokens(wanted, self.settings, self.instance.ep_size)

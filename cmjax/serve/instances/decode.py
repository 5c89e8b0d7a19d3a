"""The decode role: sequences in places, token by token."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable
from typing import ClassVar, Literal

import jax
import numpy as np

from cmjax.kernels import is_native
from cmjax.mesh import Instance
from cmjax.model import Model
from cmjax.schedule import (
    CompilePlan,
    DecodePlan,
    DecodePlanner,
    DecodeResult,
    DecodeSizes,
    DecodeVariant,
    LogprobArrays,
    News,
    Plan,
    ReceivePlan,
    Result,
    SamplingParams,
    SamplingShape,
    Scheduler,
    StorePlan,
    Variant,
)
from cmjax.serve import transfer
from cmjax.serve.caching.context import ContextCache
from cmjax.serve.instances.decode_rows import DecodeRows, StateKey
from cmjax.serve.instances.executor import JaxExecutor, host_load, host_logprobs
from cmjax.serve.instances.forms import check_drafts
from cmjax.serve.instances.prefix_caching import GeneratedCaching
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import DecodeOutput, DecodeState, Extras, PackedSampling, decode


class DecodeExecutor(JaxExecutor):
    """Continues sequences, each on one rank: data-parallel attention, expert-parallel MoE.

    A rank has `max_num_seqs_per_rank` places and a cache of its own. A call runs sequences in as few rows a rank as are
    compiled; what it needs lives on the devices between calls until a sequence comes, grows or goes.

    Attributes:
        hidden: `[ranks * places, k + 1, hidden]`, what the MTP module has yet to see; None without one.
    """

    role: ClassVar[Literal["decode"]] = "decode"

    def __init__(
        self,
        model: Model,
        instance: Instance,
        settings: EngineSettings,
        num_blocks: int,
        wire: transfer.Wire | None = None,
        context: ContextCache | None = None,
        **expert_counts: int | None,
    ) -> None:
        check_drafts(settings, has_module=model.params.mtp is not None)
        # A rank's products have few rows; in bfloat16 XLA takes as long by either form, and the kernels always do.
        is_repacked = instance.is_virtual and model.dtype == np.float32 and not is_native()
        super().__init__(
            model,
            instance,
            settings,
            num_blocks,
            params=model.input_major_params if is_repacked else model.params,
            setting="max_num_seqs_per_rank",
            expert_counts=expert_counts,
        )
        self.num_places, self.num_drafts = settings.max_num_seqs_per_rank, settings.num_speculative_tokens
        self.allow_split(may_split=self.num_places % 2 == 0)
        self.idle_parts: transfer.IdleParts | None = None
        self._wire = wire or transfer.Wire()
        self.caching = None if context is None else GeneratedCaching(self, context)
        self._rows = self._new_rows(SamplingShape())
        self._forget()

    def make_planner(self, name: str, scheduler: Scheduler) -> DecodePlanner:
        """The bookkeeping of this instance, for a scheduler; until something is compiled, of greedy calls."""
        sizes = DecodeSizes(
            num_ranks=self.instance.ep_size,
            num_places=self.num_places,
            num_blocks=self.num_blocks,
            block_size=self.settings.block_size,
            max_blocks=self.settings.max_blocks,
            variants=self.variants_for(self.settings.steps_per_call, ()),
            num_drafts=self.num_drafts,
            round_tokens=transfer.round_tokens(self.settings),
            microbatches=tuple(self.specs),
            cache=self.caching.sizes if self.caching else None,
        )
        planner = scheduler.decode[name] = DecodePlanner(name, self.model.digest, sizes, scheduler)
        return planner

    def variants_for(self, num_steps: int, samplings: Iterable[SamplingParams]) -> tuple[DecodeVariant, ...]:
        """A call of all places."""
        return (DecodeVariant(self.num_places, num_steps, self.shape_for(samplings)),)

    def serving_variants(self) -> tuple[DecodeVariant, ...]:
        """The calls of a server: for each shape, for one sequence a rank and for all places, and where a controller
        picks the number of sequences, for 2, 4, ... too."""
        most, parts = self.num_places, 2 if self.settings.microbatches == 2 else 1
        powers = most.bit_length() + 1 if self.settings.tpot_slo_ms is not None else 1
        counts = sorted({min(parts << power, most) for power in range(powers)} | {most})
        return tuple(
            DecodeVariant(num_slots, self.settings.steps_per_call, shape)
            for shape in self.serving_shapes
            for num_slots in counts
        )

    # -- plans --------------------------------------------------------------------------------------------------------

    def _work(self, plan: Plan) -> Result:
        if isinstance(plan, ReceivePlan):
            self._receive(plan)
            return None
        if isinstance(plan, StorePlan):
            assert self.caching is not None
            self.caching.run(plan)
            return None
        assert isinstance(plan, DecodePlan)
        return self._run_call(plan)

    def poll(self) -> list[News]:
        return [*self._wire.arrived(self), *(self.caching.port.poll() if self.caching else ())]

    @property
    def expects_arrivals(self) -> bool:
        return self._wire.is_expected(self) or (self.caching is not None and self.caching.port.expects_news)

    def _forget(self) -> None:
        self._wire.clear(self)
        if self.caching is not None:
            self.caching.port.forget()
        self._rows = self._new_rows(self._rows.shape)
        self._state: DecodeState | None = None
        self._state_is_of: StateKey | None = None
        self._sampling: PackedSampling | None = None  # on the devices, of the same rows
        self.hidden: jax.Array | None = None
        if self.model.params.mtp is not None:
            shape = (self.instance.ep_size * self.num_places, self.num_drafts + 1, self.model.config.hidden_size)
            self.hidden = jax.device_put(np.zeros(shape, self.model.dtype), self.spec.by_rank())

    def _new_rows(self, shape: SamplingShape) -> DecodeRows:
        return DecodeRows(
            self.instance.ep_size,
            self.num_places,
            self.settings.max_blocks,
            self.settings.max_model_len,
            self.num_drafts,
            shape,
            self.model.config.vocab_size,
        )

    def _run_call(self, plan: DecodePlan) -> DecodeResult:
        variant, begin = plan.variant, time.perf_counter()
        output = self._decode(self.enter(plan), variant, plan.microbatches)
        self._state = output.state
        rows = self._rows.row_of(plan.places, variant.num_slots)
        token_ids = np.asarray(output.token_ids)[:, rows]
        seconds = time.perf_counter() - begin
        self._rows.advance(plan.places, token_ids, variant.num_steps)
        logprobs = self._logprobs(output, rows[plan.logprob_rows]) if len(plan.logprob_rows) else None
        return DecodeResult(token_ids, host_load(output.slot_load), seconds, logprobs)

    def _logprobs(self, output: DecodeOutput, rows: np.ndarray) -> LogprobArrays:
        """Of some rows, `[tokens, rows]` flattened."""
        found = host_logprobs(output.logprobs, np.s_[:, rows])
        flat = (a.reshape(-1, *a.shape[2:]) for a in (found.chosen, found.rank, found.top_ids, found.top))
        return LogprobArrays(*flat)

    def _receive(self, plan: ReceivePlan) -> None:
        payload = self._wire.take(self, (plan.transfer_id, plan.round))
        if len(plan.attempt_ids):
            transfer.write(self, payload, plan.segments, plan.places)
            self._state = None  # it has the hidden states from before

    def compile(self, plan: CompilePlan) -> None:
        shape = functools.reduce(SamplingShape.union, (one.sampling for one in plan.variants), self._rows.shape)
        if shape != self._rows.shape:
            self._rows = self._rows.widened(shape)
        self._state = None  # what is run here takes the hidden states along
        super().compile(plan)
        transfer.compile_write(self)
        if self.caching is not None and len(plan.variants) == len(self.serving_variants()):
            self.caching.compile()

    def _programs(self, variants: Iterable[Variant]) -> list[tuple[Variant, int]]:
        programs = itertools.product(variants, self.specs)
        return [(one, count) for one, count in programs if isinstance(one, DecodeVariant) and not one.num_slots % count]

    def _lowered(self, variant: Variant, microbatches: int) -> jax.stages.Lowered:
        assert isinstance(variant, DecodeVariant)
        # Rows of its own: this may run beside calls.
        state, static = self.empty_state(variant, self._new_rows(variant.sampling)), self._static(variant, microbatches)
        return decode.lower(self.params, self.expert_to_slot, self.cache_like, state, **static)

    def _warm_up(self, variant: Variant, microbatches: int) -> None:
        assert isinstance(variant, DecodeVariant)
        output = self._decode(self.empty_state(variant), variant, microbatches)
        jax.block_until_ready(output.token_ids)

    # -- steps --------------------------------------------------------------------------------------------------------

    def empty_state(self, variant: DecodeVariant, rows: DecodeRows | None = None) -> DecodeState:
        """That of no rows, on the devices."""
        return self._state_of(rows or self._rows, np.zeros(0, np.int64), variant)

    def _state_of(
        self, rows: DecodeRows, places: np.ndarray, variant: DecodeVariant, sampling: PackedSampling | None = None
    ) -> DecodeState:
        """That of some places, on the devices; `sampling`: where it is there already."""
        num_slots, shape, by_rank = variant.num_slots, variant.sampling, self.spec.by_rank()
        state = jax.device_put(rows.state(places, num_slots, shape, self.hidden), by_rank)
        if sampling is None:
            sampling = jax.device_put(rows.sampling_of(places, num_slots, shape), by_rank)
        return dataclasses.replace(state, sampling=sampling)

    def enter(self, plan: DecodePlan) -> DecodeState:
        """Take what is new with a plan; the state of its rows on the devices, cut by rank."""
        self._rows.join(plan.joins)
        self._rows.grow(plan.growth)
        key = StateKey(plan.variant.num_slots, plan.variant.sampling, plan.places.tobytes())
        if len(plan.joins.places) or key != self._state_is_of:
            self._state = self._sampling = None
        if self._state is None or len(plan.growth.places):
            self._state = self._state_of(self._rows, plan.places, plan.variant, self._sampling)
            self._state_is_of, self._sampling = key, self._state.sampling
        return self._state

    def _decode(self, state: DecodeState, variant: DecodeVariant, microbatches: int) -> DecodeOutput:
        static = self._static(variant, microbatches)
        output = decode(self.params, self.expert_to_slot, self.cache, state, **static)
        self.cache = output.cache
        if output.state.settled is not None:
            self.hidden = output.state.settled.hidden
        return output

    def _static(self, variant: DecodeVariant, microbatches: int) -> dict[str, object]:
        """The arguments of a call that are compiled into it."""
        extras = Extras(variant.sampling.num_logprobs)
        return {"spec": self.specs[microbatches], "num_steps": variant.num_steps, "extras": extras}

"""What the executors of every role share: a model on an instance's devices, and the static part of its steps."""

import abc
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from cmjax.mesh import Instance, Memory
from cmjax.model import Model, Params, expert_maps, place_params, plan_placement
from cmjax.moe import ExpertPlacement
from cmjax.schedule import (
    SERVING_SHAPES,
    CompilePlan,
    LogprobArrays,
    News,
    Plan,
    RestartPlan,
    Result,
    SamplingParams,
    SamplingShape,
    Variant,
)
from cmjax.serve.instances.forms import step_spec
from cmjax.serve.instances.memory import check_exchange_fits
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import SECOND_BY_RANK, Logprobs, new_cache


class JaxExecutor(abc.ABC):
    """Runs an instance's plans with JAX in this process: params by slot, the placement as arrays, a cache.

    Attributes:
        model, instance, settings: as given.
        placement: of the experts; None where the model has none.
        params, expert_to_slot: on the devices.
        spec: the static part of the steps; `specs` by number of microbatches, where there is a choice.
        cache: `[ranks, cache layers, slots, latent width]`, see `new_cache`; `cache_like` without its contents.
        num_places: sequences that its tables have rows for.
    """

    num_places: int
    # What a server's steps are compiled for.
    serving_shapes: ClassVar[tuple[SamplingShape, ...]] = SERVING_SHAPES

    def __init__(
        self,
        model: Model,
        instance: Instance,
        settings: EngineSettings,
        num_blocks: int,
        *,
        params: Params,
        setting: str,
        expert_counts: Mapping[str, int | None],
    ) -> None:
        """Place the model.

        Args:
            model: from `cmjax.load`.
            instance: its devices.
            settings: sizes and formats.
            num_blocks: of the cache.
            params: the model's, stored as the steps want them.
            setting: the one that decides how many tokens a rank has in one step, for the message where they are many.
            expert_counts: see `cmjax.model.plan_placement`.
        """
        self.model, self.instance, self.settings, self.num_blocks = model, instance, settings, num_blocks
        self.placement: ExpertPlacement | None = plan_placement(model.config, instance.ep_size, **expert_counts)
        memory = Memory.of(instance.devices)
        check_exchange_fits(model.config, self.placement, settings, setting, model.dtype, memory)
        self.spec = step_spec(model.config, model.params, self.placement, settings, instance.mesh)
        self.specs = {self.spec.rank.microbatches: self.spec}
        self.params = place_params(params, self.placement, instance.mesh)
        maps = expert_maps(self.placement, instance.ep_size)
        self.expert_to_slot = jax.device_put(maps, NamedSharding(instance.mesh, SECOND_BY_RANK))
        self.cache = new_cache(self.spec, num_blocks, model.dtype)
        self.cache_like = jax.ShapeDtypeStruct(self.cache.shape, self.cache.dtype, sharding=self.cache.sharding)
        self._shapes = [SamplingShape()]
        self._warm: set[tuple[Variant, int]] = set()

    # -- plans --------------------------------------------------------------------------------------------------------

    def run(self, plan: Plan) -> Result:
        """Run a plan; see `cmjax.schedule.Executor`."""
        if isinstance(plan, CompilePlan):
            self.compile(plan)
        elif isinstance(plan, RestartPlan):
            self.restart()
        else:
            return self._work(plan)
        return None

    def poll(self) -> list[News]:
        """What has arrived since the last call, see `cmjax.schedule.Executor`."""
        return []

    @property
    def expects_arrivals(self) -> bool:
        """Whether something is on its way here."""
        return False

    @abc.abstractmethod
    def _work(self, plan: Plan) -> Result:
        """Run a step, or this side of a hand-off's round."""

    @abc.abstractmethod
    def _forget(self) -> None:
        """Forget what the role keeps beside the cache."""

    def restart(self) -> None:
        """Start with an empty cache."""
        self._forget()
        vars(self).pop("cache", None)  # its memory first: there may not be room for two
        self.cache = new_cache(self.spec, self.num_blocks, self.model.dtype)

    def compile(self, plan: CompilePlan) -> None:
        """Compile steps, by running them once without requests."""
        for program in self._programs(plan.variants):
            if program not in self._warm:
                self._warm_up(*program)
                self._warm.add(program)

    def prepare(self, variant: Variant) -> None:
        """Compile a step without running it, from any thread while others run: its first run then takes no longer."""
        for program in self._programs([variant]):
            self._lowered(*program).compile()

    def _programs(self, variants: Iterable[Variant]) -> list[tuple[Variant, int]]:
        """Each with the numbers of microbatches that it may have."""
        return list(itertools.product(variants, self.specs))

    @abc.abstractmethod
    def _warm_up(self, variant: Variant, microbatches: int) -> None:
        """Run a step without requests."""

    @abc.abstractmethod
    def _lowered(self, variant: Variant, microbatches: int) -> jax.stages.Lowered:
        """A step that is ready to be compiled."""

    # -- steps --------------------------------------------------------------------------------------------------------

    def allow_split(self, *, may_split: bool) -> None:
        """With microbatches "auto": two of them may be chosen."""
        if self.settings.microbatches == "auto" and may_split:
            self.specs[2] = dataclasses.replace(self.spec, rank=dataclasses.replace(self.spec.rank, microbatches=2))

    def shape_for(self, samplings: Iterable[SamplingParams]) -> SamplingShape:
        """The first that has been made and does for these requests; one more, that does for all, where none will."""
        needed = SamplingShape.for_all(samplings)
        for shape in self._shapes:
            if shape.covers(needed):
                return shape
        self._shapes.append(self._shapes[-1].union(needed))
        return self._shapes[-1]

    def logical_load(self, slot_load: np.ndarray) -> np.ndarray:
        """Rows per logical expert, `int64[moe layers, routed experts]`, of rows by slot `int64[any, slots]`; layers
        that are missing at the end, as the MTP module's where it did not run, have none.

        Shared experts get every token, wherever they run, and are left out.
        """
        if self.placement is None:
            return np.zeros((0, 0), np.int64)
        total = np.zeros(self.placement.physical_to_logical.shape, np.int64)
        total[: slot_load.shape[0]] += slot_load.reshape(-1, total.shape[1])
        return self.placement.expert_load(total)[:, : self.placement.num_routed_experts]


def host_load(slot_load: jax.Array) -> np.ndarray:
    """A step's rows by slot, on the host."""
    return np.asarray(slot_load).astype(np.int64)


def host_logprobs(found: Logprobs | None, index: np.ndarray | tuple[slice, np.ndarray]) -> LogprobArrays:
    """Some places of the log probabilities that a step was asked for, on the host."""
    assert found is not None
    chosen, rank, top_ids, top = (np.asarray(a)[index] for a in (found.chosen, found.rank, found.top_ids, found.top))
    return LogprobArrays(chosen, rank, top_ids, top)

"""What the instances of every role share: a model on its devices, and the static part of its steps."""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cmjax.errors import UserError
from cmjax.mesh import EP_AXIS, Instance
from cmjax.model import Model, Params, RankSpec, default_wires, expert_maps, place_params, plan_placement
from cmjax.moe import ExpertPlacement, SplitExchange
from cmjax.serve.request import TokenLogprobs
from cmjax.serve.sampling import Logprobs, Sampling, SamplingRoom
from cmjax.serve.settings import EngineSettings, check_exchange_fits
from cmjax.serve.steps import StepSpec


def round_up(value: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-value // multiple) * multiple


def bucket(value: int, multiple: int) -> int:
    """The next multiple of `multiple` times a power of two: few shapes, so few compilations."""
    return multiple << max(0, (-(-value // multiple) - 1).bit_length())


NOT_FINITE_MESSAGE = (
    "its logits are not finite: the checkpoint holds NaN or infinite weights, or overflows in this dtype"
)


def token_logprobs(found: Logprobs, index: tuple[int, ...], token_id: int, num_top: int) -> TokenLogprobs:
    """One place of host arrays, with as many of the best as a request asks for."""
    top = zip(found.top_ids[index].tolist(), found.top[index].tolist(), strict=True)
    return TokenLogprobs(token_id, float(found.chosen[index]), int(found.rank[index]), tuple(top)[:num_top])


class Trial:
    """Which of several forms is fastest, found while they work: each in turn for a few calls, then the best."""

    ROUNDS = 4

    def __init__(self, forms: Sequence[int]) -> None:
        self._seconds: dict[int, list[float]] = {form: [] for form in forms}

    @property
    def choice(self) -> int:
        """The form for the next call."""
        untried = [form for form, taken in self._seconds.items() if len(taken) < self.ROUNDS]
        if len(self._seconds) > 1 and untried:
            return min(untried, key=lambda form: len(self._seconds[form]))
        return min(self._seconds, key=lambda form: float(np.median(self._seconds[form] or [0.0])))

    def add(self, form: int, seconds: float) -> None:
        """Take note of a call, as long as it is a trial."""
        if len(self._seconds[form]) < self.ROUNDS:
            self._seconds[form].append(seconds)


class PlacedModel:
    """A model on an instance's devices: params by slot, the placement as arrays, the static part of its steps."""

    def __init__(
        self, model: Model, instance: Instance, settings: EngineSettings, setting: str, **expert_counts: int | None
    ) -> None:
        """Place the model; `setting` is the one that decides how many tokens a rank has in one step."""
        self.model = model
        self.instance = instance
        self.settings = settings
        self.placement: ExpertPlacement | None = plan_placement(model.config, instance.ep_size, **expert_counts)
        check_exchange_fits(model.config, self.placement, settings, setting, model.dtype)
        mesh = instance.mesh
        dispatch_dtype, combine_dtype = default_wires(model.params)
        exchange = settings.exchange(
            axis_name=EP_AXIS,
            num_local_experts=self.placement.num_local_experts if self.placement else 1,
            dispatch_dtype=settings.dispatch_dtype or dispatch_dtype,
            combine_dtype=settings.combine_dtype or combine_dtype,
        )
        if settings.microbatches != 1 and not isinstance(exchange, SplitExchange):
            raise UserError(
                f"{type(exchange).__name__} has no dispatch_start, dispatch_done, combine_start and combine_done: "
                "microbatches must be 1"
            )
        rank = RankSpec(
            config=model.config,
            axis_name=EP_AXIS,
            block_size=settings.block_size,
            exchange=exchange,
            num_dispatched_shared=self.placement.num_dispatched_shared if self.placement else 0,
            microbatches=2 if settings.microbatches == 2 else 1,
        )
        self.spec = StepSpec(rank, mesh)
        self.params = place_params(self.host_params(), self.placement, mesh)
        maps = expert_maps(self.placement, instance.ep_size)
        self.expert_to_slot = jax.device_put(maps, NamedSharding(mesh, PartitionSpec(None, EP_AXIS)))
        self._loads: list[jax.Array] = []
        self.rooms = [SamplingRoom()]
        self.specs = {self.spec.rank.microbatches: self.spec}
        self.trial = Trial([*self.specs])

    def host_params(self) -> Params:
        """The model's parameters, stored as the steps want them."""
        return self.model.params

    def set_forms(self, *, may_split: bool) -> None:
        """With microbatches "auto": two of them may be tried."""
        if self.settings.microbatches == "auto" and may_split:
            self.specs[2] = dataclasses.replace(self.spec, rank=dataclasses.replace(self.spec.rank, microbatches=2))
            self.trial = Trial([*self.specs])

    def room_for(self, samplings: Iterable[Sampling]) -> SamplingRoom:
        """The smallest room that has been made for these requests; one more, that has all, where none will do."""
        needed = SamplingRoom().fit(samplings)
        for room in self.rooms:
            if room.covers(needed):
                return room
        self.rooms.append(self.rooms[-1].union(needed))
        return self.rooms[-1]

    def reset(self) -> None:
        """Forget the load of steps that may have failed; the instances also forget what they hold."""
        self._loads = []

    def record_load(self, slot_load: jax.Array) -> None:
        """Remember a step's rows per physical expert, without waiting for it."""
        self._loads.append(slot_load)

    def take_expert_load(self) -> np.ndarray:
        """Return and forget the rows per logical expert, `int64[moe layers, logical]`: routed experts only.

        Shared experts get every token, wherever they run. A step without the MTP module counts nothing for its layer,
        which is the last.
        """
        loads, self._loads = self._loads, []
        if self.placement is None:
            return np.zeros((0, 0), np.int64)
        total = np.zeros(self.placement.physical_to_logical.shape, np.int64)
        for load in loads:
            if load.shape[0]:  # a model whose MTP module has the only experts decodes without any
                total[: load.shape[0]] += np.asarray(load)
        return self.placement.expert_load(total)[:, : self.placement.num_routed_experts]

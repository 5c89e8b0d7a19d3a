"""The decode role: requests in places, token by token."""

import dataclasses
import itertools
import time
from collections.abc import Hashable, Iterable, Sequence

import jax
import numpy as np

from cmjax.errors import UserError
from cmjax.mesh import Instance
from cmjax.model import DecodeBatch, Model, Params
from cmjax.serve.decode_step import DecodeOutput, DecodeState, Settled, decode
from cmjax.serve.instance import PlacedModel, token_logprobs
from cmjax.serve.request import Request, SamplingParams
from cmjax.serve.router import DecodeRouter
from cmjax.serve.sampling import NOT_FINITE, Logprobs, SamplingRoom
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import StepSpec, new_cache


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a call gave a request: its newest `num_tokens` tokens; none, where its logits are not finite."""

    request: Request
    num_tokens: int
    is_finite: bool = True


class DecodeInstance(PlacedModel):
    """Continues requests, each on one rank: data-parallel attention, expert-parallel MoE.

    A rank has `max_num_seqs_per_rank` places and a block pool of its own, which `router` keeps. A call runs sequences
    in as few slots a rank as are compiled; what it needs lives on the devices between calls until a request comes or
    goes.

    Attributes:
        slot_counts: sequences that a rank runs together, as compiled, ascending; the last is all places.
    """

    def __init__(
        self,
        model: Model,
        instance: Instance,
        settings: EngineSettings,
        num_blocks: int,
        **expert_counts: int | None,
    ) -> None:
        if settings.num_speculative_tokens and model.params.mtp is None:
            raise UserError("the model has no MTP module (num_nextn_predict_layers): num_speculative_tokens must be 0")
        super().__init__(model, instance, settings, "max_num_seqs_per_rank", **expert_counts)
        self.num_blocks = num_blocks
        self.num_drafts = settings.num_speculative_tokens
        self.idle_parts: tuple[list[jax.Array], list[jax.Array]] | None = None  # see `transfer`
        self.slot_counts = [settings.max_num_seqs_per_rank]
        self.set_forms(may_split=settings.max_num_seqs_per_rank % 2 == 0)
        self.reset()

    def host_params(self) -> Params:
        """A rank's products have few rows; in bfloat16 a CPU takes as long by either form."""
        is_repacked = self.instance.is_virtual and self.model.dtype == np.float32
        return self.model.input_major_params if is_repacked else self.model.params

    def reset(self) -> None:
        """Forget every request: a new cache, all places and blocks free."""
        super().reset()
        ranks, places = self.instance.ep_size, self.settings.max_num_seqs_per_rank
        self.router = DecodeRouter(ranks, places, self.num_blocks, self.settings.block_size, self.settings.max_blocks)
        self.cache = new_cache(self.spec, self.num_blocks, self.model.dtype)
        self.hidden: jax.Array | None = None
        if self.model.params.mtp is not None:
            shape = (ranks * places, self.num_drafts + 1, self.model.config.hidden_size)
            self.hidden = jax.device_put(np.zeros(shape, self.model.dtype), self.spec.by_rank())
        self._kept = np.zeros(self.num_drafts + 1, np.int64)
        self._state: DecodeState | None = None
        self._state_is_of: Hashable = None

    def host_state(
        self,
        batch: Sequence[Sequence[Request]] | None = None,
        num_slots: int | None = None,
        room: SamplingRoom | None = None,
    ) -> DecodeState:
        """Requests as host arrays `[ranks * slots]`, in the rows that `rows` says.

        Args:
            batch: by rank; None: all that have a first token.
            num_slots: rows of a rank; None: one for each place.
            room: what the arrays of their sampling have room for; None: what they need.
        """
        num_slots = num_slots or self.router.num_places
        if batch is None:
            places = self.router.requests
            batch = [[r for r in some if r is not None and r.token_ids and not r.finish_reason] for some in places]
        requests = [request for some in batch for request in some]
        room = room or self.room_for(request.sampling for request in requests)
        size = self.instance.ep_size * num_slots
        arrays = DecodeBatch(
            token_ids=np.zeros(size, np.int32),
            positions=np.full(size, -1, np.int32),
            last_positions=np.zeros(size, np.int32),
            block_table=np.full((size, self.settings.max_blocks), -1, np.int32),
        )
        sampling, history, settled = room.state(size), None, None
        if room.has_penalties:
            history = np.full((size, self.settings.max_model_len), -1, np.int32)
        if self.num_drafts:
            following = np.zeros((size, self.num_drafts + 1), np.int32)
            settled = Settled(self.hidden, np.zeros(size, np.int32), following, np.ones(size, np.int32))
        for request, row in self.rows(batch, num_slots):
            held = len(request.decode_blocks) * self.settings.block_size
            arrays.token_ids[row] = request.token_ids[-1]
            arrays.positions[row] = request.num_cached
            arrays.last_positions[row] = min(request.num_tokens, held) - 1
            arrays.block_table[row, : len(request.decode_blocks)] = request.decode_blocks
            if sampling is not None:
                sampling.set_row(row, request.sampling, request.seed)
            if history is not None:
                history[row, : len(request.token_ids)] = request.token_ids
            if settled is not None:
                settled.places[row] = request.decode_place
                settled.counts[row] = request.num_settled
                settled.next_token_ids[row, : request.num_settled] = request.token_ids[-request.num_settled :]
        return DecodeState(arrays, sampling, settled, history)

    def rows(self, batch: Sequence[Sequence[Request]], num_slots: int) -> list[tuple[Request, int]]:
        """Each request's row among `ranks * num_slots`: that of its place where every place has one, else in turn."""
        is_whole = num_slots == self.router.num_places
        return [
            (request, rank * num_slots + (request.decode_place if is_whole else index))
            for rank, requests in enumerate(batch)
            for index, request in enumerate(requests)
        ]

    def call(self, num_steps: int, batch: Sequence[Sequence[Request]] | None = None) -> list[Decoded]:
        """Run `num_steps` steps of the requests of `batch` (those that decode), by rank; they get their tokens."""
        if batch is None:
            batch = [[r for r in some if r is not None and r.token_ids] for some in self.router.requests]
        batch = [[r for r in some if not r.finish_reason] for some in batch]
        most = max(map(len, batch), default=0)
        num_slots = min(count for count in self.slot_counts if count >= most)
        room = self.room_for(request.sampling for some in batch for request in some)
        microbatches = self.trial.choice if num_slots % 2 == 0 else min(self.specs)
        # The requests go on on the devices by themselves, as long as they are the same ones with the same blocks.
        is_of = (num_slots, room, tuple((r, r.num_attempts, len(r.decode_blocks)) for some in batch for r in some))
        if self._state is None or self._state_is_of != is_of:
            self._state = jax.device_put(self.host_state(batch, num_slots, room), self.spec.by_rank())
            self._state_is_of = is_of
        begin = time.perf_counter()
        output = self._decode(self._state, num_steps, self.specs[microbatches], room)
        self._state = output.state
        jax.block_until_ready(output.token_ids)
        if num_slots == self.slot_counts[-1]:
            self.trial.add(microbatches, (time.perf_counter() - begin) / num_steps)
        token_ids, found = jax.tree.map(np.asarray, (output.token_ids, output.logprobs))
        return [
            self._take(request, token_ids[:, row], found, row, num_steps)
            for request, row in self.rows(batch, num_slots)
        ]

    def _take(self, request: Request, column: np.ndarray, found: Logprobs | None, row: int, num_steps: int) -> Decoded:
        """Give a request its tokens of a call, `column int32[steps * (k + 1)]`."""
        before = len(request.token_ids)
        if (column == NOT_FINITE).any():
            return Decoded(request, 0, is_finite=False)
        is_token, width = column >= 0, self.num_drafts + 1
        per_step = is_token.reshape(num_steps, width).sum(1)
        per_step = per_step[per_step > 0]
        if not len(per_step):
            return Decoded(request, 0)
        request.num_settled = int(per_step[-1])
        self._kept += np.bincount(per_step - 1, minlength=width)
        num_taken = request.append(column[is_token].tolist())
        if request.sampling.logprobs is not None and found is not None:
            request.logprobs[before:] = [
                token_logprobs(found, (index, row), int(column[index]), request.sampling.logprobs)
                for index in np.flatnonzero(is_token)[:num_taken].tolist()
            ]
        return Decoded(request, num_taken)

    def _decode(self, state: DecodeState, num_steps: int, spec: StepSpec, room: SamplingRoom) -> DecodeOutput:
        output = decode(
            self.params,
            self.expert_to_slot,
            self.cache,
            state,
            spec=spec,
            num_steps=num_steps,
            num_drafts=self.num_drafts,
            num_logprobs=room.num_logprobs,
        )
        self.cache = output.cache
        if output.state.settled is not None:
            self.hidden = output.state.settled.hidden
        self.record_load(output.slot_load)
        return output

    @property
    def kept_drafts(self) -> np.ndarray:
        """How many steps of a request kept 0, 1, ... k drafts: `int64[k + 1]`."""
        return self._kept

    def take_kept_drafts(self) -> np.ndarray:
        """Return and forget how many steps of a request kept 0, 1, ... k drafts: `int64[k + 1]`."""
        kept, self._kept = self._kept, np.zeros_like(self._kept)
        return kept

    def warm_up(self, num_steps: int, samplings: Iterable[SamplingParams] = ()) -> None:
        """Compile the step with what the requests' sampling needs, by running it with every place empty."""
        self.compile_steps(num_steps, [self.room_for(samplings)])

    def warm_up_serving(self, rooms: Sequence[SamplingRoom]) -> None:
        """Compile the steps of a server: for each room, for one sequence a rank and for all places, and where a
        controller picks the number of sequences, for 2, 4, ... too."""
        most, parts = self.settings.max_num_seqs_per_rank, 2 if self.settings.microbatches == 2 else 1
        powers = most.bit_length() + 1 if self.settings.tpot_slo_ms is not None else 1
        self.slot_counts = sorted({min(parts << power, most) for power in range(powers)} | {most})
        self.rooms = list(rooms)
        self.compile_steps(self.settings.steps_per_call, rooms)

    def compile_steps(self, num_steps: int, rooms: Sequence[SamplingRoom]) -> None:
        """Compile calls of so many steps, by running them without requests."""
        nothing: list[list[Request]] = [[] for _ in range(self.instance.ep_size)]
        for num_slots, room, microbatches in itertools.product(self.slot_counts, rooms, self.specs):
            if num_slots % microbatches:
                continue
            state = jax.device_put(self.host_state(nothing, num_slots, room), self.spec.by_rank())
            jax.block_until_ready(self._decode(state, num_steps, self.specs[microbatches], room).token_ids)

"""The decode role: requests in places, token by token."""

import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from cmjax.errors import UserError
from cmjax.mesh import Instance
from cmjax.model import DecodeBatch, Model
from cmjax.serve.block_pool import BlockPool, blocks_for
from cmjax.serve.decode_step import DecodeOutput, DecodeState, Settled, decode
from cmjax.serve.instance import PlacedModel, check_finite, token_logprobs
from cmjax.serve.request import Request
from cmjax.serve.sampling import SamplingRoom
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import StepSpec, new_cache


class DecodeInstance(PlacedModel):
    """Continues requests, each on one rank: data-parallel attention, expert-parallel MoE.

    A rank has `max_num_seqs_per_rank` places and a block pool of its own. The host keeps the requests by
    `[ranks, places]`; what the steps need lives on the devices between calls until a request comes or goes.
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
        self.set_forms(may_split=settings.max_num_seqs_per_rank % 2 == 0)
        self.reset()

    def reset(self) -> None:
        """Forget every request: a new cache, all places and blocks free."""
        super().reset()
        ranks, places = self.instance.ep_size, self.settings.max_num_seqs_per_rank
        self.pools = [BlockPool(self.num_blocks) for _ in range(ranks)]
        self.cache = new_cache(self.spec, self.num_blocks, self.model.dtype)
        self.requests: list[list[Request | None]] = [[None] * places for _ in range(ranks)]
        self.room = SamplingRoom()
        self.hidden: jax.Array | None = None
        if self.model.params.mtp is not None:
            shape = (ranks * places, self.num_drafts + 1, self.model.config.hidden_size)
            self.hidden = jax.device_put(np.zeros(shape, self.model.dtype), self.spec.by_rank())
        self._kept = np.zeros(self.num_drafts + 1, np.int64)
        self._state: DecodeState | None = None

    def reserve(self, request: Request) -> bool:
        """Give the request a place and its blocks on the least loaded rank that has both; False where none has."""
        needed = blocks_for(request.num_tokens, self.settings.block_size)
        rank = choose_rank([sum(r is not None for r in places) for places in self.requests], self.pools, needed)
        if rank is None or all(r is not None for r in self.requests[rank]):
            return False
        request.decode_rank = rank
        request.decode_place = self.requests[rank].index(None)
        request.decode_blocks = self.pools[rank].take(needed)
        request.num_settled = 1
        self.room = self.room.fit([request.sampling])
        self.requests[rank][request.decode_place] = request
        return True

    def release(self, request: Request) -> None:
        """Free the request's place and blocks."""
        self.pools[request.decode_rank].free(request.decode_blocks)
        self.requests[request.decode_rank][request.decode_place] = None
        self._state = None

    def batch_changed(self) -> None:
        """Say that a request has joined: the next call takes the batch from the host again."""
        self._state = None

    def running(self) -> list[Request]:
        """The requests in places, by rank and place."""
        return [r for places in self.requests for r in places if r is not None]

    def host_state(self) -> DecodeState:
        """The requests in places, as host arrays; those without a first token yet stay out of it."""
        places = self.settings.max_num_seqs_per_rank
        size = self.instance.ep_size * places
        batch = DecodeBatch(
            token_ids=np.zeros(size, np.int32),
            positions=np.full(size, -1, np.int32),
            last_positions=np.zeros(size, np.int32),
            block_table=np.full((size, self.settings.max_blocks), -1, np.int32),
        )
        sampling, history, settled = self.room.state(size), None, None
        if self.room.has_penalties:
            history = np.full((size, self.settings.max_model_len), -1, np.int32)
        if self.num_drafts:
            following = np.zeros((size, self.num_drafts + 1), np.int32)
            settled = Settled(self.hidden, following, np.ones(size, np.int32))
        for request in self.running():
            if not request.token_ids or request.finish_reason:
                continue
            index = request.decode_rank * places + request.decode_place
            batch.token_ids[index] = request.token_ids[-1]
            batch.positions[index] = len(request.prompt_ids) + len(request.token_ids) - 1
            batch.last_positions[index] = request.num_tokens - 1
            batch.block_table[index, : len(request.decode_blocks)] = request.decode_blocks
            if sampling is not None:
                sampling.set_row(index, request.sampling, request.seed)
            if history is not None:
                history[index, : len(request.token_ids)] = request.token_ids
            if settled is not None:
                settled.counts[index] = request.num_settled
                settled.next_token_ids[index, : request.num_settled] = request.token_ids[-request.num_settled :]
        return DecodeState(batch, sampling, settled, history)

    def call(self, num_steps: int) -> int:
        """Run `num_steps` steps of every request; return how many tokens were taken."""
        if self._state is None:
            self._state = jax.device_put(self.host_state(), self.spec.by_rank())
        microbatches = self.trial.choice
        begin = time.perf_counter()
        output = self._decode(self._state, num_steps, self.specs[microbatches])
        self._state = output.state
        jax.block_until_ready(output.token_ids)
        self.trial.add(microbatches, (time.perf_counter() - begin) / num_steps)
        token_ids, found = jax.tree.map(np.asarray, (output.token_ids, output.logprobs))
        places, width = self.settings.max_num_seqs_per_rank, self.num_drafts + 1
        taken = 0
        for request in self.running():
            index = request.decode_rank * places + request.decode_place
            column = token_ids[:, index]
            check_finite(column, f"prompt {request.request_id}")
            is_token = column >= 0
            per_step = is_token.reshape(num_steps, width).sum(1)
            per_step = per_step[per_step > 0]
            if not len(per_step):
                continue
            request.num_settled = int(per_step[-1])
            self._kept += np.bincount(per_step - 1, minlength=width)
            if request.sampling.logprobs is not None:
                request.logprobs += [
                    token_logprobs(found, (row, index), int(column[row]), request.sampling.logprobs)
                    for row in np.flatnonzero(is_token).tolist()
                ]
            taken += request.append(column[is_token].tolist())
        return taken

    def _decode(self, state: DecodeState, num_steps: int, spec: StepSpec) -> DecodeOutput:
        output = decode(
            self.params,
            self.expert_to_slot,
            self.cache,
            state,
            spec=spec,
            num_steps=num_steps,
            num_drafts=self.num_drafts,
            num_logprobs=self.room.num_logprobs,
        )
        self.cache = output.cache
        if output.state.settled is not None:
            self.hidden = output.state.settled.hidden
        self.record_load(output.slot_load)
        return output

    def take_kept_drafts(self) -> np.ndarray:
        """Return and forget how many steps of a request kept 0, 1, ... k drafts: `int64[k + 1]`."""
        kept, self._kept = self._kept, np.zeros_like(self._kept)
        return kept

    def warm_up(self, num_steps: int, requests: Iterable[Request] = ()) -> None:
        """Compile the step with what the requests' sampling needs, by running it with every place empty."""
        self.room = self.room.fit(r.sampling for r in requests)
        for spec in self.specs.values():
            state = self.host_state()
            state.batch.positions.fill(-1)
            empty = jax.device_put(state, self.spec.by_rank())
            jax.block_until_ready(self._decode(empty, num_steps, spec).token_ids)


def choose_rank(num_running: Sequence[int], pools: Sequence[BlockPool], num_blocks: int) -> int | None:
    """The rank with the fewest requests, then the most free blocks, among those with room; None where there is none."""
    fitting = [rank for rank, pool in enumerate(pools) if pool.num_free >= num_blocks]
    return min(fitting, key=lambda rank: (num_running[rank], -pools[rank].num_free, rank), default=None)

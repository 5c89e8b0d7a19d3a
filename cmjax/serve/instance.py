"""One role on its devices: placed params, a cache, and the compiled steps over them."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cmjax.errors import UserError
from cmjax.mesh import EP_AXIS, Instance
from cmjax.model import (
    DecodeBatch,
    Model,
    PrefillBatch,
    RankSpec,
    default_wires,
    expert_maps,
    place_params,
    plan_placement,
)
from cmjax.moe import ExpertPlacement
from cmjax.serve.block_pool import BlockPool, blocks_for, slot_mapping
from cmjax.serve.request import Chunk, Request, plan_chunks
from cmjax.serve.settings import EngineSettings, check_exchange_fits
from cmjax.serve.steps import NOT_FINITE, DecodeOutput, PrefillOutput, StepSpec, decode, new_cache, prefill


def round_up(value: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-value // multiple) * multiple


def bucket(value: int, multiple: int) -> int:
    """The next multiple of `multiple` times a power of two: few shapes, so few compilations."""
    return multiple << max(0, (-(-value // multiple) - 1).bit_length())


def check_finite(token_ids: np.ndarray, where: str) -> None:
    """Raise `UserError` where a step found logits that are not finite: no token follows from them."""
    if (token_ids == NOT_FINITE).any():
        raise UserError(
            f"{where}: its logits are not finite: the checkpoint holds NaN or infinite weights, or "
            "overflows in this dtype"
        )


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
        rank = RankSpec(
            config=model.config,
            axis_name=EP_AXIS,
            block_size=settings.block_size,
            exchange=exchange,
            num_dispatched_shared=self.placement.num_dispatched_shared if self.placement else 0,
        )
        self.spec = StepSpec(rank, mesh)
        self.params = place_params(model.params, self.placement, mesh)
        maps = expert_maps(self.placement, instance.ep_size)
        self.expert_to_slot = jax.device_put(maps, NamedSharding(mesh, PartitionSpec(None, EP_AXIS)))
        self._loads: list[jax.Array] = []

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


@dataclasses.dataclass
class Prefilled:
    """A prompt after prefill: its latents are in `blocks` on every rank of the instance.

    Attributes:
        request: whose prompt it is.
        blocks: the instance's blocks that hold it.
        row: its row of `last_hidden`.
        last_hidden: `[sequences, hidden]`, whole on every rank.
        token_id: the first generated token.
    """

    request: Request
    blocks: list[int]
    row: int
    last_hidden: jax.Array
    token_id: int


class PrefillInstance(PlacedModel):
    """Turns prompts into latents and first tokens."""

    def __init__(self, model: Model, instance: Instance, settings: EngineSettings, num_blocks: int) -> None:
        super().__init__(model, instance, settings, "max_num_batched_tokens")
        self.num_blocks = num_blocks
        self.max_sequences = round_up(settings.max_num_seqs_per_rank, instance.ep_size)
        self.num_step_tokens = self._step_tokens(settings.max_num_batched_tokens)
        self.reset()

    def reset(self) -> None:
        """Forget every prompt: a new cache, all blocks free."""
        super().reset()
        self.pool = BlockPool(self.num_blocks)
        self.cache = new_cache(self.spec, self.num_blocks, self.model.dtype)

    def run(self, requests: Sequence[Request]) -> Iterator[list[Prefilled]]:
        """Prefill whole prompts, in as many steps as the token budget needs.

        Yields the prompts that each step ends, whose latents stay until the next step is asked for, and frees their
        blocks after that. There must be room for all of them: see `can_hold`.
        """
        block_size = self.settings.block_size
        lengths = [len(r.prompt_ids) for r in requests]
        tables = [self.pool.take(blocks_for(length, block_size)) for length in lengths]
        for chunks in plan_chunks(lengths, self.num_step_tokens, self.max_sequences):
            output = self.step(self.pack(requests, tables, chunks))
            token_ids = np.asarray(output.token_ids)
            for row, chunk in enumerate(chunks):
                check_finite(token_ids[row : row + 1], f"prompt {requests[chunk.index].request_id}")
            ended = [
                Prefilled(requests[c.index], tables[c.index], row, output.last_hidden, int(token_ids[row]))
                for row, c in enumerate(chunks)
                if c.stop == lengths[c.index]
            ]
            yield ended
            for one in ended:
                self.pool.free(one.blocks)

    def can_hold(self, requests: Sequence[Request]) -> bool:
        """Whether the prompts' blocks are free together."""
        needed = sum(blocks_for(len(r.prompt_ids), self.settings.block_size) for r in requests)
        return needed <= self.pool.num_free

    def step(self, batch: PrefillBatch) -> PrefillOutput:
        """Run one prefill step; it may still be running when this returns."""
        output = prefill(self.params, self.expert_to_slot, self.cache, batch, spec=self.spec)
        self.cache = output.cache
        self.record_load(output.slot_load)
        return output

    def warm_up(self, num_step_tokens: int) -> None:
        """Settle the tokens of a step, at most `max_num_batched_tokens`, and compile it by running it on padding."""
        self.num_step_tokens = self._step_tokens(num_step_tokens)
        jax.block_until_ready(self.step(self._empty_batch()).token_ids)

    def _step_tokens(self, wanted: int) -> int:
        """One of a few shapes for `wanted` tokens, within the budget (of at least a token a rank)."""
        ranks = self.instance.ep_size
        return min(bucket(wanted, ranks), max(self.settings.max_num_batched_tokens // ranks, 1) * ranks)

    def _empty_batch(self) -> PrefillBatch:
        num_tokens = self.num_step_tokens
        return PrefillBatch(
            token_ids=np.zeros(num_tokens, np.int32),
            next_token_ids=np.full(num_tokens, -1, np.int32),
            positions=np.zeros(num_tokens, np.int32),
            slot_mapping=np.full(num_tokens, -1, np.int32),
            query_start=np.zeros(self.max_sequences + 1, np.int32),
            block_table=np.full((self.max_sequences, self.settings.max_blocks), -1, np.int32),
        )

    def pack(self, requests: Sequence[Request], tables: Sequence[list[int]], chunks: Sequence[Chunk]) -> PrefillBatch:
        """Pack chunks of prompts side by side, padded to `num_step_tokens`."""
        batch = self._empty_batch()
        begin = 0
        for row, chunk in enumerate(chunks):
            prompt, blocks = requests[chunk.index].prompt_ids, tables[chunk.index]
            end = begin + chunk.stop - chunk.start
            positions = np.arange(chunk.start, chunk.stop, dtype=np.int32)
            following = [*prompt, -1][chunk.start + 1 : chunk.stop + 1]
            batch.token_ids[begin:end] = prompt[chunk.start : chunk.stop]
            batch.next_token_ids[begin:end] = following
            batch.positions[begin:end] = positions
            batch.slot_mapping[begin:end] = slot_mapping(blocks, positions, self.settings.block_size)
            batch.block_table[row, : len(blocks)] = blocks
            batch.query_start[row + 1 :] = end
            begin = end
        return batch


class DecodeInstance(PlacedModel):
    """Continues requests, each on one rank: data-parallel attention, expert-parallel MoE.

    A rank has `max_num_seqs_per_rank` places and a block pool of its own. The host keeps the batch as arrays
    `[ranks, places]`; on the devices it lives on between calls until a request comes or goes.
    """

    def __init__(
        self,
        model: Model,
        instance: Instance,
        settings: EngineSettings,
        num_blocks: int,
        **expert_counts: int | None,
    ) -> None:
        super().__init__(model, instance, settings, "max_num_seqs_per_rank", **expert_counts)
        self.num_blocks = num_blocks
        self.reset()

    def reset(self) -> None:
        """Forget every request: a new cache, all places and blocks free."""
        super().reset()
        ranks, places = self.instance.ep_size, self.settings.max_num_seqs_per_rank
        self.pools = [BlockPool(self.num_blocks) for _ in range(ranks)]
        self.cache = new_cache(self.spec, self.num_blocks, self.model.dtype)
        self.requests: list[list[Request | None]] = [[None] * places for _ in range(ranks)]
        self.last_hidden: jax.Array | None = None
        if self.model.params.mtp is not None:
            zeros = np.zeros((ranks * places, self.model.config.hidden_size), self.model.dtype)
            self.last_hidden = jax.device_put(zeros, self.spec.by_rank())
        self._batch: DecodeBatch | None = None

    def reserve(self, request: Request) -> bool:
        """Give the request a place and its blocks on the least loaded rank that has both; False where none has."""
        needed = blocks_for(request.num_tokens, self.settings.block_size)
        rank = choose_rank([sum(r is not None for r in places) for places in self.requests], self.pools, needed)
        if rank is None or all(r is not None for r in self.requests[rank]):
            return False
        request.decode_rank = rank
        request.decode_place = self.requests[rank].index(None)
        request.decode_blocks = self.pools[rank].take(needed)
        self.requests[rank][request.decode_place] = request
        return True

    def release(self, request: Request) -> None:
        """Free the request's place and blocks."""
        self.pools[request.decode_rank].free(request.decode_blocks)
        self.requests[request.decode_rank][request.decode_place] = None
        self._batch = None

    def batch_changed(self) -> None:
        """Say that a request has joined: the next call takes the batch from the host again."""
        self._batch = None

    def running(self) -> list[Request]:
        """The requests in places, by rank and place."""
        return [r for places in self.requests for r in places if r is not None]

    def host_batch(self) -> DecodeBatch:
        """The batch of the requests in places, as host arrays; those without a first token yet stay out of it."""
        places = self.settings.max_num_seqs_per_rank
        size = self.instance.ep_size * places
        batch = DecodeBatch(
            token_ids=np.zeros(size, np.int32),
            positions=np.full(size, -1, np.int32),
            last_positions=np.zeros(size, np.int32),
            block_table=np.full((size, self.settings.max_blocks), -1, np.int32),
        )
        for request in self.running():
            if not request.token_ids or request.finish_reason:
                continue
            index = request.decode_rank * places + request.decode_place
            batch.token_ids[index] = request.token_ids[-1]
            batch.positions[index] = len(request.prompt_ids) + len(request.token_ids) - 1
            batch.last_positions[index] = request.num_tokens - 1
            batch.block_table[index, : len(request.decode_blocks)] = request.decode_blocks
        return batch

    def call(self, num_steps: int) -> int:
        """Decode up to `num_steps` tokens of every request; return how many tokens were taken."""
        if self._batch is None:
            self._batch = jax.device_put(self.host_batch(), self.spec.by_rank())
        output = self._decode(self._batch, num_steps)
        self._batch = output.batch
        token_ids = np.asarray(output.token_ids)
        places = self.settings.max_num_seqs_per_rank
        taken = 0
        for request in self.running():
            column = token_ids[:, request.decode_rank * places + request.decode_place]
            check_finite(column, f"prompt {request.request_id}")
            taken += request.append(column[column >= 0].tolist())
        return taken

    def _decode(self, batch: DecodeBatch, num_steps: int) -> DecodeOutput:
        output = decode(self.params, self.expert_to_slot, self.cache, batch, spec=self.spec, num_steps=num_steps)
        self.cache = output.cache
        self.record_load(output.slot_load)
        return output

    def warm_up(self, num_steps: int) -> None:
        """Compile the step, by running it with every place empty."""
        batch = self.host_batch()
        batch.positions.fill(-1)
        empty = jax.device_put(batch, self.spec.by_rank())
        jax.block_until_ready(self._decode(empty, num_steps).token_ids)


def choose_rank(num_running: Sequence[int], pools: Sequence[BlockPool], num_blocks: int) -> int | None:
    """The rank with the fewest requests, then the most free blocks, among those with room; None where there is none."""
    fitting = [rank for rank, pool in enumerate(pools) if pool.num_free >= num_blocks]
    return min(fitting, key=lambda rank: (num_running[rank], -pools[rank].num_free, rank), default=None)

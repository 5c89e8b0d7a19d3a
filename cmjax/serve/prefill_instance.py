"""The prefill role: prompts to latents and first tokens."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from cmjax.mesh import Instance
from cmjax.model import Model, PrefillBatch, token_order
from cmjax.serve.block_pool import BlockPool, blocks_for, slot_mapping
from cmjax.serve.instance import PlacedModel, bucket, check_finite, round_up, token_logprobs
from cmjax.serve.request import Chunk, Request, plan_chunks
from cmjax.serve.sampling import SamplingRoom, SamplingState
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import PrefillOutput, new_cache, prefill


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
        self.room = SamplingRoom()
        self.set_forms(may_split=self.num_step_tokens % (2 * instance.ep_size) == 0)
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
        self.room = self.room.fit(r.sampling for r in requests)
        for chunks in plan_chunks(lengths, self.num_step_tokens, self.max_sequences):
            microbatches, begin = self.trial.choice, time.perf_counter()
            output = self.step(self.pack(requests, tables, chunks), self._sampling(requests, chunks), microbatches)
            token_ids = np.asarray(output.token_ids)
            self.trial.add(microbatches, time.perf_counter() - begin)
            for row, chunk in enumerate(chunks):
                check_finite(token_ids[row : row + 1], f"prompt {requests[chunk.index].request_id}")
            order = token_order(self.num_step_tokens, self.instance.ep_size, microbatches)
            _note_logprobs(output, requests, chunks, token_ids, order)
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

    def step(
        self, batch: PrefillBatch, sampling: SamplingState | None = None, microbatches: int | None = None
    ) -> PrefillOutput:
        """Run one prefill step; it may still be running when this returns."""
        output = prefill(
            self.params,
            self.expert_to_slot,
            self.cache,
            batch,
            sampling,
            spec=self.spec if microbatches is None else self.specs[microbatches],
            num_logprobs=self.room.num_logprobs,
            num_prompt_logprobs=self.room.num_prompt_logprobs,
        )
        self.cache = output.cache
        self.record_load(output.slot_load)
        return output

    def warm_up(self, num_step_tokens: int, requests: Sequence[Request] = ()) -> None:
        """Settle the tokens of a step, at most `max_num_batched_tokens`, and what the requests' sampling needs, and
        compile it by running it on padding."""
        self.num_step_tokens = self._step_tokens(num_step_tokens)
        self.room = self.room.fit(r.sampling for r in requests)
        for microbatches in self.specs:
            output = self.step(self._empty_batch(), self._sampling(requests, []), microbatches)
            jax.block_until_ready(output.token_ids)

    def _sampling(self, requests: Sequence[Request], chunks: Sequence[Chunk]) -> SamplingState | None:
        state = self.room.state(self.max_sequences)
        if state is not None:
            for row, chunk in enumerate(chunks):
                state.set_row(row, requests[chunk.index].sampling, requests[chunk.index].seed)
        return state

    def _step_tokens(self, wanted: int) -> int:
        """One of a few shapes for `wanted` tokens, within the budget (of at least a token a rank)."""
        parts = self.instance.ep_size * (1 if self.settings.microbatches == 1 else 2)
        return min(bucket(wanted, parts), max(self.settings.max_num_batched_tokens // parts, 1) * parts)

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


def _note_logprobs(
    output: PrefillOutput,
    requests: Sequence[Request],
    chunks: Sequence[Chunk],
    token_ids: np.ndarray,
    order: np.ndarray,
) -> None:
    """Give requests the log probabilities that they asked for, of the prompt's tokens and of the first generated."""
    first, prompt = jax.tree.map(np.asarray, (output.logprobs, output.prompt_logprobs))
    begin = 0
    for row, chunk in enumerate(chunks):
        request = requests[chunk.index]
        num_first, num_prompt = request.sampling.logprobs, request.sampling.prompt_logprobs
        is_last = chunk.stop == len(request.prompt_ids)
        if num_prompt is not None:
            following = request.prompt_ids[chunk.start + 1 : chunk.stop + 1]
            request.prompt_logprobs += [
                token_logprobs(prompt, (int(order[begin + i]),), token, num_prompt) for i, token in enumerate(following)
            ]
        if num_first is not None and is_last:
            request.logprobs.append(token_logprobs(first, (row,), int(token_ids[row]), num_first))
        begin += chunk.stop - chunk.start

"""The prefill role: prompts to latents and first tokens."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from cmjax.errors import UserError
from cmjax.mesh import Instance
from cmjax.model import Model, PrefillBatch, token_order
from cmjax.serve.block_pool import slot_mapping
from cmjax.serve.instance import NOT_FINITE_MESSAGE, PlacedModel, bucket, round_up, token_logprobs
from cmjax.serve.request import Chunk, Request, SamplingParams
from cmjax.serve.router import PrefillRouter
from cmjax.serve.sampling import NOT_FINITE, SamplingRoom, SamplingState
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import PrefillOutput, new_cache, prefill

# Beside the full budget, a server's step comes in this size too: for the few tokens of a quiet moment.
SMALL_STEP_TOKENS = 256
# A step has room for its budget in prompts of this length; shorter ones leave some of it unused.
LEAST_PROMPT_TOKENS = 16


@dataclasses.dataclass
class Prefilled:
    """A prompt after prefill: its latents are in `blocks` on every rank of the instance.

    Attributes:
        request: whose prompt it is.
        blocks: the instance's blocks that hold it.
        row: its row of `last_hidden`.
        last_hidden: `[sequences, hidden]`, whole on every rank.
        token_id: the first generated token, or `NOT_FINITE`.
    """

    request: Request
    blocks: list[int]
    row: int
    last_hidden: jax.Array
    token_id: int

    @property
    def is_finite(self) -> bool:
        """Whether a token follows from its logits."""
        return self.token_id != NOT_FINITE


class PrefillInstance(PlacedModel):
    """Turns prompts into latents and first tokens."""

    def __init__(self, model: Model, instance: Instance, settings: EngineSettings, num_blocks: int) -> None:
        super().__init__(model, instance, settings, "max_num_batched_tokens")
        self.num_blocks = num_blocks
        most = max(settings.max_num_seqs_per_rank, settings.max_num_batched_tokens // LEAST_PROMPT_TOKENS)
        self.max_sequences = round_up(most, instance.ep_size)
        self.num_step_tokens = self._step_tokens(settings.max_num_batched_tokens)
        self.compiled: set[tuple[int, SamplingRoom]] = set()
        self.set_forms(may_split=self.num_step_tokens % (2 * instance.ep_size) == 0)
        self.reset()

    def reset(self) -> None:
        """Forget every prompt: a new cache, all blocks free."""
        super().reset()
        self.router = PrefillRouter(self.num_blocks, self.settings.block_size)
        self.cache = new_cache(self.spec, self.num_blocks, self.model.dtype)

    def run(self, requests: Sequence[Request]) -> Iterator[list[Prefilled]]:
        """Prefill whole prompts, in as many steps as the token budget needs.

        Yields the prompts that each step ends, whose latents stay until the next step is asked for, and frees their
        blocks after that. There must be room for all of them: see `PrefillRouter.can_hold`.
        """
        for request in requests:
            self.router.add(request)
        while chunks := self.router.next_step(self.num_step_tokens, self.max_sequences):
            ended = self.compute(chunks)
            self.router.computed(chunks)
            for one in ended:
                if one.is_finite:
                    continue
                raise UserError(f"{one.request.request_id}: {NOT_FINITE_MESSAGE}")
            yield ended
            for one in ended:
                self.router.release(one.request)

    def compute(self, chunks: Sequence[Chunk]) -> list[Prefilled]:
        """Run one step; the prompts that it ends. Their requests get the log probabilities that they asked for."""
        requests = [chunk.request for chunk in chunks]
        room = self.room_for(request.sampling for request in requests)
        num_tokens = self._shape_for(sum(chunk.stop - chunk.start for chunk in chunks), room)
        microbatches, begin = self.trial.choice, time.perf_counter()
        batch = self.pack(chunks, num_tokens)
        output = self.step(batch, self._sampling(room, requests), microbatches, room)
        token_ids = np.asarray(output.token_ids)
        self.trial.add(microbatches, time.perf_counter() - begin)
        _note_logprobs(output, chunks, token_ids, token_order(num_tokens, self.instance.ep_size, microbatches))
        return [
            Prefilled(chunk.request, chunk.blocks, row, output.last_hidden, int(token_ids[row]))
            for row, chunk in enumerate(chunks)
            if chunk.is_last
        ]

    def step(
        self,
        batch: PrefillBatch,
        sampling: SamplingState | None = None,
        microbatches: int | None = None,
        room: SamplingRoom | None = None,
    ) -> PrefillOutput:
        """Run one prefill step; it may still be running when this returns."""
        room = room or self.rooms[0]
        output = prefill(
            self.params,
            self.expert_to_slot,
            self.cache,
            batch,
            sampling,
            spec=self.spec if microbatches is None else self.specs[microbatches],
            num_logprobs=room.num_logprobs,
            num_prompt_logprobs=room.num_prompt_logprobs,
        )
        self.cache = output.cache
        self.record_load(output.slot_load)
        return output

    def warm_up(self, num_step_tokens: int, samplings: Iterable[SamplingParams] = ()) -> None:
        """Settle the tokens of a step, at most `max_num_batched_tokens`, and what the requests' sampling needs, and
        compile it by running it on padding."""
        self.num_step_tokens = self._step_tokens(num_step_tokens)
        self.compile_steps([(self.num_step_tokens, self.room_for(samplings))])

    def warm_up_serving(self, rooms: Sequence[SamplingRoom]) -> None:
        """Compile the steps of a server: of a full budget for each room, and of a few prompts for the first."""
        self.num_step_tokens = self._step_tokens(self.settings.max_num_batched_tokens)
        small = self._step_tokens(min(SMALL_STEP_TOKENS, self.num_step_tokens))
        self.rooms = list(rooms)
        self.compile_steps(dict.fromkeys([(small, rooms[0]), *((self.num_step_tokens, room) for room in rooms)]))

    def compile_steps(self, forms: Iterable[tuple[int, SamplingRoom]]) -> None:
        """Compile steps of so many tokens with such room, by running them on padding."""
        for num_tokens, room in forms:
            for microbatches in self.specs:
                output = self.step(self._empty_batch(num_tokens), self._sampling(room, []), microbatches, room)
                jax.block_until_ready(output.token_ids)
            self.compiled.add((num_tokens, room))

    def _shape_for(self, num_tokens: int, room: SamplingRoom) -> int:
        """The smallest compiled step that so many tokens fit."""
        fitting = [size for size, one in self.compiled if one == room and num_tokens <= size <= self.num_step_tokens]
        return min(fitting, default=self.num_step_tokens)

    def _sampling(self, room: SamplingRoom, requests: Sequence[Request]) -> SamplingState | None:
        state = room.state(self.max_sequences)
        if state is not None:
            for row, request in enumerate(requests):
                state.set_row(row, request.sampling, request.seed)
        return state

    def _step_tokens(self, wanted: int) -> int:
        """One of a few shapes for `wanted` tokens, within the budget (of at least a token a rank)."""
        parts = self.instance.ep_size * (1 if self.settings.microbatches == 1 else 2)
        return min(bucket(wanted, parts), max(self.settings.max_num_batched_tokens // parts, 1) * parts)

    def _empty_batch(self, num_tokens: int) -> PrefillBatch:
        return PrefillBatch(
            token_ids=np.zeros(num_tokens, np.int32),
            next_token_ids=np.full(num_tokens, -1, np.int32),
            positions=np.zeros(num_tokens, np.int32),
            slot_mapping=np.full(num_tokens, -1, np.int32),
            query_start=np.zeros(self.max_sequences + 1, np.int32),
            block_table=np.full((self.max_sequences, self.settings.max_blocks), -1, np.int32),
        )

    def pack(self, chunks: Sequence[Chunk], num_tokens: int | None = None) -> PrefillBatch:
        """Pack chunks of prompts side by side, padded to `num_tokens` (`num_step_tokens`)."""
        batch = self._empty_batch(num_tokens or self.num_step_tokens)
        begin = 0
        for row, chunk in enumerate(chunks):
            prompt, blocks = chunk.request.prefill_ids, chunk.blocks
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


def _note_logprobs(output: PrefillOutput, chunks: Sequence[Chunk], token_ids: np.ndarray, order: np.ndarray) -> None:
    """Give requests the log probabilities that they asked for, of the prompt's tokens and of the first generated."""
    first, prompt = jax.tree.map(np.asarray, (output.logprobs, output.prompt_logprobs))
    begin = 0
    for row, chunk in enumerate(chunks):
        request = chunk.request
        num_first, num_prompt = request.sampling.logprobs, request.sampling.prompt_logprobs
        if num_prompt is not None and not request.is_resumed:
            following = request.prompt_ids[chunk.start + 1 : chunk.stop + 1]
            # Computed once more after a failure, they replace what was there.
            request.prompt_logprobs[chunk.start + 1 :] = [
                token_logprobs(prompt, (int(order[begin + i]),), token, num_prompt) for i, token in enumerate(following)
            ]
        if num_first is not None and chunk.is_last and not request.is_resumed:
            request.logprobs = [token_logprobs(first, (row,), int(token_ids[row]), num_first)]
        begin += chunk.stop - chunk.start

"""The routers inside an instance: which prompts share a prefill step, and which rank and blocks a sequence gets.

Plain bookkeeping, without arrays, threads or clocks, so that the engine and a simulator run the very same decisions
(paper section 4.1: intra-instance routers).
"""

import dataclasses
from collections.abc import Iterable, Sequence

from cmjax.serve.block_pool import BlockPool, blocks_for
from cmjax.serve.request import Chunk, Request


@dataclasses.dataclass
class PrefillRouter:
    """The prompts of a prefill instance: those that wait, those under way, and the blocks that hold them.

    Attributes:
        num_blocks: of the instance's cache; every rank holds all prompts.
        block_size: tokens a block.
        queue: given to the instance, in the order they will be prefilled; the first may be under way.
    """

    num_blocks: int
    block_size: int

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks)
        self.queue: list[Request] = []

    @property
    def load(self) -> int:
        """Tokens that are still to be computed."""
        return sum(request.num_cached - request.num_computed for request in self.queue)

    def can_hold(self, requests: Iterable[Request]) -> bool:
        """Whether these prompts' blocks are free together."""
        return sum(blocks_for(one.num_cached, self.block_size) for one in requests) <= self.pool.num_free

    def add(self, request: Request) -> None:
        """Put a prompt at the end of the queue, to be computed from its first token on."""
        request.num_computed = 0
        self.queue.append(request)

    def next_step(self, max_tokens: int, max_sequences: int) -> list[Chunk]:
        """Choose what the next step computes: the first prompts, whole where the budget lasts, the last one cut.

        A prompt needs the blocks of all its tokens; one that finds none waits, and those behind it. Empty: there is
        nothing to do.

        Example: prompts of 5 and 4 tokens with 6 tokens a step give the tokens 0 to 4 and 0, then 1 to 3.
        """
        chunks: list[Chunk] = []
        for request in self.queue:
            if max_tokens == 0 or len(chunks) == max_sequences:
                break
            if not request.prefill_blocks:
                if not self.can_hold([request]):
                    break
                request.prefill_blocks = self.pool.take(blocks_for(request.num_cached, self.block_size))
            stop = min(request.num_cached, request.num_computed + max_tokens)
            chunks.append(Chunk(request, request.prefill_blocks, request.num_computed, stop))
            max_tokens -= stop - request.num_computed
        return chunks

    def computed(self, chunks: Sequence[Chunk]) -> list[Request]:
        """Take note that a step has run. The prompts that it ended leave the queue and keep their blocks till
        `release`; one that was released meanwhile is not among them."""
        ended = []
        for chunk in chunks:
            if chunk.request in self.queue:
                chunk.request.num_computed = chunk.stop
                if chunk.is_last:
                    self.queue.remove(chunk.request)
                    ended.append(chunk.request)
        return ended

    def release(self, request: Request) -> None:
        """Forget a prompt and free its blocks, whether it waits, is under way or has ended."""
        if request in self.queue:
            self.queue.remove(request)
        self.pool.free(request.prefill_blocks)
        request.prefill_blocks, request.num_computed = [], 0


@dataclasses.dataclass
class DecodeRouter:
    """The sequences of a decode instance: each at a place of one rank, with blocks of that rank's pool.

    Attributes:
        num_ranks: each with a pool of its own.
        num_places: sequences that a rank can have, those whose latents are still on their way included.
        num_blocks: of a rank.
        block_size: tokens a block.
        max_blocks: those of the longest request.
        limit: sequences that a rank decodes together, at most `num_places`.
        requests: `[ranks][places]`.
    """

    num_ranks: int
    num_places: int
    num_blocks: int
    block_size: int
    max_blocks: int

    def __post_init__(self) -> None:
        self.pools = [BlockPool(self.num_blocks) for _ in range(self.num_ranks)]
        self.requests: list[list[Request | None]] = [[None] * self.num_places for _ in range(self.num_ranks)]
        self.limit = self.num_places
        self._counts = [0] * self.num_ranks

    @property
    def num_requests(self) -> int:
        """Requests that have a place."""
        return sum(self._counts)

    @property
    def load(self) -> float:
        """Share of the places that are taken."""
        return self.num_requests / (self.num_ranks * self.num_places)

    def placed(self) -> list[Request]:
        """The requests that have a place, by rank and place."""
        return [r for places in self.requests for r in places if r is not None]

    def running(self) -> list[Request]:
        """Those of them that decode."""
        return [r for r in self.placed() if r.stage == "decode"]

    def batch(self) -> list[list[Request]]:
        """What the next call runs, by rank: those that decode, at most `limit` of each rank, the most urgent first."""
        return [
            sorted((r for r in places if r is not None and r.stage == "decode"), key=_urgency)[: self.limit]
            for places in self.requests
        ]

    def reserve(self, request: Request, num_ahead: int = 1) -> bool:
        """Give the request a place and its blocks on the least loaded rank that has both; False where none has.

        It gets the blocks of its whole length where every place of the rank can still have the longest, else those of
        the tokens it has and `num_ahead` more.
        """
        whole, least = request.num_tokens, min(request.num_tokens, request.num_cached + num_ahead)
        needed = blocks_for(least, self.block_size)
        rank = choose_rank(self._counts, [pool.num_free for pool in self.pools], needed, self.limit)
        if rank is None:
            return False
        pool, free_places = self.pools[rank], self.num_places - self._counts[rank]
        if pool.num_free >= free_places * self.max_blocks:
            needed = blocks_for(whole, self.block_size)
        request.decode_rank = rank
        request.decode_place = self.requests[rank].index(None)
        request.decode_blocks = pool.take(needed)
        self.requests[rank][request.decode_place] = request
        self._counts[rank] += 1
        return True

    def release(self, request: Request) -> None:
        """Free the request's place and blocks."""
        self.pools[request.decode_rank].free(request.decode_blocks)
        self.requests[request.decode_rank][request.decode_place] = None
        self._counts[request.decode_rank] -= 1
        request.decode_rank = request.decode_place = -1
        request.decode_blocks = []

    def grow(self, num_tokens: int) -> list[Request]:
        """Give every decoding sequence the blocks for `num_tokens` more tokens; return those that had to go.

        Where a rank has too few, the least urgent of its sequences leaves, place and blocks; it is the caller's to
        prefill it again from the tokens it has. Nothing is copied when a sequence grows.
        """
        preempted = []
        for rank, places in enumerate(self.requests):
            waiting = sorted((r for r in places if r is not None and r.stage == "decode"), key=_urgency)
            while waiting:
                request = waiting.pop(0)
                needed = blocks_for(min(request.num_tokens, request.num_cached + num_tokens), self.block_size)
                missing = needed - len(request.decode_blocks)
                while missing > self.pools[rank].num_free:
                    victim = waiting.pop() if waiting else request
                    self.release(victim)
                    preempted.append(victim)
                    if victim is request:
                        break
                else:
                    if missing > 0:
                        request.decode_blocks += self.pools[rank].take(missing)
        return preempted


def choose_rank(num_requests: Sequence[int], num_free: Sequence[int], num_blocks: int, limit: int) -> int | None:
    """The rank with the fewest requests, then the most free blocks, among those with fewer than `limit` requests and
    `num_blocks` free blocks; None where there is none."""
    fitting = (rank for rank, free in enumerate(num_free) if free >= num_blocks and num_requests[rank] < limit)
    return min(fitting, key=lambda rank: (num_requests[rank], -num_free[rank], rank), default=None)


def _urgency(request: Request) -> tuple[int, float, str]:
    return request.priority, request.arrival, request.request_id

"""Which sequence has which place and blocks of a decode instance, as arrays by place."""

import collections
from collections.abc import Callable

import numpy as np

from cmjax.schedule.blocks import BlockPool, Fence, blocks_for
from cmjax.schedule.request import Attempt, DecodeHold


class DecodePlaces:
    """The places and blocks of the ranks of a decode instance, and the attempts that have them.

    Arrays are by place, `[ranks * places of a rank]`, so that what is done for a call costs little for those that just
    go on.

    Args:
        num_ranks, num_places: sequences that a rank can have.
        num_blocks, block_size: of a rank's cache.
        max_blocks: those of the longest request.
        fence: of the instance.

    Attributes:
        ids: int64, the attempt at each place, -1 for none.
        is_running: bool, its latents have arrived.
        num_cached: int64, tokens in its cache.
        num_tokens: int64, the most that it will hold.
        num_blocks: int64, blocks that it has.
    """

    def __init__(
        self, num_ranks: int, num_places: int, num_blocks: int, block_size: int, max_blocks: int, fence: Fence
    ) -> None:
        self.num_ranks, self.num_places, self.block_size, self.max_blocks = (
            num_ranks,
            num_places,
            block_size,
            max_blocks,
        )
        self.attempts: dict[int, Attempt] = {}
        self._pools = [BlockPool(num_blocks, fence) for _ in range(num_ranks)]
        self._rank_places = [BlockPool(num_places, fence) for _ in range(num_ranks)]
        size = num_ranks * num_places
        self.ids = np.full(size, -1, np.int64)
        self.is_running = np.zeros(size, bool)
        self.num_cached = np.zeros(size, np.int64)
        self.num_tokens = np.zeros(size, np.int64)
        self.num_blocks = np.zeros(size, np.int64)

    @property
    def num_free_blocks(self) -> int:
        """Of all ranks."""
        return sum(pool.num_free for pool in self._pools)

    @property
    def least_free_blocks(self) -> int:
        """Of the rank that has the fewest."""
        return min(pool.num_free for pool in self._pools)

    @property
    def num_per_rank(self) -> np.ndarray:
        """`int64[ranks]`, attempts of each rank."""
        return (self.ids.reshape(self.num_ranks, -1) >= 0).sum(1)

    def place_of(self, attempt: Attempt) -> int:
        """Where an attempt is, in the arrays."""
        assert attempt.decode is not None
        return attempt.decode.rank * self.num_places + attempt.decode.place.ids[0]

    def at(self, places: np.ndarray) -> list[Attempt]:
        """The attempts at some places."""
        return [self.attempts[attempt_id] for attempt_id in self.ids[places].tolist()]

    def reserve(self, attempt: Attempt, num_ahead: int, limit: int) -> int | None:
        """Give an attempt a place and its blocks on the least loaded rank that has both and fewer than `limit`
        attempts; None where none has.

        It gets the blocks of its whole length where every place of the rank can still have the longest, else those of
        the tokens it has and `num_ahead` more.
        """
        request = attempt.request
        needed = blocks_for(min(request.num_tokens, request.num_cached + num_ahead), self.block_size)
        free = np.fromiter((pool.num_free for pool in self._pools), np.int64, self.num_ranks)
        free_places = np.fromiter((pool.num_free for pool in self._rank_places), np.int64, self.num_ranks)
        rank = choose_rank(self.num_per_rank, np.where(free_places > 0, free, -1), needed, limit)
        if rank is None:
            return None
        if free[rank] >= free_places[rank] * self.max_blocks:
            needed = blocks_for(request.num_tokens, self.block_size)
        attempt.decode = DecodeHold(rank, self._rank_places[rank].take(1), self._pools[rank].take(needed))
        self.attempts[attempt.id] = attempt
        place = self.place_of(attempt)
        self.ids[place], self.is_running[place], self.num_blocks[place] = attempt.id, False, needed
        self.num_cached[place], self.num_tokens[place] = request.num_cached, request.num_tokens
        return place

    def drop(self, attempt: Attempt) -> int | None:
        """Forget an attempt; its place, if it had one. Its leases are its own to give back."""
        if self.attempts.pop(attempt.id, None) is None:
            return None
        place = self.place_of(attempt)
        self.ids[place], self.is_running[place] = -1, False
        return place

    def grow(self, num_ahead: int, preempt: Callable[[Attempt], None]) -> list[tuple[int, list[int]]]:
        """Give every running sequence the blocks for `num_ahead` more tokens: `(place, its new blocks)` of those that
        got any.

        Where a rank has too few, the least urgent of its sequences leaves by `preempt`, place and blocks, to be
        prefilled again from the tokens it has. Nothing is copied when a sequence grows.
        """
        until = np.minimum(self.num_tokens, self.num_cached + num_ahead)
        missing = np.where(self.is_running, np.maximum(-(-until // self.block_size) - self.num_blocks, 0), 0)
        short = np.flatnonzero(missing > 0)
        ranks = short // self.num_places
        grown = []
        for rank in np.unique(ranks).tolist():
            mine = short[ranks == rank]
            if missing[mine].sum() > self._pools[rank].num_free:
                self._make_room(rank, missing, preempt)
                mine = mine[self.ids[mine] >= 0]
            for place, attempt in zip(mine.tolist(), self.at(mine), strict=True):
                assert attempt.decode is not None
                grown.append((place, attempt.decode.blocks.extend(int(missing[place]))))
                self.num_blocks[place] += missing[place]
        return grown

    def _make_room(self, rank: int, missing: np.ndarray, preempt: Callable[[Attempt], None]) -> None:
        """Have the least urgent of a rank leave until the others' blocks suffice.

        What they leave is free at once: this happens between two runs.
        """
        first = rank * self.num_places
        running = self.at(first + np.flatnonzero(self.is_running[first : first + self.num_places]))
        waiting = sorted(running, key=lambda one: one.request.urgency)
        claimed = 0  # by those more urgent
        while waiting:
            attempt = waiting.pop(0)
            wanted = int(missing[self.place_of(attempt)])
            claimed += wanted
            while claimed > self._pools[rank].num_free:
                victim = waiting.pop() if waiting else attempt
                if victim is attempt:
                    claimed -= wanted
                preempt(victim)

    def most_urgent(self, limit: int) -> np.ndarray:
        """Running places, ascending: all, or the `limit` most urgent of each rank."""
        running = np.flatnonzero(self.is_running)
        if limit >= self.num_places:
            return running
        urgency = {place: one.request.urgency for place, one in zip(running.tolist(), self.at(running), strict=True)}
        taken: dict[int, int] = collections.defaultdict(int)
        chosen = []
        for place in sorted(urgency, key=lambda one: urgency[one]):
            rank = place // self.num_places
            if taken[rank] < limit:
                taken[rank] += 1
                chosen.append(place)
        return np.array(sorted(chosen), np.int64)

    def last_positions(self, places: np.ndarray) -> np.ndarray:
        """`int32[places]`, the last position that blocks and the limit of tokens leave room for."""
        held = self.num_blocks[places] * self.block_size
        return (np.minimum(self.num_tokens[places], held) - 1).astype(np.int32)


def choose_rank(num_requests: np.ndarray, num_free: np.ndarray, num_blocks: int, limit: int) -> int | None:
    """The rank with the fewest requests, then the most free blocks, among those with fewer than `limit` requests and
    `num_blocks` free blocks; None where there is none. Arguments `int64[ranks]`."""
    fitting = np.flatnonzero((num_free >= num_blocks) & (num_requests < limit))
    if not len(fitting):
        return None
    return int(fitting[np.lexsort((-num_free[fitting], num_requests[fitting]))[0]])

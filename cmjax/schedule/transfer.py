"""Hand-offs of prompts from prefill to decode instances: what travels in which round, and what is still due."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cmjax.schedule.blocks import Ragged
from cmjax.schedule.plans import ReceivePlan, Segments, SendPlan
from cmjax.schedule.request import Attempt


class Part(NamedTuple):
    """Tokens `[start, stop)` of the `prompt`-th prompt in one round; `begin` and `hidden_row` as in `Segments`."""

    prompt: int
    rank: int
    begin: int
    start: int
    stop: int
    hidden_row: int


def plan_rounds(ranks: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[Part]]:
    """Cut prompts of so many tokens, each on its way to a decode rank, into rounds of at most `max_tokens` tokens for
    each rank, in order.

    Example: prompts of 5 and 2 tokens for rank 3 with 4 a round travel as 4, then 1 and 2.
    """
    rounds: list[list[Part]] = []
    filled: dict[int, int] = defaultdict(int)  # rank -> tokens it has been given, over all rounds
    num_ends: dict[tuple[int, int], int] = defaultdict(int)  # round, rank -> prompts that end in it
    for index, (rank, length) in enumerate(zip(ranks, lengths, strict=True)):
        start = 0
        while start < length:
            number, begin = divmod(filled[rank], max_tokens)
            stop = min(length, start + max_tokens - begin)
            hidden_row = -1
            if stop == length:
                hidden_row = num_ends[number, rank]
                num_ends[number, rank] += 1
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(Part(index, rank, begin, start, stop, hidden_row))
            filled[rank] += stop - start
            start = stop
    return [sorted(parts, key=lambda part: (part.rank, part.begin)) for parts in rounds]


def make_segments(parts: Sequence[Part], blocks_of: Callable[[Part], Sequence[int]], block_size: int) -> Segments:
    """Parts as arrays, with the blocks that hold each."""
    blocks = [blocks_of(part)[part.start // block_size : -(-part.stop // block_size)] for part in parts]

    def column(name: str) -> np.ndarray:
        return np.array([getattr(part, name) for part in parts], np.int32)

    return Segments(
        column("rank"), column("begin"), column("start"), column("stop"), column("hidden_row"), Ragged.of(blocks)
    )


@dataclasses.dataclass(eq=False)
class Transfer:
    """Prompts that one prefill step has ended, on their way to one decode instance.

    Attributes:
        id: unique in an engine.
        source, target: names of the instances.
        step: number of the prefill plan that ended them.
        deadline: when it counts as lost, in seconds of the engine's clock.
        attempts: in the order they travel.
        step_rows: the row of each in that step.
        rounds: what travels together.
        missing: attempt's id -> tokens that have not arrived; without those that have all, and those that are over.
        num_planned: rounds that have been sent.
    """

    id: int
    source: str
    target: str
    step: int
    deadline: float
    attempts: list[Attempt]
    step_rows: list[int]
    rounds: list[list[Part]]
    missing: dict[int, int]
    num_planned: int = 0

    def next_send(self, block_size: int) -> SendPlan | None:
        """The next round that somebody still waits for; None where all have been sent."""
        while self.num_planned < len(self.rounds):
            number, self.num_planned = self.num_planned, self.num_planned + 1
            parts = self._alive(number)
            if not parts:
                continue

            def blocks_of(part: Part) -> list[int]:
                hold = self.attempts[part.prompt].prefill
                assert hold is not None
                return hold.blocks.ids

            rows = [self.step_rows[part.prompt] if part.hidden_row >= 0 else -1 for part in parts]
            return SendPlan(
                transfer_id=self.id,
                round=number,
                target=self.target,
                step=self.step,
                attempt_ids=self._ids(parts),
                segments=make_segments(parts, blocks_of, block_size),
                step_rows=np.array(rows, np.int32),
            )
        return None

    def receive(self, number: int, block_size: int) -> ReceivePlan:
        """The target's half of a round, for those who still wait for it."""
        parts = self._alive(number)

        def blocks_of(part: Part) -> list[int]:
            hold = self.attempts[part.prompt].decode
            assert hold is not None
            return hold.blocks.ids

        places = []
        for part in parts:
            hold = self.attempts[part.prompt].decode
            assert hold is not None
            places.append(hold.place.ids[0] if part.hidden_row >= 0 else -1)
        return ReceivePlan(
            transfer_id=self.id,
            round=number,
            attempt_ids=self._ids(parts),
            segments=make_segments(parts, blocks_of, block_size),
            places=np.array(places, np.int32),
        )

    def _alive(self, number: int) -> list[Part]:
        return [part for part in self.rounds[number] if self.attempts[part.prompt].id in self.missing]

    def _ids(self, parts: Sequence[Part]) -> np.ndarray:
        return np.array([self.attempts[part.prompt].id for part in parts], np.int64)


def empty_receive(transfer_id: int, number: int) -> ReceivePlan:
    """Of a round that nobody waits for any more."""
    nothing = np.zeros(0, np.int32)
    segments = make_segments([], lambda part: [], 1)
    return ReceivePlan(transfer_id, number, np.zeros(0, np.int64), segments, nothing)

"""What an engine says of itself at a moment: its instances, their load, and what has been counted since its start."""

import dataclasses
from typing import Literal

import numpy as np

Role = Literal["prefill", "decode"]
Status = Literal["starting", "ready", "draining", "lost"]


class SlotLoad:
    """Rows that the physical experts of an instance have received, folded into one count.

    Attributes:
        total: `int64[moe layers, slots]` since `take`.
    """

    WINDOW_STEPS = 256  # the window holds so many steps, or up to twice as many

    def __init__(self) -> None:
        self.total = np.zeros((0, 0), np.int64)
        self._window = np.zeros((2, 0, 0), np.int64)  # the present half, and the one before
        self._num_steps = 0

    def add(self, rows: np.ndarray) -> None:
        """Count a step's rows, `[moe layers, slots]`; one without the MTP module lacks its layer, which is the last."""
        if not len(rows):
            return  # a model without experts
        if rows.shape[0] > self.total.shape[0]:
            more = ((0, rows.shape[0] - self.total.shape[0]), (0, rows.shape[1] - self.total.shape[1]))
            self.total, self._window = np.pad(self.total, more), np.pad(self._window, ((0, 0), *more))
        self.total[: rows.shape[0]] += rows
        self._window[0, : rows.shape[0]] += rows
        self._num_steps += 1
        if self._num_steps % self.WINDOW_STEPS == 0:
            self._window = np.stack([np.zeros_like(self._window[0]), self._window[0]])

    def take(self) -> np.ndarray:
        """Return and forget `total`."""
        total, self.total = self.total, np.zeros_like(self.total)
        return total

    @property
    def recent(self) -> np.ndarray:
        """`int64[moe layers, slots]` of the window; the caller's own."""
        return self._window.sum(0)

    def imbalance(self, num_ranks: int) -> float:
        """Rows of the busiest of `num_ranks` devices over their mean, in the window; the mean of the MoE layers, 1
        where nothing has been received."""
        by_rank = self.recent
        if by_rank.size == 0:
            return 1.0
        by_rank = by_rank.reshape(len(by_rank), num_ranks, -1).sum(-1)
        by_rank = by_rank[by_rank.sum(1) > 0]
        return float((by_rank.max(1) / by_rank.mean(1)).mean()) if len(by_rank) else 1.0


@dataclasses.dataclass(frozen=True)
class InstanceStats:
    """One instance.

    Attributes:
        name: such as "prefill0".
        role, status: "starting" is being compiled or starts afresh after a failure, "draining" takes nothing new,
            "lost" does nothing more.
        ep_size: its devices.
        num_running: requests it works on: prompts being prefilled, or sequences being decoded.
        num_waiting: requests given to it that it has not begun.
        num_blocks, num_used_blocks: of its KV cache, over all ranks.
        num_calls: of its step.
        num_tokens: prompt tokens prefilled, or tokens generated.
        busy_s: seconds in calls.
        num_places: of a decode instance: sequences that it can have.
        seqs_per_rank: of a decode instance: sequences that a rank runs together in a call at present.
        expert_imbalance: rows of its busiest device over the mean, see `SlotLoad.imbalance`.
    """

    name: str
    role: Role
    status: Status
    ep_size: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    num_calls: int
    num_tokens: int
    busy_s: float
    num_places: int = 0
    seqs_per_rank: int = 0
    expert_imbalance: float = 1.0


@dataclasses.dataclass
class CacheStats:
    """The prefix cache of all prefill instances. Counts only grow; tokens, where nothing else is said.

    Attributes:
        num_queried: of prompts that were looked up.
        num_hits: of them, found in the blocks of the instance itself.
        num_pool_queried: of the others, those that the memory pool was asked for.
        num_pool_hits: of these, loaded from it.
        num_fetches: fetches of blocks that began.
        num_declined: blocks that the pool had and that were computed again, which was expected to be faster.
        num_failed_lookups: requests of which the pool did not say in time what it has.
        num_failed_loads: blocks that were asked for and did not come, in time and whole.
        num_stored, num_failed_stores: blocks.
    """

    num_queried: int = 0
    num_hits: int = 0
    num_pool_queried: int = 0
    num_pool_hits: int = 0
    num_fetches: int = 0
    num_declined: int = 0
    num_failed_lookups: int = 0
    num_failed_loads: int = 0
    num_stored: int = 0
    num_failed_stores: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the tokens looked up that need not be computed, 0 to 1."""
        return (self.num_hits + self.num_pool_hits) / max(self.num_queried, 1)


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """The engine. Counts only grow.

    Attributes:
        instances: prefill first.
        num_waiting: requests that have no place yet.
        num_running: requests between their admission and their end.
        num_preemptions: how often one had to give its blocks back.
        num_handoffs, num_failed_handoffs: of KV from prefill to decode.
        num_prompt_tokens, num_generation_tokens: of requests, not of what was computed again after a preemption.
        num_drafts: steps of a request with drafts.
        num_draft_tokens, num_accepted_tokens: drafts made and kept.
        num_accepted_tokens_per_pos: kept at the first, second, ... place.
        plane_bytes: plane ("ub", "rdma", ...) -> bytes that left their device.
        cache: see `CacheStats`.
    """

    instances: list[InstanceStats]
    num_waiting: int
    num_running: int
    num_preemptions: int
    num_handoffs: int
    num_failed_handoffs: int
    num_prompt_tokens: int
    num_generation_tokens: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]
    plane_bytes: dict[str, int]
    cache: CacheStats = dataclasses.field(default_factory=CacheStats)

    @property
    def kv_usage(self) -> float:
        """Share of the decode instances' blocks that are in use, 0 to 1."""
        decode = [one for one in self.instances if one.role == "decode"]
        return sum(one.num_used_blocks for one in decode) / max(sum(one.num_blocks for one in decode), 1)

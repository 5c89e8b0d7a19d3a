"""What an engine says of itself at a moment: its instances, their load, and what has been counted since its start."""

import dataclasses
from typing import Literal

Role = Literal["prefill", "decode"]
Status = Literal["ready", "draining", "lost"]


@dataclasses.dataclass(frozen=True)
class InstanceStats:
    """One instance.

    Attributes:
        name: such as "prefill0".
        role, status: "draining" takes nothing new, "lost" does nothing more.
        ep_size: its devices.
        num_running: requests it works on: prompts being prefilled, or sequences being decoded.
        num_waiting: requests given to it that it has not begun.
        num_blocks, num_used_blocks: of its KV cache, over all ranks.
        num_calls: of its step.
        num_tokens: prompt tokens prefilled, or tokens generated.
        busy_s: seconds in calls.
        num_places: of a decode instance: sequences that it can have.
        seqs_per_rank: of a decode instance: sequences that a rank runs together in a call at present.
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

    @property
    def kv_usage(self) -> float:
        """Share of the decode instances' blocks that are in use, 0 to 1."""
        decode = [one for one in self.instances if one.role == "decode"]
        return sum(one.num_used_blocks for one in decode) / max(sum(one.num_blocks for one in decode), 1)

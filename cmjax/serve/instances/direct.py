"""Steps by hand, without an engine: for benchmarks, and for tests of the steps themselves."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cmjax.schedule import (
    DecodeGrowth,
    DecodeJoins,
    DecodePlan,
    PrefillPlan,
    PrefillResult,
    Ragged,
    Request,
    SamplingParams,
    SamplingRows,
    Scheduler,
    blocks_for,
    make_segments,
    plan_rounds,
)
from cmjax.serve import transfer
from cmjax.serve.instances.decode import DecodeExecutor
from cmjax.serve.instances.prefill import PrefillExecutor


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """A prompt after prefill.

    Attributes:
        prompt_ids: itself.
        blocks: the source's, which hold its latents on every rank.
        step_row: its row of `last_hidden`.
        last_hidden: `[prompts, hidden]`, of its step.
        token_id: the first generated token.
    """

    prompt_ids: list[int]
    blocks: list[int]
    step_row: int
    last_hidden: jax.Array
    token_id: int


class Row(NamedTuple):
    """Where a sequence goes: a place of a rank, with blocks for its whole length."""

    rank: int
    place: int
    blocks: list[int]


def plan_prompts(source: PrefillExecutor, prompts: Sequence[Sequence[int]]) -> PrefillPlan:
    """One step of whole prompts; they must fit its tokens and the cache."""
    scheduler, params = Scheduler(handoff_timeout_s=float("inf")), SamplingParams(max_tokens=1)
    planner = source.make_planner("source", scheduler)
    planner.is_compiled = True
    for index, prompt in enumerate(prompts):
        request = Request(f"prompt {index}", list(prompt), params, model=source.model.digest)
        scheduler.submit(request)
    plan = planner.plan(0.0)
    assert isinstance(plan, PrefillPlan)
    assert len(plan.places) == len(prompts)
    assert plan.is_last.all()
    return plan


def prefill_prompts(source: PrefillExecutor, prompts: Sequence[Sequence[int]]) -> list[Prefilled]:
    """Prompts after one step; their latents stay where they are until the next one."""
    plan = plan_prompts(source, prompts)
    result, last_hidden = source.run(plan), source.last_hidden(plan.number)
    assert isinstance(result, PrefillResult)
    columns = zip(prompts, plan.blocks, result.token_ids.tolist(), strict=True)
    return [
        Prefilled(list(prompt), blocks.tolist(), row, last_hidden, token_id)
        for row, (prompt, blocks, token_id) in enumerate(columns)
    ]


def fill(
    source: PrefillExecutor,
    target: DecodeExecutor,
    prompts: Sequence[Prefilled],
    first_tokens: Sequence[int],
    sampling: SamplingParams,
    num_steps: int,
) -> DecodePlan:
    """Hand prompts of one step over to the places of an empty decode instance, to one rank after another, each with the
    blocks of its whole length.

    Args:
        first_tokens: to go on with, one each.
        sampling: of all.
        num_steps: of a call.

    Returns:
        The call that begins with them; `rows_in_order` says which sequence a row is.
    """
    num_ranks, settings = target.instance.ep_size, target.settings
    rows: list[Row] = []
    used = np.zeros(num_ranks, np.int64)
    for index, prompt in enumerate(prompts):
        place, rank = divmod(index, num_ranks)
        needed = blocks_for(len(prompt.prompt_ids) + sampling.max_tokens - 1, settings.block_size)
        rows.append(Row(rank, place, list(range(int(used[rank]), int(used[rank]) + needed))))
        used[rank] += needed
    assert max(used.tolist()) <= target.num_blocks
    _hand_over(source, target, prompts, rows)
    order = rows_in_order(len(prompts), num_ranks)
    places = np.array([rows[index].rank * target.num_places + rows[index].place for index in order], np.int32)
    lengths = np.array([len(prompts[index].prompt_ids) for index in order], np.int32)
    nothing = np.zeros(0, np.int32)
    return DecodePlan(
        number=0,
        variant=target.variants_for(num_steps, [sampling])[0],
        microbatches=min(target.specs),
        attempt_ids=np.array(order, np.int64),
        places=places,
        joins=DecodeJoins(
            places=places,
            token_ids=np.array([first_tokens[index] for index in order], np.int32),
            positions=lengths,
            last_positions=lengths + (sampling.max_tokens - 2),
            blocks=Ragged.of([rows[index].blocks for index in order]),
            sampling=SamplingRows.of(
                [sampling] * len(order),
                [sampling.seed or 0] * len(order),
                [prompts[index].prompt_ids for index in order],
            ),
            history=Ragged.of([() for _ in order]),
        ),
        growth=DecodeGrowth(nothing, nothing, Ragged.of([]), nothing),
        logprob_rows=nothing,
    )


def _hand_over(
    source: PrefillExecutor, target: DecodeExecutor, prompts: Sequence[Prefilled], rows: Sequence[Row]
) -> None:
    """Copy prompts' latents (the MTP layer's included) and last hidden states to their rows, and wait for them."""
    lengths = [len(one.prompt_ids) for one in prompts]
    for parts in plan_rounds([row.rank for row in rows], lengths, transfer.round_tokens(target.settings)):
        ends = [part.hidden_row >= 0 for part in parts]
        step_rows = [prompts[part.prompt].step_row if end else -1 for part, end in zip(parts, ends, strict=True)]
        places = [rows[part.prompt].place if end else -1 for part, end in zip(parts, ends, strict=True)]
        here = make_segments(parts, lambda part: prompts[part.prompt].blocks, source.settings.block_size)
        there = make_segments(parts, lambda part: rows[part.prompt].blocks, target.settings.block_size)
        payload = transfer.read(source, target, here, np.array(step_rows, np.int32), prompts[0].last_hidden)
        transfer.write(target, payload, there, np.array(places, np.int32))


def rows_in_order(num_sequences: int, num_ranks: int) -> list[int]:
    """Which sequence each row of `fill`'s plan is: by rank, then by place."""
    return sorted(range(num_sequences), key=lambda index: (index % num_ranks, index // num_ranks))

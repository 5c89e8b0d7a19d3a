"""Hand-offs by hand, without an engine."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cmjax.schedule import make_segments, plan_rounds
from cmjax.serve.transfer.latents import read, write
from cmjax.serve.transfer.rounds import round_tokens
from cmjax.serve.transfer.wire import Holder, Receiver


class Move(NamedTuple):
    """A prompt to hand over by hand: its tokens' blocks at the source and its row in the step that ended it, and the
    rank, place and blocks it goes to."""

    num_tokens: int
    source_blocks: Sequence[int]
    step_row: int
    rank: int
    place: int
    target_blocks: Sequence[int]


def hand_off(source: Holder, target: Receiver, moves: Sequence[Move], last_hidden: jax.Array) -> None:
    """Copy prompts' latents (the MTP layer's included) and last hidden states to decode places, and wait for them.

    An engine does the same by plans, beside its steps.
    """
    rounds = plan_rounds([one.rank for one in moves], [one.num_tokens for one in moves], round_tokens(target.settings))
    for parts in rounds:
        ends = [part.hidden_row >= 0 for part in parts]
        rows = [moves[part.prompt].step_row if end else -1 for part, end in zip(parts, ends, strict=True)]
        places = [moves[part.prompt].place if end else -1 for part, end in zip(parts, ends, strict=True)]
        here = make_segments(parts, lambda part: moves[part.prompt].source_blocks, source.settings.block_size)
        there = make_segments(parts, lambda part: moves[part.prompt].target_blocks, target.settings.block_size)
        payload = read(source, target, here, np.array(rows, np.int32), last_hidden)
        write(target, payload, there, np.array(places, np.int32))

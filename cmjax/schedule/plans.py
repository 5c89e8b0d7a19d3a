"""What an instance is told to do, and what came of it.

A plan is made with the engine's lock held and run without it. It brings all that the run needs: rows are NumPy
arrays, named by their attempt's id and their place. A row that joins brings everything, one that goes on only what is
new. Plans and results can be pickled, so that an executor may live in another process; it never sees a request.
"""

import dataclasses
from typing import ClassVar, Literal, Protocol

import numpy as np

from cmjax.schedule.blocks import Ragged
from cmjax.schedule.pool_plans import PoolNews, PoolPlan
from cmjax.schedule.sampling import LogprobArrays, SamplingRows, SamplingShape

# What an instance spends its time with.
Kind = Literal["prefill", "handoff", "decode", "change", "cache"]


@dataclasses.dataclass(frozen=True)
class PrefillVariant:
    """A compiled prefill step: tokens it is padded to, and what it can do."""

    num_tokens: int
    sampling: SamplingShape


@dataclasses.dataclass(frozen=True)
class DecodeVariant:
    """A compiled decode call: sequences that each rank has rows for, steps, and what it can do."""

    num_slots: int
    num_steps: int
    sampling: SamplingShape


Variant = PrefillVariant | DecodeVariant


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """A prefill step: chunks of prompts side by side. r rows, t tokens of all of them.

    Attributes:
        number: of the plan; the hidden states of its prompts' ends go by it until they are sent.
        variant, microbatches: the compiled variant to run.
        attempt_ids: `int64[r]`.
        places: `int32[r]`, the row of the instance's table of blocks that each has.
        starts, stops: `int32[r]`, tokens `[start, stop)` of each.
        is_last: `bool[r]`, whether the chunk ends its prompt.
        token_ids: `int32[t]`, of the chunks.
        next_token_ids: `int32[t]`, the token after each, -1 after a prompt's last.
        joins: `int32[j]`, the rows that begin.
        blocks: of each that begins, for all its tokens.
        sampling: of the rows; None where all just take the best token.
        logprob_rows, prompt_logprob_rows: int32, rows whose first token's, and whose chunk's following tokens', log
            probabilities are asked for.
        oldest_step: hidden states of earlier plans are not needed any more.
    """

    kind: ClassVar[Kind] = "prefill"
    number: int
    variant: PrefillVariant
    microbatches: int
    attempt_ids: np.ndarray
    places: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    is_last: np.ndarray
    token_ids: np.ndarray
    next_token_ids: np.ndarray
    joins: np.ndarray
    blocks: Ragged
    sampling: SamplingRows | None
    logprob_rows: np.ndarray
    prompt_logprob_rows: np.ndarray
    oldest_step: int


@dataclasses.dataclass(frozen=True)
class PrefillResult:
    """What came of a prefill step.

    Attributes:
        token_ids: `int32[r]`, the token after each chunk, or `NOT_FINITE`.
        slot_load: `int64[moe layers, slots]`, rows each physical expert received (the MTP layer's last).
        seconds: it took.
        logprobs: of `logprob_rows`.
        prompt_logprobs: of the tokens of `prompt_logprob_rows`, one row's after another's.
    """

    token_ids: np.ndarray
    slot_load: np.ndarray
    seconds: float
    logprobs: LogprobArrays | None = None
    prompt_logprobs: LogprobArrays | None = None


@dataclasses.dataclass(frozen=True)
class DecodeJoins:
    """Rows that begin to decode, j of them.

    Attributes:
        places: `int32[j]`.
        token_ids: `int32[j]`, the newest token of each, which is not in its cache yet.
        positions: `int32[j]`, its position.
        last_positions: `int32[j]`, the last one that its blocks, and its limit of tokens, leave room for.
        blocks: of each.
        sampling: of each.
        history: what each has generated, where it has penalties.
    """

    places: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    last_positions: np.ndarray
    blocks: Ragged
    sampling: SamplingRows
    history: Ragged


@dataclasses.dataclass(frozen=True)
class DecodeGrowth:
    """Rows that go on with more blocks, g of them.

    Attributes:
        places: `int32[g]`.
        first: `int32[g]`, how many blocks each had.
        blocks: those that come after.
        last_positions: `int32[g]`, as of `DecodeJoins`.
    """

    places: np.ndarray
    first: np.ndarray
    blocks: Ragged
    last_positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """A decode call. r rows.

    Attributes:
        number: of the plan.
        variant, microbatches: the compiled variant to run.
        attempt_ids: `int64[r]`.
        places: `int32[r]`, ascending: rank * places of a rank + place.
        joins, growth: what is new.
        logprob_rows: int32, rows whose log probabilities are asked for.
    """

    kind: ClassVar[Kind] = "decode"
    number: int
    variant: DecodeVariant
    microbatches: int
    attempt_ids: np.ndarray
    places: np.ndarray
    joins: DecodeJoins
    growth: DecodeGrowth
    logprob_rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """What came of a decode call. k drafts a step.

    Attributes:
        token_ids: `int32[steps * (k + 1), r]`, those of a step side by side, -1 where there is none, `NOT_FINITE`
            where the logits are not finite.
        slot_load: `int64[moe layers, slots]`.
        seconds: it took.
        logprobs: of `[steps * (k + 1), logprob_rows]`, flattened.
    """

    token_ids: np.ndarray
    slot_load: np.ndarray
    seconds: float
    logprobs: LogprobArrays | None = None


@dataclasses.dataclass(frozen=True)
class Segments:
    """Parts of prompts that travel in one round of a transfer, ordered by the decode rank they go to. s segments.

    Attributes:
        ranks: `int32[s]`, decode ranks.
        begins: `int32[s]`, where each begins among the tokens that its rank receives in the round.
        starts, stops: `int32[s]`, tokens `[start, stop)` of its prompt.
        hidden_rows: `int32[s]`, which of the hidden states that its rank receives is its own; -1 where the prompt does
            not end with it.
        blocks: those that hold the tokens; the first holds token `start`.
    """

    ranks: np.ndarray
    begins: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    hidden_rows: np.ndarray
    blocks: Ragged


@dataclasses.dataclass(frozen=True)
class SendPlan:
    """The source's half of a round of a hand-off: read latents, and let them travel.

    Attributes:
        transfer_id, round: which one.
        target: the decode instance.
        step: the prefill plan that ended these prompts.
        attempt_ids: `int64[s]`.
        segments: where they lie at the source.
        step_rows: `int32[s]`, rows of the step whose hidden states travel along, -1 for none.
    """

    kind: ClassVar[Kind] = "handoff"
    transfer_id: int
    round: int
    target: str
    step: int
    attempt_ids: np.ndarray
    segments: Segments
    step_rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class ReceivePlan:
    """The target's half of a round: write what has arrived. Segments of attempts that are over are not among them.

    Attributes:
        transfer_id, round: which one; without segments it is thrown away.
        attempt_ids: `int64[s]`.
        segments: where they go.
        places: `int32[s]`, places of their ranks that the hidden states go to, -1 for none.
    """

    kind: ClassVar[Kind] = "handoff"
    transfer_id: int
    round: int
    attempt_ids: np.ndarray
    segments: Segments
    places: np.ndarray


@dataclasses.dataclass(frozen=True)
class CompilePlan:
    """Compile steps, those that are not compiled yet, and use these from now on.

    Attributes:
        variants: ascending; the last fits everything that the instance is given.
        targets: decode instances that a prefill instance will send to.
    """

    kind: ClassVar[Kind] = "change"
    variants: tuple[Variant, ...]
    targets: tuple[str, ...] = ()

    @property
    def gives_cache(self) -> bool:
        """Whether it runs steps, which take the cache along where they fail; sending only reads."""
        return bool(self.variants) or not self.targets


@dataclasses.dataclass(frozen=True)
class RestartPlan:
    """Forget everything and start with an empty cache: a failed run has taken it along."""

    kind: ClassVar[Kind] = "change"


Plan = PrefillPlan | DecodePlan | SendPlan | ReceivePlan | CompilePlan | RestartPlan | PoolPlan
Result = PrefillResult | DecodeResult | None
# A round of a transfer that has arrived.
Arrival = tuple[int, int]
# What an executor says has come about beside its plans.
News = Arrival | PoolNews


class Executor(Protocol):
    """Runs plans, one at a time: in this process, in another one, or in virtual time."""

    def run(self, plan: Plan) -> Result:
        """Run a plan; raises where it fails, and then only a `RestartPlan` is sure to work."""
        ...

    def poll(self) -> list[News]:
        """What has arrived since the last call: rounds, and what was asked of the memory pool."""
        ...

    @property
    def expects_arrivals(self) -> bool:
        """Whether something is on its way here that has not arrived."""
        ...

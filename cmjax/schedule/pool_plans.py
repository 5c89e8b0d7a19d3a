"""What a prefill instance asks of the memory pool, and what comes of it: see `cmjax.schedule.plans`.

Looking up, fetching and storing only begin where their plan is run; they go on beside steps, and what comes of them
arrives later. A cached block is the part of a prompt that is stored and fetched as one, `block_tokens` tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from cmjax.schedule.fetch_policy import PoolBlock, PoolRate


@dataclasses.dataclass(frozen=True)
class LookupPlan:
    """Begin to look for blocks. a attempts.

    Attributes:
        attempt_ids: `int64[a]`, of those that want them.
        namespaces: of each.
        names: of the blocks of each, in the order of its prompt.
    """

    kind: ClassVar[Literal["cache"]] = "cache"
    gives_cache: ClassVar[bool] = False
    attempt_ids: np.ndarray
    namespaces: tuple[str, ...]
    names: tuple[tuple[bytes, ...], ...]


@dataclasses.dataclass(frozen=True)
class FetchPlan:
    """Begin to fetch n blocks of an attempt.

    Attributes:
        names: in the order of its prompt.
        token_ids: `int32[n, block_tokens]`, what they must be of.
        next_token_ids: `int32[n]`, the token after each.
    """

    kind: ClassVar[Literal["cache"]] = "cache"
    gives_cache: ClassVar[bool] = False
    attempt_id: int
    namespace: str
    names: tuple[bytes, ...]
    token_ids: np.ndarray
    next_token_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """Write n fetched blocks into the cache; those before them have been.

    Attributes:
        first: of those fetched.
        blocks: `int32[n, blocks of a cached block]`; none: what has been fetched is thrown away, if there is any left.
        last_positions: `int32[n]`, of the last token of each.
        next_token_ids: `int32[n]`, the token after it.
        is_last: whether nothing of what was fetched is needed after it.
    """

    kind: ClassVar[Literal["cache"]] = "cache"
    gives_cache: ClassVar[bool] = True
    attempt_id: int
    first: int
    blocks: np.ndarray
    last_positions: np.ndarray
    next_token_ids: np.ndarray
    is_last: bool


@dataclasses.dataclass(frozen=True)
class StorePlan:
    """Read n blocks, and begin to store them.

    Attributes:
        names, namespaces: of each.
        token_ids: `int32[n, block_tokens]`.
        ranks: `int32[n]`, whose cache they lie in, where each rank has its own.
        blocks: `int32[n, blocks of a cached block]`.
        step: the prefill plan that computed the last token of each; -1: decode calls did.
        hidden_rows: `int32[n]`, which token of that step it is.
        next_token_ids: `int32[n]`, the token that what the MTP module has of the last one goes by; -1: by none, the
            hidden state is stored in its place.
    """

    kind: ClassVar[Literal["cache"]] = "cache"
    gives_cache: ClassVar[bool] = False
    names: tuple[bytes, ...]
    namespaces: tuple[str, ...]
    token_ids: np.ndarray
    ranks: np.ndarray
    blocks: np.ndarray
    step: int
    hidden_rows: np.ndarray
    next_token_ids: np.ndarray


PoolPlan = LookupPlan | FetchPlan | LoadPlan | StorePlan


@dataclasses.dataclass(frozen=True)
class Found:
    """A lookup has ended: the blocks found, from the first one on, and what fetches are measured to take; or it has
    failed."""

    attempt_id: int
    blocks: tuple[PoolBlock, ...]
    rates: Mapping[str, PoolRate]
    has_failed: bool = False


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A fetch has ended: so many blocks, from the first one on, are whole and of the tokens that they must be of."""

    attempt_id: int
    num_blocks: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """Blocks have been stored, or could not be."""

    num_stored: int
    failed: tuple[bytes, ...] = ()


PoolNews = Found | Fetched | Stored

"""The memory pool in virtual time: it holds the tokens of blocks in place of their latents."""

import dataclasses
import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np

from cmjax.schedule.fetch_policy import PoolBlock, PoolRate
from cmjax.schedule.pool_plans import Fetched, FetchPlan, Found, LookupPlan, PoolNews, PoolPlan, Stored, StorePlan


@dataclasses.dataclass(frozen=True)
class VirtualNames:
    """Names of cached blocks in virtual time."""

    block_tokens: int

    def name(self, parent: bytes, token_ids: np.ndarray) -> bytes:
        """See `BlockNames`."""
        return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class VirtualBlock:
    """A block of the pool."""

    token_ids: np.ndarray
    tier: str


@dataclasses.dataclass
class VirtualPool:
    """Blocks by namespace and name, and how long everything takes.

    What is asked for is answered later, by what has become of it by then: a block can be found and be gone before it
    is fetched, and one that is stored is found when all of it is there. Each of the methods returns how many answers
    will come.

    Attributes:
        later: has something happen after so many seconds.
        block_bytes: of a block.
        rates: what fetches take, by tier; those of tiers that have been fetched from are `measured`.
        delay_s: seconds that something takes besides; None: it takes for ever.
        tier_of: where a block goes, by its name.
        is_refused: whether a block cannot be stored, by its name.
        blocks: those that are there.
    """

    later: Callable[[float, Callable[[], None]], None]
    block_bytes: int = 1
    rates: Mapping[str, PoolRate] = dataclasses.field(default_factory=lambda: {"dram": PoolRate(0.0, float("inf"))})
    delay_s: Callable[[PoolPlan], float | None] = lambda plan: 0.0
    tier_of: Callable[[bytes], str] = lambda name: "dram"
    is_refused: Callable[[bytes], bool] = lambda name: False
    blocks: dict[tuple[str, bytes], VirtualBlock] = dataclasses.field(default_factory=dict)
    measured: dict[str, PoolRate] = dataclasses.field(default_factory=dict)

    def lookup(self, plan: LookupPlan, tell: Callable[[PoolNews], None]) -> int:
        """Look for the blocks of each attempt, each for itself."""

        def end(index: int) -> None:
            tell(self._find(int(plan.attempt_ids[index]), plan.namespaces[index], plan.names[index]))

        return sum(self._answer(plan, 0.0, functools.partial(end, index)) for index in range(len(plan.names)))

    def fetch(self, plan: FetchPlan, tell: Callable[[Fetched, list[np.ndarray]], None]) -> int:
        """Fetch the blocks that are still there and of the right tokens, up to the first that is not."""
        num_bytes: dict[str, int] = defaultdict(int)
        for name in plan.names:
            if (block := self.blocks.get((plan.namespace, name))) is not None:
                num_bytes[block.tier] += self.block_bytes

        def end() -> None:
            self.measured |= {tier: self.rates[tier] for tier in num_bytes}
            found: list[np.ndarray] = []
            for name, token_ids in zip(plan.names, plan.token_ids, strict=True):
                block = self.blocks.get((plan.namespace, name))
                if block is None or not np.array_equal(block.token_ids, token_ids):
                    break
                found.append(block.token_ids)
            tell(Fetched(plan.attempt_id, len(found)), found)

        return self._answer(plan, sum(self.rates[tier].seconds(size) for tier, size in num_bytes.items()), end)

    def store(self, plan: StorePlan, token_ids: np.ndarray, tell: Callable[[PoolNews], None]) -> int:
        """Store blocks, `[n, block_tokens]`; they are there when all of them are."""

        def end() -> None:
            failed = tuple(name for name in plan.names if self.is_refused(name))
            for namespace, name, tokens in zip(plan.namespaces, plan.names, token_ids, strict=True):
                if name not in failed:
                    self.blocks[namespace, name] = VirtualBlock(tokens, self.tier_of(name))
            tell(Stored(len(plan.names) - len(failed), failed))

        return self._answer(plan, 0.0, end)

    def _find(self, attempt_id: int, namespace: str, names: tuple[bytes, ...]) -> Found:
        found = []
        for name in names:
            if (block := self.blocks.get((namespace, name))) is None:
                break
            found.append(PoolBlock(block.tier, self.block_bytes))
        return Found(attempt_id, tuple(found), dict(self.measured))

    def _answer(self, plan: PoolPlan, seconds: float, end: Callable[[], None]) -> int:
        delay_s = self.delay_s(plan)
        if delay_s is None:
            return 0
        self.later(seconds + delay_s, end)
        return 1

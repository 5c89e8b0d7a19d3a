"""What instances do with the memory pool: their half of lookups, fetches, loads and stores."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from cmjax.mesh import fabric
from cmjax.model import Params, token_order
from cmjax.schedule import CacheSizes, FetchPlan, LoadPlan, LookupPlan, PoolNews, PoolPlan, PrefillPlan, StorePlan
from cmjax.serve.caching.context import BlockEnd, ContextCache, Link, PoolPort
from cmjax.serve.steps import PrefillOutput
from cmjax.serve.transfer import CachedBlocks, plan_blocks, read_of_ranks
from cmjax.serve.transfer.wire import Holder


class PrefixCaching:
    """A prefill instance's access to the pool.

    Args:
        holder: the instance.
        context: of all instances.

    Attributes:
        port: what is under way.
        sizes: for the instance's planner.
    """

    def __init__(self, holder: Holder, context: ContextCache) -> None:
        self.sizes = _sizes(holder, context)
        self._holder, self._blocks = holder, CachedBlocks(holder, context.layout, self.sizes.plan_blocks)
        self._hidden: dict[int, tuple[jax.Array, np.ndarray]] = {}  # step -> [tokens, hidden], where each token is
        self._is_compiled = False
        self.port = PoolPort(context, _link(holder, context))

    @property
    def wants_hidden(self) -> bool:
        """Whether the hidden states of a step's tokens are stored, too."""
        return self._blocks.layout.hidden_size > 0

    def poll(self) -> list[PoolNews]:
        """What has come of earlier plans."""
        return self.port.poll()

    def forget(self) -> None:
        """The instance starts afresh."""
        self._hidden.clear()
        self.port.forget()

    def keep_hidden(self, plan: PrefillPlan, output: PrefillOutput) -> None:
        """Hold the hidden states of a step until what it has computed is stored."""
        if output.hidden is not None:
            self._hidden = {step: kept for step, kept in self._hidden.items() if step >= plan.oldest_step}
            order = token_order(plan.variant.num_tokens, self._holder.instance.ep_size, plan.microbatches)
            self._hidden[plan.number] = output.hidden, order

    def run(self, plan: PoolPlan, params: Params) -> jax.Array | None:
        """Run a plan; the instance's cache where it has been given a new one."""
        if isinstance(plan, LookupPlan):
            self.port.lookup(plan)
        elif isinstance(plan, FetchPlan):
            self.port.fetch(plan)
        elif isinstance(plan, LoadPlan):
            return self._load(plan, params)
        else:
            found, count = self._blocks.read(plan.blocks), len(plan.names)
            # These rows alone, now: what waits to be stored must not hold the states of whole steps.
            ends: Sequence[BlockEnd] = [None] * count
            if self.wants_hidden:
                ends = _rows(*self._hidden[plan.step], plan.hidden_rows)
            self.port.store(
                plan.names, plan.namespaces, plan.token_ids, lambda: (self._blocks.on_host(found, count), ends)
            )
        return None

    def compile(self, params: Params, keep: Callable[[jax.Array], None]) -> None:
        """Compile what reads and writes blocks, once, by running it; the instance's new cache is given to `keep`."""
        if not self._is_compiled:
            self._blocks.compile(params, keep)
            self._is_compiled = True

    def _load(self, plan: LoadPlan, params: Params) -> jax.Array | None:
        found = self.port.fetched(plan.attempt_id, plan.first, len(plan.blocks), is_last=plan.is_last)
        if not len(plan.blocks):
            return None
        if len(found) != len(plan.blocks):
            raise RuntimeError(f"{len(plan.blocks)} blocks are to be loaded, {len(found)} have been fetched")
        begin = time.perf_counter()
        cache = jax.block_until_ready(self._blocks.write(params, plan, found))
        self.port.loaded(time.perf_counter() - begin)
        return cache


class GeneratedCaching:
    """A decode instance's access to the pool: it stores what it has made.

    Attributes:
        port, sizes: as of `PrefixCaching`.
    """

    def __init__(self, holder: Holder, context: ContextCache) -> None:
        self._holder = holder
        self.port = PoolPort(context, _link(holder, context))
        self.sizes = _sizes(holder, context)

    def run(self, plan: StorePlan) -> None:
        """Read a block of some ranks, and begin to store them."""
        found = read_of_ranks(self._holder, plan.ranks, plan.blocks)
        has_mtp = self.sizes.needs_next
        ends = [token if has_mtp else None for token in plan.next_token_ids.tolist()]
        self.port.store(
            plan.names, plan.namespaces, plan.token_ids, lambda: (np.concatenate([*map(np.asarray, found)]), ends)
        )

    def compile(self) -> None:
        """Compile what reads blocks, by reading some."""
        per_block = self.sizes.block_tokens // self._holder.settings.block_size
        jax.block_until_ready(read_of_ranks(self._holder, np.zeros(1, np.int32), np.zeros((1, per_block), np.int32)))


def _sizes(holder: Holder, context: ContextCache) -> CacheSizes:
    layout, settings = context.layout, context.settings
    return CacheSizes(
        block_tokens=layout.block_tokens,
        needs_next=holder.model.params.mtp is not None,
        plan_blocks=plan_blocks(layout.block_tokens, holder.settings.max_model_len),
        keeps_generated=settings.decode_blocks != "never",
        is_priced=settings.fetch == "auto",
    )


def _rows(hidden: jax.Array, order: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Hidden states of some tokens of a step, from the ranks that have them."""
    share = len(order) // len(hidden.addressable_shards)
    shards = {(one.index[0].start or 0) // share: one.data for one in hidden.addressable_shards}
    places = order[rows].tolist()
    return [np.array(np.asarray(shards[place // share])[place % share]) for place in places]


def _link(holder: Holder, context: ContextCache) -> Link:
    """Every rank moves an equal share of each block; on a plane whose links belong to the nodes these share theirs."""
    instance, num_ranks, plane = holder.instance, holder.instance.ep_size, context.settings.plane
    num_links = num_ranks if plane == "ub" else -(-num_ranks // context.ranks_per_node)

    def account(is_fetch: bool, cpu: int, num_bytes: int) -> None:
        pool_id = jax.device_count() + cpu
        for rank, device in enumerate(instance.devices):
            source, target = (pool_id, device.id) if is_fetch else (device.id, pool_id)
            name = "cache_fetch" if is_fetch else "cache_store"
            fabric.record(plane, name, source, target, num_bytes // num_ranks, calls=int(rank == 0))

    return Link(lambda num_bytes: fabric.delay_s(plane, num_bytes / num_links), account)

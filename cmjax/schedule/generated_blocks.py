"""What decode makes, for the prefix cache: blocks of generated tokens, which later prompts may begin with (paper
section 4.4.2; a reasoning model's thoughts do not come back in them, so its blocks are not kept)."""

from cmjax.schedule.block_stores import BlockStores, OutgoingBlock
from cmjax.schedule.decode_places import DecodePlaces
from cmjax.schedule.prefill_cache import CacheSizes
from cmjax.schedule.request import Request
from cmjax.schedule.stats import CacheStats


class GeneratedBlocks:
    """Blocks of requests that have ended at a decode instance, on their way to the pool.

    Those of a model with an MTP module are stored with what it has of their last token, and so for the token that came
    after it alone; without drafts the module has not seen generated tokens, and none are stored.

    Args:
        sizes: None: nothing is cached.
        block_size: of the instance.
        num_drafts: in a step.
        counts: of all instances.
    """

    def __init__(self, sizes: CacheSizes | None, block_size: int, num_drafts: int, counts: CacheStats) -> None:
        keeps = sizes is not None and sizes.has_pool and sizes.keeps_generated
        self._sizes = sizes if keeps and sizes and (num_drafts or not sizes.needs_next) else None
        self._block_size = block_size
        # What the newest step has made the MTP module sees in the next one.
        self._num_unseen = num_drafts + 1 if sizes is not None and sizes.needs_next else 0
        self.stores = BlockStores(1, counts)

    def ended(self, request: Request) -> None:
        """A request has all its tokens: store what they fill."""
        sizes, chain, attempt = self._sizes, request.chain, request.attempt
        if sizes is None or chain is None or attempt is None or attempt.decode is None:
            return
        hold, size = attempt.decode, sizes.block_tokens
        token_ids = request.prompt_ids + request.token_ids
        num_blocks = (len(token_ids) - 1 - self._num_unseen) // size
        chain.extend(token_ids[: max(num_blocks, 0) * size])
        per_block = size // self._block_size
        for index in range(len(request.prompt_ids) // size, num_blocks):
            blocks = hold.blocks.ids[index * per_block : (index + 1) * per_block]
            self.stores.add(
                OutgoingBlock(
                    chain.names[index],
                    chain.namespace,
                    chain.token_ids[index],
                    hold.blocks.pool.share(blocks),
                    rank=hold.rank,
                    next_token=token_ids[(index + 1) * size] if sizes.needs_next else -1,
                )
            )

    def make_room(self, places: DecodePlaces) -> None:
        """Sequences that need blocks come before what waits to be stored."""
        if places.least_free_blocks < places.num_places:
            self.stores.give_up()

"""The prefix cache of an engine: the pool that it opens, and how its requests name their blocks."""

import logging
from pathlib import Path

from cmjax.model import Model, default_wires
from cmjax.schedule import BlockChain, blocks_for
from cmjax.serve.caching import CacheSettings, open_pool
from cmjax.serve.caching.context import BlockLayout, ContextCache
from cmjax.serve.caching.keys import CacheKeys, read_or_make_key
from cmjax.serve.settings import EngineSettings

logger = logging.getLogger(__name__)

_KEY_FILE = "prefix-cache.key"


def open_context(model: Model, settings: EngineSettings, cache: CacheSettings, ranks_per_node: int) -> ContextCache:
    """Open the pool for blocks of a model.

    Raises:
        UserError: its nodes, its folder or its key cannot be had, or a block does not fit.
    """
    config, has_mtp = model.config, model.params.mtp is not None
    layout = BlockLayout(
        block_tokens=blocks_for(cache.cache_block_size, settings.block_size) * settings.block_size,
        num_layers=config.num_cache_layers,
        width=config.latent_width,
        dtype=model.dtype,
        hidden_size=config.hidden_size if has_mtp else 0,
    )
    file = cache.key_file or (None if cache.folder is None else Path(cache.folder) / _KEY_FILE)
    pool = open_pool(cache, layout.num_bytes)
    try:
        keys = CacheKeys(
            read_or_make_key(None if file is None else Path(file)), layout.block_tokens, _fields(model, settings)
        )
    except BaseException:
        pool.close()
        raise
    if layout.block_tokens >= settings.max_model_len:
        logger.warning(
            "no request is as long as a cached block of %d tokens: nothing will be cached; lower --cache-block-size",
            layout.block_tokens,
        )
    if cache.nodes and cache.key_file is None:
        logger.warning(
            "blocks on servers are named with a key of this process alone, and nobody finds them again: give all that "
            "share them one --cache-key-file"
        )
    return ContextCache(cache, pool, layout, keys, ranks_per_node)


def make_chain(context: ContextCache, namespace: str, cache_salt: str, prompt_ids: list[int]) -> BlockChain:
    """The names of a prompt's blocks. The choices of one call come one after another: they are named once."""
    root = context.keys.root(namespace, cache_salt)
    newest = context.newest
    if newest is not None and newest[:2] == (root, prompt_ids):
        return newest[2].copy()
    chain = BlockChain(context.keys, root, namespace)
    chain.extend(prompt_ids)
    context.newest = root, prompt_ids, chain.copy()
    return chain


def _fields(model: Model, settings: EngineSettings) -> dict[str, str]:
    """All but the tokens that latents depend on."""
    dispatch_dtype, combine_dtype = default_wires(model.params)
    exchange = settings.exchange
    return {
        "weights": model.digest,
        "config": repr(model.config),
        "quantization": f"{model.quant} {sorted(model.quantized)}",
        "dtype": model.dtype.name,
        "dispatch_dtype": str(settings.dispatch_dtype or dispatch_dtype),
        "combine_dtype": str(settings.combine_dtype or combine_dtype),
        "exchange": f"{exchange.__module__}.{getattr(exchange, '__qualname__', repr(exchange))}",
        "mtp": str(model.params.mtp is not None),
    }

"""The settings of the prefix cache and of the memory pool below it."""

import dataclasses
from typing import Literal, get_args

from cmjax.errors import UserError
from cmjax.options import check_bounds, option

Plane = Literal["ub", "vpc"]
Fetch = Literal["auto", "always"]
When = Literal["auto", "always", "never"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The prefix cache and its memory pool."""

    enable_prefix_caching: bool = option(
        True,
        "Keep what prompts have been computed to, for later prompts that begin alike.",
        flag="--enable-prefix-caching/--no-enable-prefix-caching",
    )
    cache_block_size: int = option(128, "Tokens of a cached block.", flag="--cache-block-size", minimum=1)
    dram_bytes: int = option(
        2_000_000_000,
        "Memory for cached blocks, of all embedded nodes together; the option is in GB.",
        flag="--cache-dram-gb",
        minimum=1,
        scale=1e9,
    )
    disk_bytes: int = option(
        20_000_000_000,
        "Disk for cached blocks, of all embedded nodes together, where there is a folder; the option is in GB.",
        flag="--cache-disk-gb",
        minimum=1,
        scale=1e9,
    )
    folder: str | None = option(
        None,
        "Folder for cached blocks: they outlive the server there.",
        flag="--cache-dir",
        unset="no persistent tier",
    )
    num_nodes: int = option(1, "Embedded nodes of the pool.", flag="--cache-num-nodes", minimum=1)
    nodes: tuple[str, ...] = option(
        (),
        "A node on a server that speaks Redis' protocol, redis://host:port[/database], in place of the embedded ones; "
        "several: one each.",
        flag="--cache-node",
        unset="embedded ones",
    )
    namespace_bytes: int | None = option(
        None,
        "What the blocks of one namespace may take; the option is in GB.",
        flag="--cache-namespace-gb",
        minimum=1,
        scale=1e9,
        unset="no limit",
    )
    share: bool = option(False, "All API keys share one namespace.", flag="--share-prefix-cache")
    key_file: str | None = option(
        None,
        "File with the secret that names of blocks are made with.",
        flag="--cache-key-file",
        unset="one of its own",
    )
    plane: Plane = option("ub", "Network that blocks travel over.", flag="--cache-plane", choices=get_args(Plane))
    fetch: Fetch = option(
        "auto",
        "When blocks are fetched from the pool; auto: where that is expected to be faster than computing them again.",
        flag="--cache-fetch",
        choices=get_args(Fetch),
    )
    decode_blocks: When = option(
        "auto",
        "Whether blocks of generated tokens are kept; auto: unless the model thinks before it answers, since its "
        "thoughts do not come back in later prompts.",
        flag="--cache-decode-blocks",
        choices=get_args(When),
    )

    def for_model(self, *, thinks: bool) -> "CacheSettings":
        """With what "auto" stands for, for a model that thinks before it answers, or does not."""
        if self.decode_blocks != "auto":
            return self
        return dataclasses.replace(self, decode_blocks="never" if thinks else "always")

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.nodes and self.folder is not None:
            raise UserError("--cache-dir is for embedded nodes: --cache-node replaces those")

"""`cmjax bench cache trace`: how often requests of a trace hit the prefix cache of an engine, beside what their hashes
predict, and the most that a cache of the size can hit."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from cmjax.bench import peer
from cmjax.bench.cache import Tell, random_model, send, silent, started
from cmjax.bench.cache_bound import Lookup, clairvoyant_hits, count_distinct, lru_hits, make_lookups
from cmjax.bench.report import machine
from cmjax.bench.tables import define, new_table
from cmjax.errors import UserError
from cmjax.model import Model, token_bytes
from cmjax.options import check_bounds, option
from cmjax.schedule import blocks_for
from cmjax.serve import EngineSettings
from cmjax.serve.caching import CacheSettings
from cmjax.text import JsonObject

# How often something is found does not depend on what the model makes of it.
CONFIG = dataclasses.replace(
    peer.CONFIG,
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    moe_intermediate_size=32,
    num_routed_experts=8,
    num_topk=2,
    num_expert_groups=1,
    num_topk_groups=1,
    max_position_embeddings=1 << 20,
)
MOST_OFF = 0.02
DEFINITIONS = {
    "hit rate": "prompt tokens that need not be computed, over all prompt tokens",
    "predicted": "by the hashes alone: a cache of as many blocks as the pool (or as the instance, where it has more), "
    "which forgets what was used longest ago; whole blocks, from the first on, and never the last token of a prompt",
    "delivered": "by the engine, which gets the requests in the order of their arrival, each when the one before has "
    "been answered",
    "clairvoyant": "the most that any cache can that holds as many blocks as pool and instance together, and gets them "
    "from the prompts: it knows all requests to come (Belady's MIN, of whole prefixes)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceCacheSettings:
    """The requests of a trace with hashes, scaled down, and the caches that they are sent to."""

    num_requests: int | None = option(
        None, "The first so many of the trace.", flag="--num-requests", minimum=1, unset="all"
    )
    hash_tokens: int = option(512, "Tokens that one of its hashes stands for.", flag="--hash-tokens", minimum=1)
    scale: int = option(64, "Divides the tokens of a prompt, and of a hash.", flag="--scale", minimum=1)
    cache_blocks: str = option(
        "5000,10000,20000", "Blocks of the pool, of a hash each; several: an engine each.", flag="--cache-blocks"
    )
    max_tokens: int = option(2, "To generate for each request.", flag="--output-len", minimum=1)
    seed: int = option(0, "Of weights and of what a hash stands for.", flag="--seed")

    def __post_init__(self) -> None:
        check_bounds(self)
        _ = self.each_capacity
        if self.hash_tokens % self.scale:
            raise UserError(f"--scale {self.scale} does not divide the {self.hash_tokens} tokens of a hash")

    @property
    def each_capacity(self) -> list[int]:
        """The sizes of the pool in blocks."""
        try:
            found = [int(part) for part in self.cache_blocks.split(",")]
        except ValueError:
            found = []
        if not found or min(found) < 1:
            raise UserError(f"--cache-blocks {self.cache_blocks!r}: give positive numbers, such as 5000,20000")
        return found

    @property
    def block_tokens(self) -> int:
        """Tokens of a block: what a hash stands for, scaled."""
        return self.hash_tokens // self.scale


@dataclasses.dataclass(frozen=True)
class HashedRequest:
    """A request of a trace: the length of its prompt, and the hashes of its blocks, from the first on."""

    arrival_s: float
    num_tokens: int
    hash_ids: tuple[int, ...]


def read_hashed_trace(path: Path, hash_tokens: int, most: int | None = None) -> list[HashedRequest]:
    """The first `most` requests of a trace in Mooncake's format: JSON lines with `timestamp` (milliseconds),
    `input_length` and `hash_ids`, one for each block of `hash_tokens` tokens, the last of which need not be whole.

    Raises:
        UserError: a line that is not so, by its number.
    """
    requests: list[HashedRequest] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        requests.append(_parse(json.loads(line), hash_tokens))
                    except (ValueError, KeyError, TypeError) as error:
                        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
                        raise UserError(f"{path}:{number}: no request with hashes: {what}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}") from error
    if not requests:
        raise UserError(f"{path}: no requests")
    return sorted(requests, key=lambda one: one.arrival_s)[:most]


def _parse(line: object, hash_tokens: int) -> HashedRequest:
    if not isinstance(line, dict):
        raise ValueError("it is no object")
    arrival, length, hashes = line["timestamp"], line["input_length"], line["hash_ids"]
    if isinstance(arrival, bool) or not isinstance(arrival, int | float) or not 0 <= arrival < float("inf"):
        raise ValueError(f"timestamp {arrival!r} is no time")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"input_length {length!r} is no number of tokens")
    if not isinstance(hashes, list) or not all(isinstance(one, int) and one >= 0 for one in hashes):
        raise ValueError("hash_ids are no list of numbers")
    if len(hashes) > blocks_for(length, hash_tokens):
        raise ValueError(
            f"{len(hashes)} hash_ids are more than {length} tokens have blocks of {hash_tokens}: see --hash-tokens"
        )
    return HashedRequest(arrival / 1e3, length, tuple(hashes))


def scaled_lookups(requests: Sequence[HashedRequest], settings: TraceCacheSettings) -> list[Lookup]:
    """What the scaled requests ask a cache for."""
    return make_lookups(((one.hash_ids, scaled(one, settings)) for one in requests), settings.block_tokens)


def scaled(request: HashedRequest, settings: TraceCacheSettings) -> int:
    """Tokens of its prompt: rounded up, so that it has as many blocks as the hashes say."""
    return -(-request.num_tokens // settings.scale)


def make_prompt(request: HashedRequest, index: int, settings: TraceCacheSettings, vocab_size: int) -> list[int]:
    """A prompt: each hash stands for tokens of its own, drawn once for all; what has no hash is drawn for it alone."""
    length = scaled(request, settings)
    known = [_draw((0, hash_id), settings.block_tokens, settings.seed, vocab_size) for hash_id in request.hash_ids]
    unknown = _draw((1, index), max(length - len(known) * settings.block_tokens, 0), settings.seed, vocab_size)
    return np.concatenate([*known, unknown])[:length].tolist()


def _draw(what: tuple[int, int], count: int, seed: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng((seed, *what)).integers(0, vocab_size, count)


def run(file: Path, settings: TraceCacheSettings, model: Model | None = None, *, tell: Tell = silent) -> JsonObject:
    """Send a trace to an engine for each size of the pool, and say beside what it hits what could be expected.

    Args:
        file: see `read_hashed_trace`.
        model: None: a random one, tiny.
    """
    requests = read_hashed_trace(file, settings.hash_tokens, settings.num_requests)
    lookups = scaled_lookups(requests, settings)
    num_tokens = sum(scaled(one, settings) for one in requests)
    model = model or random_model(CONFIG, settings.seed, np.float32)
    prompts = [make_prompt(one, index, settings, model.config.vocab_size) for index, one in enumerate(requests)]

    def rates(capacity: int, held: int) -> dict[str, float]:
        found = {"predicted": lru_hits(lookups, capacity), "clairvoyant": clairvoyant_hits(lookups, held)}
        return {name: sum(hits) * settings.block_tokens / num_tokens for name, hits in found.items()}

    results = []
    for wanted in settings.each_capacity:
        row = _deliver(model, prompts, wanted, settings, tell)
        pool, own = row["pool_blocks"], row["own_blocks"]
        results.append(row | rates(max(pool, own), pool + own))
    distinct = count_distinct(lookups)
    sizes = sorted({*settings.each_capacity, distinct, *np.geomspace(1, distinct, 24).astype(int).tolist()})
    return {
        "benchmark": "cache trace",
        "machine": machine(),
        "settings": dataclasses.asdict(settings) | {"file": str(file), "block_tokens": settings.block_tokens},
        "trace": {"num_requests": len(requests), "num_tokens": num_tokens, "num_blocks": distinct},
        "results": results,
        "unlimited": rates(distinct, distinct)["predicted"],
        "largest_difference": max(abs(row["delivered"] - row["predicted"]) for row in results),
        "bounds": {"largest_difference": MOST_OFF},
        "curve": [{"blocks": size} | rates(size, size) for size in sizes],
        "definitions": DEFINITIONS,
    }


def _deliver(
    model: Model, prompts: Sequence[Sequence[int]], wanted: int, settings: TraceCacheSettings, tell: Tell
) -> JsonObject:
    """Send the prompts, one after another, to an engine whose pool has room for about so many blocks; how many it is is
    told by what it holds in the end, with what it keeps beside the latents."""
    block, config = settings.block_tokens, model.config
    longest = max(map(len, prompts)) + settings.max_tokens
    sizes = EngineSettings(
        max_model_len=longest,
        max_num_seqs_per_rank=1,
        block_size=block,
        max_num_batched_tokens=1024,
        num_prefill_kv_blocks=blocks_for(longest, block),
    )
    block_bytes = block * token_bytes(config, model.dtype)
    cache = CacheSettings(
        cache_block_size=block, dram_bytes=wanted * block_bytes, decode_blocks="never", fetch="always"
    )
    tell("compiling", 0, None)
    cached = 0
    with started(model, sizes, cache) as engine:
        begin = time.perf_counter()
        for done, prompt in enumerate(prompts):
            tell(f"a pool of {wanted:,} blocks", done, len(prompts))
            (handle,) = send(engine, [prompt], settings.max_tokens)
            cached += handle.num_cached_tokens
        seconds = time.perf_counter() - begin
        assert engine.pool is not None
        counts, nodes = engine.stats().cache, engine.pool.stats().nodes
    total, held = sum(map(len, prompts)), sum(node.num_keys for node in nodes)
    return {
        "pool_blocks": held
        * sum(node.dram_capacity for node in nodes)
        // max(sum(node.dram_bytes for node in nodes), 1),
        "own_blocks": sizes.num_prefill_blocks,
        "num_evicted": sum(node.counters.evictions.get("dram", 0) for node in nodes),
        "delivered": cached / total,
        "from_own": counts.num_hits / total,
        "from_pool": counts.num_pool_hits / total,
        "seconds": seconds,
        "cache": dataclasses.asdict(counts),
    }


def tables(report: JsonObject) -> list[Table]:
    """What was predicted, delivered and possible, for each size of the pool."""
    settings, trace = report["settings"], report["trace"]
    title = (
        f"{trace['num_requests']:,} requests of {Path(settings['file']).name}, lengths over {settings['scale']}: "
        f"{trace['num_tokens']:,} tokens, {trace['num_blocks']:,} blocks of {settings['block_tokens']}"
    )
    columns = (
        "pool, blocks",
        "evicted",
        "predicted",
        "delivered",
        "in points",
        "in place",
        "clairvoyant",
        "requests/s",
    )
    table = new_table(title, *columns, numbers_from=0)
    for row in report["results"]:
        cells = [f"{row[name]:,}" for name in ("pool_blocks", "num_evicted")]
        cells += [f"{row[name]:.2%}" for name in ("predicted", "delivered")]
        cells += [f"{(row['delivered'] - row['predicted']) * 100:+.2f}"]
        cells += [f"{row[name]:.2%}" for name in ("from_own", "clairvoyant")]
        table.add_row(*cells, f"{trace['num_requests'] / row['seconds']:,.1f}")
    notes = {
        "in points": "delivered less predicted; at most "
        f"{report['bounds']['largest_difference'] * 100:g} either way are asked for",
        "in place": "of all prompt tokens, delivered from the instance's own blocks",
        "a pool that never forgets": f"{report['unlimited']:.2%}",
    }
    return [define(table, report["definitions"] | notes)]


def plot(report: JsonObject, path: str) -> None:
    """Hit rates over the size of the cache."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curve = report["curve"]
    sizes = [one["blocks"] for one in curve]
    for name in ("clairvoyant", "predicted"):
        axes.plot(sizes, [one[name] * 100 for one in curve], label=name)
    results = report["results"]
    delivered = [row["delivered"] * 100 for row in results]
    axes.plot([row["pool_blocks"] for row in results], delivered, "o", label="delivered")
    axes.set(
        xscale="log", xlabel="blocks of the pool", ylabel="hit rate, %", title=Path(report["settings"]["file"]).name
    )
    axes.legend()
    figure.savefig(path, dpi=120)

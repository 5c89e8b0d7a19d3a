"""What a prefix cache of so many blocks hits, without an engine: by the least recently used rule, and at most."""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Hashable, Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What a prompt asks a prefix cache for.

    Attributes:
        keys: one for each of its whole blocks, which stands for the block and all before it: it is in no prompt that
            lacks one of these.
        num_usable: so many of them, from the first on, may be hits: at least one token of a prompt is computed.
    """

    keys: tuple[int, ...]
    num_usable: int


def make_lookups(prompts: Iterable[tuple[Sequence[Hashable], int]], block_tokens: int) -> list[Lookup]:
    """Lookups of prompts, each given by the contents of its blocks, a block of `block_tokens` tokens each, and its
    number of tokens; contents that it has beyond its whole blocks do not count."""
    keys: dict[tuple[int, Hashable], int] = {}  # (key before, content) -> key
    found = []
    for contents, num_tokens in prompts:
        chain, before = [], -1
        for content in contents[: num_tokens // block_tokens]:
            before = keys.setdefault((before, content), len(keys))
            chain.append(before)
        found.append(Lookup(tuple(chain), min(len(chain), max(num_tokens - 1, 0) // block_tokens)))
    return found


def count_distinct(lookups: Iterable[Lookup]) -> int:
    """Blocks of a cache that never has to forget one."""
    return len({key for one in lookups for key in one.keys})


def lru_hits(lookups: Iterable[Lookup], capacity: int) -> list[int]:
    """Blocks that each lookup finds in a cache that forgets what was used longest ago.

    A lookup uses all its blocks, those that it finds and those that it stores, and of them the later ones count as
    used before the earlier ones: the end of a prefix is forgotten before its beginning, without which it is of no use.
    """
    cache: collections.OrderedDict[int, None] = collections.OrderedDict()
    hits = []
    for one in lookups:
        hits.append(sum(1 for _ in itertools.takewhile(cache.__contains__, one.keys[: one.num_usable])))
        for key in reversed(one.keys):
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


def clairvoyant_hits(lookups: Sequence[Lookup], capacity: int) -> list[int]:
    """Blocks that each lookup finds in a cache that knows all lookups to come (Belady's MIN); no cache that holds at
    most `capacity` blocks between lookups, and gets a block only from a prompt that has it, finds more in all.

    A hit needs its block in the cache from the use before it up to itself, as nothing else brings it there. So hits are
    such spans, and those kept at a time are at most `capacity`. The most spans are kept by dropping, whenever there is
    one too many, that which ends last (the schedule of unit jobs on `capacity` machines): no other can be in the way of
    fewer that come. That is a bound on any cache, where it counts a block as found whether or not those before it are.
    They are: whoever uses a block uses those before it, so their spans end no later, and of spans with one end the
    later block's is dropped first. So it is not only a bound, it is what the best cache reaches.
    """
    ends = _ends(lookups)
    held: dict[int, tuple[int, int]] = {}  # key -> (lookup that it is held for, place in its prompt)
    latest: list[tuple[int, int, int]] = []  # (-end, -place, key), also of spans that are over or dropped
    hits = []
    for index, one in enumerate(lookups):
        found = [held.pop(key, None) is not None for key in one.keys]
        hits.append(sum(1 for _ in itertools.takewhile(bool, found)))
        for place, (key, end) in enumerate(zip(one.keys, ends[index], strict=True)):
            if end is not None:
                held[key] = end, place
                heapq.heappush(latest, (-end, -place, key))
        while len(held) > capacity:
            end, place, key = heapq.heappop(latest)
            if held.get(key) == (-end, -place):
                del held[key]
    return hits


def _ends(lookups: Sequence[Lookup]) -> list[list[int | None]]:
    """For each block of each lookup the lookup that uses it next; None where there is none, or it computes the block
    all the same, so that there is no point in holding it for that."""
    following: dict[int, int | None] = {}
    ends: list[list[int | None]] = []
    for index in reversed(range(len(lookups))):
        one = lookups[index]
        ends.append([following.get(key) for key in one.keys])
        for place, key in enumerate(one.keys):
            following[key] = index if place < one.num_usable else None
    return ends[::-1]

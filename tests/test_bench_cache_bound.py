"""Predictions of what a prefix cache hits, against the plainest forms of the same rules."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.bench.cache_bound import Lookup, clairvoyant_hits, count_distinct, lru_hits, make_lookups

BLOCK = 4
# Two contents a place, so that prompts share prefixes, and blocks by chance where their prefixes differ.
CONTENTS = st.lists(st.integers(0, 1), max_size=4)


@st.composite
def loads(draw, most=7):
    """Prompts as (contents, tokens): whole blocks, and perhaps some tokens more."""
    prompts = draw(st.lists(st.tuples(CONTENTS, st.integers(0, BLOCK - 1)), max_size=most))
    return [(contents, len(contents) * BLOCK + more) for contents, more in prompts]


def plain_lookups(prompts):
    """A block's key is all contents up to it."""
    return [
        ([tuple(contents[: end + 1]) for end in range(tokens // BLOCK)], (tokens - 1) // BLOCK)
        for contents, tokens in prompts
    ]


def prefix_in(cache, keys, usable):
    place = 0
    while place < min(usable, len(keys)) and keys[place] in cache:
        place += 1
    return place


def plain_lru(prompts, capacity):
    """In the cache are the blocks with the last uses, told anew for each prompt from all prompts before it."""
    hits = []
    lookups = plain_lookups(prompts)
    for now, (keys, usable) in enumerate(lookups):
        last = {}
        for index, (before, _) in enumerate(lookups[:now]):
            last |= {key: (index, -place) for place, key in enumerate(before)}
        hits.append(prefix_in(set(sorted(last, key=last.get)[max(len(last) - capacity, 0) :]), keys, usable))
    return hits


def plain_best(prompts, capacity):
    """The most blocks found in all, by trying every content of the cache after every prompt."""
    lookups = plain_lookups(prompts)

    @functools.cache
    def best(now, cache):
        if now == len(lookups):
            return 0
        keys, usable = lookups[now]
        there = cache | set(keys)
        return prefix_in(cache, keys, usable) + max(best(now + 1, kept) for kept in subsets(there, capacity))

    return best(0, frozenset())


@functools.cache
def subsets(items, most):
    """All of at most so many; those of fewer only where there are no more, as more never harm."""
    if len(items) <= most:
        return [items]
    return list({kept for item in items for kept in subsets(items - {item}, most)})


@given(loads(), st.integers(0, 8))
def test_the_least_recently_used_rule(prompts, capacity):
    assert lru_hits(make_lookups(prompts, BLOCK), capacity) == plain_lru(prompts, capacity)


@settings(max_examples=150)
@given(loads(), st.integers(0, 5))
def test_no_cache_of_the_size_hits_more_and_one_hits_as_much(prompts, capacity):
    assert sum(clairvoyant_hits(make_lookups(prompts, BLOCK), capacity)) == plain_best(prompts, capacity)


@given(loads(most=30), st.integers(0, 12))
def test_sizes_and_rules_compare(prompts, capacity):
    lookups = make_lookups(prompts, BLOCK)
    lru, best = sum(lru_hits(lookups, capacity)), sum(clairvoyant_hits(lookups, capacity))
    assert lru <= best <= sum(clairvoyant_hits(lookups, capacity + 1))
    assert lru <= sum(lru_hits(lookups, capacity + 1))
    enough = count_distinct(lookups)
    everything = plain_lru(prompts, 10**6)
    assert lru_hits(lookups, enough) == clairvoyant_hits(lookups, enough) == everything


def test_keys_stand_for_all_before_and_for_whole_blocks():
    lookups = make_lookups([("ab", 8), ("ab", 9), ("bb", 8), ("abc", 11), ("a", 3), ("", 0)], BLOCK)
    assert lookups == [
        Lookup((0, 1), 1),  # the last token is computed, and so the second block
        Lookup((0, 1), 2),
        Lookup((2, 3), 1),  # the same content after another one
        Lookup((0, 1), 2),  # the third block is not whole
        Lookup((), 0),
        Lookup((), 0),
    ]
    assert count_distinct(lookups) == 4


@pytest.mark.parametrize(("capacity", "lru", "best"), [(1, 0, 1), (2, 0, 2), (3, 2, 3), (4, 3, 3)])
def test_the_end_of_a_prefix_goes_before_its_beginning(capacity, lru, best):
    """Two prompts of two blocks in turn, then one that shares a block: of three blocks, "a" and "c" are still there."""
    lookups = make_lookups([("ab", 9), ("cd", 9), ("ab", 9), ("ce", 9)], BLOCK)
    assert sum(lru_hits(lookups, capacity)) == lru
    assert sum(clairvoyant_hits(lookups, capacity)) == best

"""The pool as its users see it: namespaces, quotas, threads, and what it says of itself."""

import collections
import dataclasses
import random
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.serve.caching import LocalNode, MemoryPool
from tests.caching.contents import local_node, parts_of, turn_of
from tests.conftest import ROOT

KEYS = [b"k%d" % index for index in range(8)]


def open_pool(count=3, dram=10_000, **options):
    return MemoryPool([LocalNode(f"node{index}", index, dram) for index in range(count)], **options)


def put(pool, namespace, keys, turn=0, size=100):
    return pool.put(namespace, [(key, parts_of(key, turn, size)) for key in keys])


def turns(pool, namespace, keys, size=100):
    return [value and turn_of(key, value, size) for key, value in zip(keys, pool.get(namespace, keys), strict=True)]


def test_batches_are_answered_in_their_order():
    pool = open_pool()
    assert put(pool, "a", KEYS[:6], 4) == [True] * 6
    asked = [KEYS[7], *KEYS[3:6], KEYS[3], KEYS[6], *KEYS[:3]]
    assert turns(pool, "a", asked) == [None, 4, 4, 4, 4, None, 4, 4, 4]
    places = pool.contains("a", asked)
    assert [place is not None for place in places] == [turn is not None for turn in turns(pool, "a", asked)]
    assert len({place.node for place in places if place}) > 1
    assert all(place.node == f"node{place.cpu}" for place in places if place)
    assert [value.place for value in pool.get("a", KEYS[:6])] == pool.contains("a", KEYS[:6])
    assert pool.delete("a", asked) == [False, True, True, True, False, False, True, True, True]
    assert pool.put("a", []) == pool.get("a", []) == []


def test_the_later_of_two_values_of_a_batch_holds():
    pool = open_pool()
    assert pool.put("a", [(b"k", parts_of(b"k", 1)), (b"k", parts_of(b"k", 2))]) == [True, True]
    assert turns(pool, "a", [b"k"]) == [2]


def test_asynchronous_calls_give_the_same():
    pool = open_pool()
    assert pool.put_async("a", [(key, parts_of(key)) for key in KEYS]).result() == [True] * 8
    values = pool.get_async("a", KEYS).result()
    assert [turn_of(key, value) for key, value in zip(KEYS, values, strict=True)] == [0] * 8
    assert pool.contains_async("a", KEYS).result() == pool.contains("a", KEYS)
    assert pool.delete_async("a", KEYS).result() == [True] * 8
    done = pool.put_async("a", [(KEYS[0], parts_of(KEYS[0]))])
    pool.close()
    assert done.result() == [True]  # what was under way is finished
    assert pool.get("a", KEYS) == [None] * 8


def test_namespaces_do_not_see_each_other():
    pool = open_pool()
    put(pool, "a", KEYS, 1)
    put(pool, "b", KEYS[:4], 2)
    assert turns(pool, "b", KEYS) == [2] * 4 + [None] * 4
    assert pool.delete("b", KEYS[:1]) == [True]
    pool.clear("b")
    assert turns(pool, "a", KEYS) == [1] * 8
    assert turns(pool, "b", KEYS) == [None] * 8
    assert [(one.namespace, one.num_keys) for one in pool.stats().namespaces] == [("a", 8), ("b", 0)]
    pool.clear()
    assert turns(pool, "a", KEYS) == [None] * 8


QUOTAS = {"a": 350, "b": 1000, "c": None}


class QuotaModel:
    """Namespaces as ordered dictionaries, over as many nodes as there may be."""

    def __init__(self):
        self.spaces = collections.defaultdict(collections.OrderedDict)

    def put(self, namespace, key, turn, size):
        space, quota = self.spaces[namespace], QUOTAS[namespace]
        space.pop(key, None)
        if quota is not None and size > quota:
            return False
        while quota is not None and sum(one for _, one in space.values()) + size > quota:
            space.popitem(last=False)
        space[key] = (turn, size)
        return True

    def get(self, namespace, key):
        space = self.spaces[namespace]
        if key in space:
            space.move_to_end(key)
        return space.get(key)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(KEYS), st.sampled_from([None, 50, 100, 340, 400])),
        max_size=60,
    )
)
def test_quotas_take_from_their_own_namespace_alone(steps):
    """A put, or a get where no size is given; over three nodes, and in the order of use over all of them."""
    pool, model = open_pool(namespace_bytes=1000), QuotaModel()
    for namespace, quota in QUOTAS.items():
        if quota != 1000:
            pool.set_quota(namespace, quota)
    refused = collections.Counter()
    for turn, (namespace, key, size) in enumerate(steps):
        if size is None:
            [value] = pool.get(namespace, [key])
            found = value and (turn_of(key, value, value.place.num_bytes), value.place.num_bytes)
            assert found == model.get(namespace, key)
        else:
            done = model.put(namespace, key, turn, size)
            assert put(pool, namespace, [key], turn, size) == [done]
            refused[namespace] += not done
        for one in pool.stats().namespaces:
            sizes = [size for _, size in model.spaces[one.namespace].values()]
            assert (one.num_bytes, one.num_keys) == (sum(sizes), len(sizes))
            assert one.quota == QUOTAS[one.namespace]
            assert one.num_refused == refused[one.namespace]
    pool.close()


def test_a_quota_that_is_lowered_takes_effect_at_once():
    pool = open_pool()
    for key in KEYS:
        put(pool, "a", [key])
    pool.set_quota("a", 250)
    assert turns(pool, "a", KEYS) == [None] * 6 + [0] * 2
    pool.set_quota("a", None)
    assert put(pool, "a", KEYS) == [True] * 8
    assert turns(pool, "a", KEYS) == [0] * 8


def test_a_value_that_no_memory_holds_is_refused():
    pool = open_pool(count=1, dram=500)
    put(pool, "a", KEYS[:5])
    assert put(pool, "a", [b"large"], size=600) == [False]
    assert put(pool, "a", KEYS[:1], size=600) == [False]
    assert turns(pool, "a", KEYS[:5]) == [None] + [0] * 4  # what was refused has not the old value either
    [node] = pool.stats().nodes
    assert (node.counters.num_refused, node.counters.num_puts, node.dram_bytes) == (2, 5, 400)


@pytest.mark.parametrize("has_disk", [False, True])
def test_threads_on_the_same_keys_get_whole_values_of_the_right_key(tmp_path, has_disk):
    """Puts, gets, deletes and clears at once: nothing is mixed up, and in the end the books are right."""
    folder = tmp_path if has_disk else None
    pool = MemoryPool([local_node(folder, f"node{i}", dram=6000, disk=3, queue_bytes=4000) for i in range(2)])
    pool.set_quota("b", 5000)
    errors = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for turn in range(150):
                namespace, key = rng.choice("ab"), rng.choice(KEYS)
                action = rng.random()
                if action < 0.45:
                    put(pool, namespace, [key], turn, 2000)
                elif action < 0.9:
                    turns(pool, namespace, rng.sample(KEYS, 3), 2000)
                elif action < 0.99:
                    pool.delete(namespace, [key])
                else:
                    pool.clear(namespace)
                for node in pool.stats().nodes:
                    assert node.dram_bytes <= 6000
                    assert node.disk_bytes <= 3 * 4096
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    pool.flush()
    stats = pool.stats()
    for one in stats.namespaces:
        kept = [place for place in pool.contains(one.namespace, KEYS) if place]
        assert (one.num_keys, one.num_bytes) == (len(kept), sum(place.num_bytes for place in kept))
    assert sum(node.num_keys for node in stats.nodes) == sum(one.num_keys for one in stats.namespaces)
    assert all(node.counters.num_corrupt == node.counters.num_errors == 0 for node in stats.nodes)
    pool.clear()
    assert [(node.num_keys, node.dram_bytes, node.disk_bytes) for node in pool.stats().nodes] == [(0, 0, 0)] * 2
    assert not [path for path in tmp_path.rglob("*-*-*") if path.is_file()]
    pool.close()


def test_it_says_what_it_has_done(tmp_path):
    pool = MemoryPool([local_node(tmp_path, dram=250, disk=3)], folder=tmp_path)
    assert pool.rates() == {}
    put(pool, "a", KEYS[:4])
    pool.flush()
    pool.get("a", [KEYS[3], KEYS[1], KEYS[0]])
    [node] = pool.stats().nodes
    counters = dataclasses.asdict(node.counters)
    assert counters == {
        "num_puts": 4,
        "num_refused": 0,
        "hits": {"dram": 1, "disk": 1},
        "num_misses": 1,
        "bytes_read": 200,
        "bytes_written": 400,
        "evictions": {"dram": 3, "disk": 1},
        "num_lost": 0,
        "num_unwritten": 0,
        "num_corrupt": 0,
        "num_errors": 0,
    }
    assert (node.kind, node.is_up, node.dram_capacity, node.disk_capacity) == ("local", True, 250, 3 * 4096)
    rates = pool.rates()
    assert set(rates) == {"dram", "disk"}
    assert all(
        rate.latency_s > 0 and rate.bytes_per_s * rate.latency_s == pytest.approx(100) for rate in rates.values()
    )
    pool.close()


def test_the_pool_brings_in_no_jax_of_its_own():
    """Its modules name none of it (the package they are in does)."""
    code = (
        "import sys, types, pathlib, importlib.util\n"
        "package = types.ModuleType('cmjax.serve'); package.__path__ = [str(pathlib.Path('cmjax/serve'))]\n"
        "import cmjax\n"
        "sys.modules['cmjax.serve'] = package\n"
        "import cmjax.serve.caching\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "assert not names & {'jax', 'jaxlib', 'flax', 'ml_dtypes'}, names\n"
        "assert 'valkey' not in names\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr

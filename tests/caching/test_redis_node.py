"""Nodes on real servers: what they keep, and what their deaths cost."""

import contextlib
import itertools
import sys
import threading

import pytest

from cmjax.errors import UserError
from cmjax.serve.caching import MemoryPool, RedisNode
from cmjax.serve.caching.values import digest_of
from tests.caching.contents import parts_of, turn_of

KEYS = [b"k%d" % index for index in range(8)]


def open_pool(*servers, folder=None, **options):
    nodes = [RedisNode(server.url, cpu, timeout_s=0.3, **options) for cpu, server in enumerate(servers)]
    return MemoryPool(nodes, folder=folder)


def put(pool, keys, turn=0, size=100, namespace="a"):
    return pool.put(namespace, [(key, parts_of(key, turn, size)) for key in keys])


def turns(pool, keys, size=100, namespace="a"):
    return [value and turn_of(key, value, size) for key, value in zip(keys, pool.get(namespace, keys), strict=True)]


def until_up(pool):
    while not all(node.is_up for node in pool.stats().nodes):
        threading.Event().wait(0.02)


def test_what_is_put_is_there_for_others_too(start_server):
    server = start_server()
    pool, other = (open_pool(server, is_shared=True) for _ in range(2))
    assert put(pool, KEYS, 3) == [True] * 8
    assert turns(other, KEYS) == [3] * 8
    [place] = other.contains("a", KEYS[:1])
    assert (place.node, place.tier, place.num_bytes) == (f"{server.folder}/s/0", "redis", 100)
    assert other.get("a", KEYS[:1])[0].place == place
    assert other.delete("a", [KEYS[0], b"none"]) == [True, False]
    assert turns(pool, KEYS) == [None] + [3] * 7
    assert put(other, KEYS[1:3], 4) == [True] * 2
    assert turns(pool, KEYS) == [None, 4, 4] + [3] * 5
    assert pool.contains("a", [KEYS[0], b"none"]) == [None, None]
    [node] = pool.stats().nodes
    assert node.counters.hits == {"redis": 14}
    assert node.counters.num_misses == 2
    assert pool.rates()["redis"].bytes_per_s > 0
    pool.close()
    other.close()


def test_namespaces_and_pools_are_apart(start_server):
    """And nothing is touched that is not the pool's."""
    server = start_server()
    theirs = {b"other": b"1", b"cmjax": b"2", b"cmjax:": b"3", b"cmjax:mine": b"4", b"cmjax:mine2:v:x": b"5"}
    server.client.mset(theirs)
    mine, yours = open_pool(server, pool_name="mine"), open_pool(server, pool_name="yours")
    put(mine, KEYS, 1)
    put(mine, KEYS, 2, namespace="b")
    put(yours, KEYS, 3)
    assert [turns(mine, KEYS), turns(mine, KEYS, namespace="b"), turns(yours, KEYS)] == [[1] * 8, [2] * 8, [3] * 8]
    mine.clear("a")
    assert [turns(mine, KEYS), turns(mine, KEYS, namespace="b"), turns(yours, KEYS)] == [[None] * 8, [2] * 8, [3] * 8]
    mine.clear()
    assert [turns(mine, KEYS, namespace="b"), turns(yours, KEYS)] == [[None] * 8, [3] * 8]
    assert dict(zip(theirs, server.client.mget(theirs), strict=True)) == theirs
    mine.close()
    yours.close()


def test_many_values_travel_in_several_messages(start_server):
    server = start_server()
    pool = open_pool(server, chunk_bytes=100_000)
    keys = [b"large%d" % index for index in range(20)]
    assert put(pool, keys, 5, 40_000) == [True] * 20
    before = server.client.info("stats")["total_commands_processed"]
    assert turns(pool, keys, 40_000) == [5] * 20
    assert server.client.info("stats")["total_commands_processed"] - before >= 10
    many = [b"small%d" % index for index in range(2500)]
    assert put(pool, many, 6) == [True] * 2500
    assert turns(pool, many) == [6] * 2500
    pool.close()


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[:5], lambda data: b"\0" * len(data)])
def test_what_was_spoilt_on_the_server_is_a_miss(start_server, spoil):
    server = start_server()
    pool = open_pool(server)
    put(pool, KEYS)
    [name] = server.client.keys(f"*{digest_of('a', KEYS[2]):032x}")
    server.client.set(name, spoil(server.client.get(name)))
    assert turns(pool, KEYS) == [0, 0, None, 0, 0, 0, 0, 0]
    assert not server.client.exists(name)
    [node] = pool.stats().nodes
    assert (node.counters.num_corrupt, node.counters.num_misses, node.is_up) == (1, 1, True)
    pool.close()


def test_one_key_of_two_writers_has_one_of_their_values(start_server):
    server = start_server()
    pools = [open_pool(server, is_shared=True) for _ in range(3)]
    seen = []

    def write(pool, first):
        for turn in range(first, first + 60):
            assert put(pool, KEYS[:2], turn, 3000) == [True, True]
            seen.extend(turns(pool, KEYS[:2], 3000))

    threads = [threading.Thread(target=write, args=(pool, 100 * index)) for index, pool in enumerate(pools)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 360
    assert None not in seen
    for pool in pools:
        pool.close()


def load(pool, stop, errors):
    """Puts and gets until told to stop; what comes back must be what was put."""
    try:
        for turn in itertools.count():
            if stop.is_set():
                return
            key = b"%d.%d" % (threading.get_ident(), turn % 20)
            put(pool, [key], turn, 5000)
            [value] = pool.get("a", [key])
            if value is not None:
                turn_of(key, value, 5000)
    except BaseException as error:
        errors.append(error)
        raise


def test_a_server_killed_under_load_is_misses_until_it_is_back(start_server):
    """Of two servers the other one goes on."""
    servers = [start_server(), start_server()]
    pool = open_pool(*servers)
    stop, errors = threading.Event(), []
    threads = [threading.Thread(target=load, args=(pool, stop, errors)) for _ in range(4)]
    for thread in threads:
        thread.start()
    stop.wait(0.3)
    servers[0].kill()
    stop.wait(0.3)
    assert [node.is_up for node in pool.stats().nodes] == [False, True]
    dead = pool.stats().nodes[0].counters
    assert dead.num_errors > 0
    servers[0].start()
    until_up(pool)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(put(pool, KEYS, 9))
    assert turns(pool, KEYS) == [9] * 8
    pool.close()


def test_a_server_that_hangs_costs_few_calls_their_time(start_server):
    server = start_server()
    pool = open_pool(server)
    put(pool, KEYS)
    server.hold()
    for _ in range(200):
        assert turns(pool, KEYS[:1]) == [None]
    assert put(pool, KEYS[:1], 1) == [False]
    [node] = pool.stats().nodes
    # Each try takes its timeout, and the pause after it doubles: two hundred calls were two tries or so.
    assert not node.is_up
    assert node.counters.num_misses == 200
    server.go_on()
    until_up(pool)
    assert turns(pool, KEYS)[1:] == [0] * 7
    pool.close()


def test_what_was_deleted_while_the_server_was_away_stays_deleted(start_server):
    server = start_server()
    pool = open_pool(server)
    put(pool, KEYS, 1)
    put(pool, KEYS, 2, namespace="b")
    put(pool, KEYS, 3, namespace="c")
    server.hold()
    assert pool.delete("a", KEYS[:1]) == [False]
    pool.clear("b")
    server.go_on()
    until_up(pool)
    assert turns(pool, KEYS[:1]) == [None]
    assert turns(pool, KEYS, namespace="b") == [None] * 8
    assert turns(pool, KEYS, namespace="c") == [3] * 8
    pool.close()


def test_a_server_that_comes_back_with_anothers_data_is_wiped(start_server):
    server = start_server()
    pool = open_pool(server)
    put(pool, KEYS, 1)
    server.hold()
    assert turns(pool, KEYS) == [None] * 8
    server.go_on()
    server.client.set("cmjax:cmjax:epoch", "another's")
    until_up(pool)
    assert turns(pool, KEYS) == [None] * 8
    put(pool, KEYS, 2)
    assert turns(pool, KEYS) == [2] * 8
    pool.close()


@pytest.mark.parametrize("is_shared", [False, True])
def test_an_older_snapshot_is_not_served(start_server, is_shared):
    """A server that was started anew has what it last saved: what was deleted or replaced since must not come back.
    No call need have failed meanwhile."""
    server = start_server()
    pool = open_pool(server, is_shared=is_shared)
    other = open_pool(server, is_shared=True)
    put(pool, KEYS, 1)
    server.client.save()
    pool.delete("a", KEYS[:4])
    put(pool, KEYS[4:], 2)
    server.kill()
    server.start()
    assert server.client.dbsize() > 8  # it does have them
    until_up(pool)
    assert turns(pool, KEYS) == [None] * 8
    until_up(other)
    assert put(other, KEYS, 3) == [True] * 8
    until_up(pool)
    assert turns(other, KEYS) == [3] * 8
    assert turns(pool, KEYS) == [3] * 8
    pool.close()
    other.close()


def test_a_full_server_refuses_or_evicts_as_it_is_told(start_server):
    keys = [b"k%d" % index for index in range(400)]
    for policy, refuses in (("noeviction", True), ("allkeys-lru", False)):
        server = start_server("--maxmemory", "6mb", "--maxmemory-policy", policy)
        pool = open_pool(server)
        done = [put(pool, [key], 1, 50_000)[0] for key in keys]
        found = turns(pool, keys, 50_000)
        assert 0 < found.count(1) < 400
        assert set(found) == {1, None}
        [node] = pool.stats().nodes
        assert node.is_up
        assert node.dram_capacity == 6 * 2**20
        assert (node.counters.num_refused > 0) == refuses
        assert node.counters.num_refused == done.count(False)
        if refuses:
            assert [turn is not None for turn in found] == done
        pool.close()


def test_a_quota_deletes_what_was_used_longest_ago(start_server):
    server = start_server()
    pool = open_pool(server)
    pool.set_quota("a", 500)
    for key in KEYS[:5]:
        assert put(pool, [key]) == [True]
    assert turns(pool, KEYS[:1]) == [0]  # used last now
    assert put(pool, [KEYS[5]], size=150) == [True]
    assert [place is not None for place in pool.contains("a", KEYS[:6])] == [True, False, False, True, True, True]
    assert put(pool, [KEYS[3]], 1) == [True]  # in place of itself
    assert [place is not None for place in pool.contains("a", KEYS[:6])] == [True, False, False, True, True, True]
    assert put(pool, [KEYS[4]], size=600) == [False]
    assert put(pool, KEYS, namespace="b") == [True] * 8
    assert turns(pool, KEYS, namespace="b") == [0] * 8
    assert {one.namespace: one.num_refused for one in pool.stats().namespaces} == {"a": 1}
    assert pool.stats().nodes[0].counters.num_refused == 1
    pool.clear("a")
    assert put(pool, KEYS[:5]) == [True] * 5
    assert turns(pool, KEYS[:5]) == [0] * 5
    pool.close()


def test_deleted_values_do_not_count_to_a_quota(start_server):
    server = start_server()
    pool = open_pool(server)
    pool.set_quota("a", 300)
    put(pool, KEYS[:3])
    pool.delete("a", KEYS[1:3])
    put(pool, KEYS[3:5])
    assert turns(pool, KEYS[:5]) == [0, None, None, 0, 0]
    pool.close()


def test_servers_share_a_quota(start_server):
    servers = [start_server(), start_server()]
    pool = open_pool(*servers)
    pool.set_quota("a", 2000)
    keys = [b"k%d" % index for index in range(200)]
    put(pool, keys)
    assert turns(pool, keys).count(0) == 20
    assert put(pool, [b"large"], size=1900) == [True]
    assert turns(pool, [b"large"], 1900) == [0]
    pool.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host:1", "'http://host:1' is no redis://host:port"),
        ("redis://host:port", "'redis://host:port' is no redis://host:port"),
        ("nothing", "'nothing' is no redis://host:port"),
        ("ftp://me:secret@host:1", r"'ftp://\.\.\.@host:1' is no redis"),
    ],
)
def test_what_is_no_address_is_refused(url, message):
    with pytest.raises(UserError, match=message):
        RedisNode(url)


def test_an_unreachable_server_is_one_line(tmp_path):
    for url in (f"unix://{tmp_path}/none", "redis://127.0.0.1:1/0"):
        node = RedisNode(url)
        with pytest.raises(UserError, match="cannot be used") as caught:
            MemoryPool([node])
        assert "\n" not in str(caught.value)
        assert node.name in str(caught.value)


def test_a_name_that_would_match_others_keys_is_refused():
    with pytest.raises(UserError, match="other characters"):
        RedisNode("redis://localhost", pool_name="a*")


def test_the_client_library_is_needed_only_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "valkey", None)
    with pytest.raises(UserError, match=r"pip install 'cmjax\[serve\]'"), contextlib.nullcontext():
        RedisNode("redis://localhost")

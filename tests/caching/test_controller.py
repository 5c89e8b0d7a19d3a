"""Membership, where keys lie, and which data found on a node are taken for the pool's."""

import json
import threading

import pytest

from cmjax.errors import UserError
from cmjax.serve.caching import LocalNode, MemoryPool, RedisNode
from cmjax.serve.caching.controller import View
from tests.caching.contents import files_in, local_node, open_over, parts_of, turn_of

KEYS = [b"k%d" % index for index in range(400)]


def memory_node(index):
    return LocalNode(f"node{index}", index, 10**6)


def put(pool, turn=0, keys=KEYS):
    assert all(pool.put("a", [(key, parts_of(key, turn)) for key in keys]))


def turns(pool, keys=KEYS):
    return [value and turn_of(key, value) for key, value in zip(keys, pool.get("a", keys), strict=True)]


def nodes_of(pool):
    return [place and place.node for place in pool.contains("a", KEYS)]


@pytest.mark.parametrize("count", [1, 4, 47])
def test_a_join_moves_its_share_of_the_keys_and_no_other(count):
    digests = [(index * 0x9E3779B97F4A7C15F39CC0605CEDC835) % 2**128 for index in range(20_000)]
    nodes = {f"node{index}": memory_node(index) for index in range(count + 1)}
    before = View(1, {name: nodes[name] for name in list(nodes)[:count]})
    after = View(2, nodes)
    moved = [(before.node_of(one).name, after.node_of(one).name) for one in digests]
    changed = [pair for pair in moved if pair[0] != pair[1]]
    assert {new for _, new in changed} == {f"node{count}"}
    assert 0.7 < len(changed) / len(digests) * (count + 1) < 1.3
    shares = [sum(new == name for _, new in moved) / len(digests) * (count + 1) for name in nodes]
    assert min(shares) > 0.6
    assert max(shares) < 1.5


def test_keys_that_move_are_misses_and_are_dropped_where_they_were():
    pool = MemoryPool([memory_node(0), memory_node(1)])
    put(pool, 1)
    before = nodes_of(pool)
    pool.join(memory_node(2))
    after = nodes_of(pool)
    moved = [old for old, new in zip(before, after, strict=True) if new is None]
    assert 60 < len(moved) < 210
    assert all(new in (None, old) for old, new in zip(before, after, strict=True))
    assert sum(node.num_keys for node in pool.stats().nodes) == 400 - len(moved)
    [space] = pool.stats().namespaces
    assert (space.num_keys, space.num_bytes) == (400 - len(moved), 100 * (400 - len(moved)))
    put(pool, 2)
    pool.leave("node2")
    # What the first two nodes had of those keys before was out of date: it must not come back.
    assert all(turn in (None, 2) for turn in turns(pool))
    assert "node2" not in nodes_of(pool)
    assert pool.stats().version == 3
    pool.leave("node0")
    pool.leave("node1")
    assert turns(pool) == [None] * 400
    assert pool.put("a", [(b"k", [b"x"])]) == [False]
    assert pool.stats().namespaces[0].num_bytes == 0
    with pytest.raises(UserError, match="no pool node node1; there are none"):
        pool.leave("node1")


def test_nodes_come_and_go_under_load():
    """A key has what was put last, or nothing; each thread has keys of its own, so it knows."""
    pool = MemoryPool([memory_node(0), memory_node(1)])
    stop, errors = threading.Event(), []

    def work(name):
        last = {}
        turn = 0
        while not stop.is_set():
            turn += 1
            key = b"%d.%d" % (name, turn % 30)
            put(pool, turn, [key])
            last[key] = turn
            for one, value in zip(last, pool.get("a", list(last)), strict=True):
                if value is not None and turn_of(one, value) != last[one]:
                    errors.append((one, turn_of(one, value), last[one]))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        pool.join(memory_node(2 + turn))
        stop.wait(0.03)
        pool.leave(f"node{1 + turn}")
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert pool.stats().version == 25
    pool.close()


class SlowNode:
    """A node whose puts wait until they may go on; it sees whether it is closed meanwhile."""

    def __init__(self, node):
        self.node, self.begun, self.may_go_on = node, threading.Event(), threading.Event()
        self.is_busy = self.was_closed_while_busy = False

    def __getattr__(self, name):
        return getattr(self.node, name)

    def put(self, namespace, items):
        self.is_busy = True
        self.begun.set()
        self.may_go_on.wait()
        done = self.node.put(namespace, items)
        self.is_busy = False
        return done

    def close(self):
        self.was_closed_while_busy = self.is_busy
        self.node.close()


def test_a_node_that_leaves_is_closed_once_nobody_uses_it():
    node = SlowNode(memory_node(0))
    pool = MemoryPool([node])
    done = pool.put_async("a", [(b"k", parts_of(b"k"))])
    node.begun.wait()
    leaving = threading.Thread(target=pool.leave, args=("node0",))
    leaving.start()
    while pool.stats().version == 1:
        pass
    assert pool.get("a", [b"k"]) == [None]  # nobody else waits, and it is not asked any more
    leaving.join(0.1)
    assert leaving.is_alive()
    node.may_go_on.set()
    leaving.join()
    assert done.result() == [True]
    assert not node.was_closed_while_busy
    pool.close()


def two_nodes(folder, names=("node0", "node1")):
    return [local_node(folder, name, dram=10**6, disk=1000) for name in names]


def test_a_restarted_controller_registers_what_it_knows(tmp_path):
    pool = MemoryPool(two_nodes(tmp_path), folder=tmp_path)
    put(pool, 1)
    version = pool.stats().version
    pool.close()
    pool = MemoryPool(two_nodes(tmp_path), folder=tmp_path)
    assert turns(pool) == [1] * 400
    assert pool.stats().namespaces[0].num_bytes == 40_000
    assert pool.stats().version == version + 1
    pool.close()


@pytest.mark.parametrize("record", ["gone", "junk", "of another shape", "another epoch", "another folder", "no folder"])
def test_what_it_does_not_know_is_wiped(tmp_path, record):
    pool = MemoryPool(two_nodes(tmp_path), folder=tmp_path)
    put(pool)
    pool.close()
    path, folder = tmp_path / "controller.json", tmp_path
    if record == "gone":
        path.unlink()
    elif record == "junk":
        path.write_bytes(b"\xff{")
    elif record == "of another shape":
        path.write_text('{"version": 1, "epochs": {"node0": 7}, "quotas": {}}')
    elif record == "another epoch":
        known = json.loads(path.read_text())
        path.write_text(json.dumps(known | {"epochs": {"node0": "0" * 32, "node1": "1" * 32}}))
    else:
        folder = tmp_path / "elsewhere" if record == "another folder" else None
    pool = MemoryPool(two_nodes(tmp_path), folder=folder)
    assert turns(pool) == [None] * 400
    assert files_in(tmp_path) == []
    put(pool, 2)
    assert turns(pool) == [2] * 400
    pool.close()


def test_what_it_does_not_know_may_be_adopted(tmp_path):
    pool = MemoryPool(two_nodes(tmp_path), folder=tmp_path)
    put(pool, 1)
    pool.close()
    (tmp_path / "controller.json").unlink()
    pool = MemoryPool(two_nodes(tmp_path), folder=tmp_path, adopt=True)
    assert turns(pool) == [1] * 400
    pool.close()


def test_a_store_without_its_epoch_is_wiped(tmp_path):
    """One that was put in place of what the record is about."""
    pool = open_over(tmp_path, dram=10**6, disk=1000)
    put(pool, 1)
    pool.close()
    (tmp_path / "node0" / "epoch").write_bytes(b"\xff")
    pool = open_over(tmp_path, dram=10**6, disk=1000)
    assert turns(pool) == [None] * 400
    pool.close()


def test_a_node_that_was_away_is_wiped(tmp_path):
    """Its keys were put elsewhere meanwhile: what it has of them is out of date."""
    pool = MemoryPool(two_nodes(tmp_path), folder=tmp_path)
    put(pool, 1)
    pool.leave("node1")
    put(pool, 2)
    pool.join(local_node(tmp_path, "node1", dram=10**6, disk=1000))
    assert all(turn in (None, 2) for turn in turns(pool))
    pool.close()
    # The same from run to run.
    pool = MemoryPool(two_nodes(tmp_path), folder=tmp_path)
    put(pool, 3)
    pool.close()
    pool = MemoryPool(two_nodes(tmp_path, ["node0"]), folder=tmp_path)
    put(pool, 4)
    pool.close()
    pool = MemoryPool(two_nodes(tmp_path), folder=tmp_path)
    assert all(turn in (None, 4) for turn in turns(pool))
    assert turns(pool).count(4) > 100
    pool.close()


def test_quotas_are_kept_in_the_record(tmp_path):
    pool = open_over(tmp_path)
    pool.set_quota("a", 250)
    pool.set_quota("b", None)
    pool.close()
    pool = open_over(tmp_path)
    put(pool, 0, KEYS[:4])
    assert turns(pool, KEYS[:4]) == [None, None, 0, 0]
    pool.close()


def test_names_are_given_once(tmp_path):
    with pytest.raises(UserError, match="pool node node0 is given twice"):
        MemoryPool([memory_node(0), memory_node(0)])
    pool = MemoryPool([memory_node(0)])
    with pytest.raises(UserError, match="pool node node0 is given twice"):
        pool.join(memory_node(0))
    put(pool)


def test_a_node_that_cannot_be_used_does_not_join(tmp_path):
    pool = MemoryPool([memory_node(0)])
    put(pool, 1)
    with pytest.raises(UserError, match="cannot be used"):
        pool.join(RedisNode(f"unix://{tmp_path}/none"))
    assert turns(pool) == [1] * 400
    assert pool.stats().version == 1


def test_a_record_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the cache folder") as caught:
        MemoryPool([memory_node(0)], folder=tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_servers_are_registered_or_wiped_as_folders_are(start_server, tmp_path):
    server = start_server()
    server.client.set("theirs", "1")

    def open_pool(folder, **options):
        return MemoryPool([RedisNode(server.url, **options)], folder=folder)

    pool = open_pool(tmp_path / "one")
    put(pool, 1)
    pool.close()
    pool = open_pool(tmp_path / "one")
    assert turns(pool) == [1] * 400
    pool.close()
    other = open_pool(tmp_path / "two", pool_name="other")
    put(other, 5)
    pool = open_pool(tmp_path / "two")
    assert turns(pool) == [None] * 400
    assert turns(other) == [5] * 400
    put(pool, 2)
    pool.close()
    pool = open_pool(None, is_shared=True)
    assert turns(pool) == [2] * 400
    assert server.client.get("theirs") == b"1"
    pool.close()
    other.close()


def test_servers_that_join_take_keys_from_servers(start_server):
    servers = [start_server(), start_server()]
    pool = MemoryPool([RedisNode(servers[0].url)])
    put(pool, 1)
    pool.join(RedisNode(servers[1].url, 1))
    found = turns(pool)
    assert 100 < found.count(None) < 300
    put(pool, 2)
    pool.leave(f"{servers[1].folder}/s/0")
    assert {turn for turn in turns(pool) if turn is not None} == {2}
    pool.close()

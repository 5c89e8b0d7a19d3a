"""An embedded node: both tiers beside a model of them, what outlives a restart, and what disks do."""

import collections
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cmjax.errors import UserError
from cmjax.serve.caching import FileStore, MemoryPool
from cmjax.serve.caching.store import StoredKey
from cmjax.serve.caching.values import copied, digest_of
from tests.caching.contents import files_in, local_node, open_over, parts_of, turn_of
from tests.conftest import ROOT

KEYS = st.sampled_from([b"k%d" % index for index in range(9)])
SIZES = st.sampled_from([40, 1000, 2000, 4041, 4200, 4400])
DRAM, PAGES = 4300, 5


def pages_of(entry):
    """Pages of the disk that a value takes: its record of two parts is 56 bytes."""
    return -(-(entry[1] + 56) // 4096)


class Model:
    """Two tiers as two ordered dictionaries: key -> (turn, size), those used last at the end."""

    def __init__(self):
        self.dram = collections.OrderedDict()
        self.disk = collections.OrderedDict()

    def known(self, key):
        return self.dram.get(key) or self.disk.get(key)

    def into_dram(self, key, entry):
        while sum(size for _, size in self.dram.values()) + entry[1] > DRAM:
            self.dram.popitem(last=False)
        self.dram[key] = entry

    def put(self, key, turn, size):
        self.delete(key)
        if size > DRAM:
            return False
        self.into_dram(key, (turn, size))
        while sum(map(pages_of, self.disk.values())) + pages_of((turn, size)) > PAGES:
            self.disk.popitem(last=False)
        self.disk[key] = (turn, size)
        return True

    def get(self, key):
        entry = self.known(key)
        if entry is not None:
            if key in self.disk:
                self.disk.move_to_end(key)
            self.dram.pop(key, None)
            self.into_dram(key, entry)
        return entry

    def delete(self, key):
        was_there = self.known(key) is not None
        self.dram.pop(key, None)
        self.disk.pop(key, None)
        return was_there


class NodeMachine(RuleBasedStateMachine):
    """Whatever is done, and however far the writing has come: what is served is what the model has."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model, self.turn = Model(), 0
        self.pool = self.open()

    def open(self):
        return open_over(self.folder, dram=DRAM, disk=PAGES, queue_bytes=10_000)

    @rule(key=KEYS, size=SIZES)
    def put(self, key, size):
        self.turn += 1
        was_put = self.pool.put("a", [(key, parts_of(key, self.turn, size))])
        assert was_put == [self.model.put(key, self.turn, size)]

    @rule(key=KEYS)
    def get(self, key):
        [value] = self.pool.get("a", [key])
        expected = self.model.get(key)
        assert (value is None) == (expected is None)
        if value is not None:
            assert (turn_of(key, value, value.place.num_bytes), value.place.num_bytes) == expected

    @rule(key=KEYS)
    def delete(self, key):
        assert self.pool.delete("a", [key]) == [self.model.delete(key)]

    @rule()
    def clear(self):
        self.pool.clear("a")
        self.model = Model()

    @rule()
    def write_all(self):
        self.pool.flush()
        assert len(files_in(self.folder)) == len(self.model.disk)
        known = {**dict.fromkeys(self.model.disk, "disk"), **dict.fromkeys(self.model.dram, "dram")}
        assert [place.tier for place in self.pool.contains("a", list(known))] == list(known.values())

    @rule()
    def restart(self):
        self.pool.close()
        self.pool = self.open()
        self.model.dram.clear()

    @invariant()
    def places_and_bytes_are_right(self):
        keys = [b"k%d" % index for index in range(9)]
        for key, place in zip(keys, self.pool.contains("a", keys), strict=True):
            expected = self.model.known(key)
            assert (place and place.num_bytes) == (expected and expected[1])
            if place and key in self.model.dram:
                assert place.tier == "dram"
        [node] = self.pool.stats().nodes
        assert node.dram_bytes == sum(size for _, size in self.model.dram.values()) <= DRAM
        assert node.disk_bytes == 4096 * sum(map(pages_of, self.model.disk.values())) <= 4096 * PAGES
        assert node.num_keys == len({*self.model.dram, *self.model.disk})
        for one in self.pool.stats().namespaces:
            known = map(self.model.known, {*self.model.dram, *self.model.disk})
            assert (one.num_bytes, one.num_keys) == (sum(size for _, size in known), node.num_keys)

    def teardown(self):
        self.pool.close()
        shutil.rmtree(self.folder)


def test_both_tiers_are_as_the_model():
    run_state_machine_as_test(NodeMachine)


@given(steps=st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=50))
def test_memory_alone_drops_what_was_used_longest_ago(steps):
    """Puts, and gets, of keys of which five have room."""
    pool, model = MemoryPool([local_node(None, dram=500)]), collections.OrderedDict()
    for turn, (index, is_put) in enumerate(steps):
        key = b"k%d" % index
        if is_put:
            pool.put("a", [(key, parts_of(key, turn))])
            model.pop(key, None)
            model[key] = turn
            if len(model) > 5:
                model.popitem(last=False)
        else:
            [value] = pool.get("a", [key])
            assert (value and turn_of(key, value)) == model.get(key)
            if key in model:
                model.move_to_end(key)
    found = pool.contains("a", [b"k%d" % index for index in range(8)])
    assert [place is not None for place in found] == [b"k%d" % index in model for index in range(8)]


def test_a_reader_keeps_what_it_has():
    """Evicted or not, nobody's memory is given to another value."""
    pool = MemoryPool([local_node(None, dram=1000)])
    pool.put("a", [(b"k", parts_of(b"k", 3))])
    [value] = pool.get("a", [b"k"])
    [again] = pool.get("a", [b"k"])
    assert again.parts[0].obj is value.parts[0].obj  # not copied
    for turn in range(200):
        pool.put("a", [(b"other%d" % turn, parts_of(b"other%d" % turn, turn))])
    assert pool.get("a", [b"k"]) == [None]
    assert turn_of(b"k", value) == 3
    assert value.parts[0].readonly


def test_the_order_of_use_outlives_a_restart(tmp_path):
    keys = [b"k%d" % index for index in range(4)]
    pool = open_over(tmp_path, dram=250, disk=4)
    pool.put("a", [(key, parts_of(key)) for key in keys])
    pool.flush()
    pool.get("a", [keys[0]])  # from disk
    pool.get("a", [keys[3]])  # in memory
    pool.get("a", [keys[1]])
    pool.close()
    pool = open_over(tmp_path, dram=250, disk=4)
    left = []
    for turn in range(4):
        pool.put("a", [(b"new%d" % turn, parts_of(b"new%d" % turn))])
        gone = [key for key, place in zip(keys, pool.contains("a", keys), strict=True) if not place]
        left += [key for key in gone if key not in left]
    assert left == [keys[2], keys[0], keys[3], keys[1]]
    pool.close()


def test_a_smaller_disk_keeps_what_was_used_last(tmp_path):
    keys = [b"k%d" % index for index in range(6)]
    pool = open_over(tmp_path, disk=6)
    pool.put("a", [(key, parts_of(key)) for key in keys])
    pool.close()
    pool = open_over(tmp_path, disk=2)
    assert [place is not None for place in pool.contains("a", keys)] == [False] * 4 + [True] * 2
    assert len(files_in(tmp_path)) == 2
    pool.close()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


SPOIL = {
    "cut": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "cut within the record": lambda path, _: os.truncate(path, 20),
    "emptied": lambda path, _: os.truncate(path, 0),
    "longer": lambda path, _: os.truncate(path, path.stat().st_size + 1),
    "huge": lambda path, _: os.truncate(path, 2**40),
    "flipped": lambda path, _: flip(path),
    "gone": lambda path, _: path.unlink(),
    "another's": lambda path, other: shutil.copyfile(other, path),
}


@pytest.mark.parametrize("is_restarted", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize("how", SPOIL)
def test_a_spoilt_file_is_a_miss(tmp_path, how, is_restarted):
    """It is counted and deleted; the others are served."""
    keys = [b"good", b"spoilt"]
    pool = open_over(tmp_path, dram=150)
    pool.put("a", [(key, parts_of(key)) for key in keys])
    pool.flush()
    pool.put("a", [(b"last", parts_of(b"last"))])  # so that neither is in memory
    pool.flush()
    if is_restarted:
        pool.close()
    by_key = {name: f"{digest_of('a', name):032x}"[2:] for name in keys}
    [good], [spoilt] = ([path for path in files_in(tmp_path) if path.name.startswith(by_key[name])] for name in keys)
    SPOIL[how](spoilt, good)
    if is_restarted:
        pool = open_over(tmp_path, dram=150)
    assert pool.get("a", [b"spoilt"]) == [None]
    assert turn_of(b"good", pool.get("a", [b"good"])[0]) == 0
    [node] = pool.stats().nodes
    is_seen_at_start = is_restarted and how in ("cut within the record", "emptied", "huge", "gone")
    assert node.counters.num_corrupt == (not is_seen_at_start)
    assert node.counters.num_misses == 1
    assert pool.contains("a", [b"spoilt"]) == [None]
    assert not spoilt.exists()
    pool.close()


def test_what_is_not_a_value_is_cleared_away_at_a_start(tmp_path):
    pool = open_over(tmp_path)
    pool.put("a", [(b"k", parts_of(b"k"))])
    pool.close()
    [path] = files_in(tmp_path)
    junk = [path.with_name("junk"), Path(f"{path}.part"), path.with_name(path.name + "0000")]
    for one in junk:
        one.write_bytes(b"half")
    strange = tmp_path / "node0" / ("0" * 32) / "ab"
    strange.mkdir(parents=True)
    (strange / path.name).write_bytes(path.read_bytes())  # in a namespace that nobody knows the name of
    kept = tmp_path / "node0" / "notes.txt"
    kept.write_text("not the pool's")
    pool = open_over(tmp_path)
    assert turn_of(b"k", pool.get("a", [b"k"])[0]) == 0
    assert not any(one.exists() for one in [*junk, strange])
    assert kept.exists()
    pool.close()


def test_of_two_versions_the_later_one_is_served(tmp_path):
    """A process that died while it replaced a value leaves both files."""
    pool = open_over(tmp_path)
    pool.put("a", [(b"k", parts_of(b"k", 2))])
    pool.close()
    [path] = files_in(tmp_path)
    for version, turn in ((1, 1), (2**62, 3)):
        store = FileStore(tmp_path / "other", 10**6)
        store.write(StoredKey("a", digest_of("a", b"k"), version, 2), copied(parts_of(b"k", turn)))
        store.close()
        [other] = files_in(tmp_path / "other")
        shutil.move(other, path.with_name(other.name))
    pool = open_over(tmp_path)
    assert turn_of(b"k", pool.get("a", [b"k"])[0]) == 3
    assert len(files_in(tmp_path / "node0")) == 1
    pool.put("a", [(b"k", parts_of(b"k", 4))])  # its version is later still
    pool.close()
    pool = open_over(tmp_path)
    assert turn_of(b"k", pool.get("a", [b"k"])[0]) == 4
    pool.close()


def test_a_limit_on_files_is_a_failed_write(tmp_path):
    """The value stays in memory, the disk is left alone for a while, and used again after it."""
    pool = open_over(tmp_path, dram=100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert pool.put("a", [(b"large", parts_of(b"large", 1, 9000))]) == [True]
        pool.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    [node] = pool.stats().nodes
    assert (node.is_up, node.counters.num_errors, node.counters.num_unwritten, node.disk_bytes) == (False, 1, 1, 0)
    assert turn_of(b"large", pool.get("a", [b"large"])[0], 9000) == 1
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    wait_until(lambda: put_and_flush(pool, b"next") and files_in(tmp_path))
    assert pool.stats().nodes[0].is_up
    pool.close()


def put_and_flush(pool, key):
    pool.put("a", [(key, parts_of(key))])
    pool.flush()
    return True


def wait_until(condition):
    """Polls; a test that waits for good is ended by the suite's own limit."""
    while not condition():
        threading.Event().wait(0.02)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 pages, where there is a right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_smaller_than_its_capacity_keeps_what_was_used_last(small_disk):
    keys = [b"k%d" % index for index in range(30)]
    pool = open_over(small_disk, dram=50_000, disk=10_000)
    for key in keys:
        pool.put("a", [(key, parts_of(key, 1, 40_000))])
        pool.flush()
    [node] = pool.stats().nodes
    assert node.counters.evictions["disk"] > 0
    assert node.counters.num_errors == 0
    found = [value is not None for value in pool.get("a", keys)]
    assert found == sorted(found)
    assert 5 <= sum(found) <= 12
    pool.close()


def test_a_disk_that_others_fill_costs_the_copies_alone(small_disk):
    (small_disk / "theirs").write_bytes(bytes(400_000))
    pool = open_over(small_disk, dram=500_000, disk=10_000)
    for turn in range(4):
        assert pool.put("a", [(b"k%d" % turn, parts_of(b"k%d" % turn, turn, 150_000))]) == [True]
        pool.flush()
    [node] = pool.stats().nodes
    assert node.counters.num_errors > 0
    assert node.counters.num_unwritten == 4
    for turn, value in enumerate(pool.get("a", [b"k%d" % turn for turn in range(4)])):
        assert turn == 0 or turn_of(b"k%d" % turn, value, 150_000) == turn
    pool.close()


def test_a_store_that_dies_is_misses(tmp_path):
    """What is in memory is served; the rest is a miss and an error, and nothing waits or raises."""
    pool = open_over(tmp_path, dram=250)
    keys = [b"k%d" % index for index in range(5)]
    pool.put("a", [(key, parts_of(key)) for key in keys])
    pool.flush()
    shutil.move(tmp_path / "node0", tmp_path / "away")
    (tmp_path / "node0").write_text("no folder any more")
    values = pool.get("a", keys)
    assert [value is not None for value in values] == [False] * 3 + [True] * 2
    assert pool.put("a", [(b"new", parts_of(b"new"))]) == [True]
    pool.flush()
    [node] = pool.stats().nodes
    assert not node.is_up
    assert node.counters.num_errors >= 2
    assert node.counters.num_corrupt == 0
    (tmp_path / "node0").unlink()
    shutil.move(tmp_path / "away", tmp_path / "node0")
    wait_until(lambda: pool.get("a", keys[:1])[0])  # it is tried again, and has what it had
    pool.close()


class HangingStore:
    """Every write waits until it may go on; the rest is a file store's."""

    def __init__(self, store):
        self.store, self.may_go_on = store, threading.Event()

    def __getattr__(self, name):
        return getattr(self.store, name)

    def write(self, key, parts):
        self.may_go_on.wait()
        self.store.write(key, parts)


def hanging_pool(tmp_path, **options):
    node = local_node(tmp_path, **options)
    node._store = HangingStore(node._store)
    return node._store, MemoryPool([node], folder=tmp_path)


def test_what_is_not_written_yet_is_served_from_the_queue(tmp_path):
    """Values that memory has no room for any more, while the disk is slow."""
    store, pool = hanging_pool(tmp_path, dram=150, queue_bytes=1000)
    keys = [b"k%d" % index for index in range(5)]
    for key in keys:
        pool.put("a", [(key, parts_of(key))])
    assert [turn_of(key, value) for key, value in zip(keys, pool.get("a", keys), strict=True)] == [0] * 5
    assert pool.stats().nodes[0].dram_bytes <= 150
    assert pool.stats().nodes[0].queued_bytes == 500
    pool.delete("a", [keys[1]])
    pool.put("a", [(keys[2], parts_of(keys[2], 7))])
    store.may_go_on.set()
    pool.flush()
    assert len(files_in(tmp_path)) == 4
    pool.close()
    pool = open_over(tmp_path)
    assert [value and turn_of(key, value) for key, value in zip(keys, pool.get("a", keys), strict=True)] == [
        0,
        None,
        7,
        0,
        0,
    ]
    pool.close()


def test_a_disk_that_hangs_costs_copies_and_no_request(tmp_path):
    store, pool = hanging_pool(tmp_path, dram=350, queue_bytes=200, queue_wait_s=0.01)
    keys = [b"k%d" % index for index in range(20)]
    assert all(pool.put("a", [(key, parts_of(key)) for key in keys]))
    [node] = pool.stats().nodes
    assert node.queued_bytes == 200
    assert node.counters.num_unwritten == 18
    assert node.counters.num_lost == 15
    assert [key for key, place in zip(keys, pool.contains("a", keys), strict=True) if place] == [*keys[:2], *keys[17:]]
    store.may_go_on.set()
    pool.close()


WRITE_UNTIL_KILLED = """
import itertools, sys
from pathlib import Path
from tests.caching.contents import open_over, parts_of
pool = open_over(Path(sys.argv[1]), dram=10**7, disk=10**4, queue_bytes=200_000)
for turn in itertools.count():
    key = b"k%d" % (turn % 50)
    pool.put("a", [(key, parts_of(key, turn, 20_000))])
    sys.stdout.write(f"{turn}\\n")
    sys.stdout.flush()
"""


def test_a_process_that_is_killed_leaves_nothing_wrong(tmp_path):
    """After it, a key has what was put last, or nothing."""
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(400)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    last = int([line for line in lines if line.endswith("\n")][-1])
    pool = open_over(tmp_path, dram=10**7, disk=10**4)
    keys = [b"k%d" % index for index in range(50)]
    turns = {}
    for key, value in zip(keys, pool.get("a", keys), strict=True):
        if value is not None:
            turns[key] = turn_of(key, value, 20_000)
    assert turns
    for key, turn in turns.items():
        put_last = max(one for one in range(last + 1) if b"k%d" % (one % 50) == key)
        assert turn in (put_last, put_last + 50)  # one more may have been put than was said
    pool.close()


def test_a_folder_has_one_owner(tmp_path):
    pool = open_over(tmp_path)
    with pytest.raises(UserError, match="in use by another process"):
        FileStore(tmp_path / "node0", 4096)
    pool.close()
    FileStore(tmp_path / "node0", 4096).close()


def test_what_is_no_value_is_refused():
    pool = MemoryPool([local_node(None)])
    for parts in ([], [b"x"] * 1025):
        with pytest.raises(ValueError, match="parts"):
            pool.put("a", [(b"k", parts)])
    assert pool.put("a", [(b"empty", [b""]), (b"many", [b"x"] * 1024)]) == [True, False]
    assert bytes(pool.get("a", [b"empty"])[0].parts[0]) == b""
    with pytest.raises(UserError, match="not positive"):
        local_node(None, dram=0)

"""A pool made of settings, and one clear line for each mistake in them."""

import subprocess
import sys

import pytest

from cmjax.errors import UserError
from cmjax.serve.caching import CacheSettings, FileStore, open_pool
from tests.caching.contents import parts_of, turn_of
from tests.conftest import ROOT


def refused(settings, block_bytes=1_000_000):
    with pytest.raises(UserError) as caught:
        open_pool(settings, block_bytes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_memory_alone_is_the_default():
    pool = open_pool(CacheSettings(), 1_000_000)
    [node] = pool.stats().nodes
    assert (node.name, node.kind, node.dram_capacity, node.disk_capacity) == ("node0", "local", 2_000_000_000, 0)
    pool.close()


def test_nodes_share_the_capacities(tmp_path):
    settings = CacheSettings(
        num_nodes=3, dram_bytes=30_000_000, disk_bytes=90_000_000, folder=str(tmp_path / "new" / "cache")
    )
    for turn in (None, 5):
        pool = open_pool(settings, 1_000_000)
        sizes = [(node.name, node.cpu, node.dram_capacity, node.disk_capacity) for node in pool.stats().nodes]
        assert sizes == [(f"node{index}", index, 10_000_000, 30_000_000) for index in range(3)]
        assert [value and turn_of(b"k", value) for value in pool.get("a", [b"k"])] == [turn]
        pool.put("a", [(b"k", parts_of(b"k", 5))])
        pool.close()


def test_every_namespace_has_the_quota():
    pool = open_pool(CacheSettings(namespace_bytes=250), 200)
    pool.put("a", [(b"k%d" % index, parts_of(b"k%d" % index)) for index in range(5)])
    assert [(one.num_keys, one.quota) for one in pool.stats().namespaces] == [(2, 250)]
    pool.close()


def test_servers_take_the_place_of_embedded_nodes(start_server):
    servers = [start_server(), start_server()]
    settings = CacheSettings(nodes=tuple(server.url for server in servers))
    pool, other = open_pool(settings, 1000), open_pool(settings, 1000)
    keys = [b"k%d" % index for index in range(50)]
    pool.put("a", [(key, parts_of(key, 1)) for key in keys])
    assert [turn_of(key, value) for key, value in zip(keys, other.get("a", keys), strict=True)] == [1] * 50
    assert {place.cpu for place in pool.contains("a", keys)} == {0, 1}
    pool.close()
    other.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dram_bytes": 999_999},
            "--cache-dram-gb 0.000999999 cannot hold one block of 1000000 bytes on each: give 0.001",
        ),
        (
            {"dram_bytes": 3_000_000, "num_nodes": 4},
            "--cache-dram-gb 0.003 over 4 nodes cannot hold one block of 1000000 bytes on each: give 0.004 or more",
        ),
        ({"disk_bytes": 1_000_000, "folder": "here"}, "--cache-disk-gb 0.001 cannot hold one block"),
        (
            {"namespace_bytes": 5},
            "--cache-namespace-gb 5e-09 cannot hold one block of 1000000 bytes: give 0.001 or more",
        ),
        ({"nodes": ("redis://127.0.0.1:1",)}, "--cache-node 127.0.0.1:1/0 cannot be used: "),
        ({"nodes": ("127.0.0.1:1",)}, "'127.0.0.1:1' is no redis://host:port"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert refused(CacheSettings(**options)).startswith(message)


def test_what_the_message_gives_will_do(tmp_path):
    settings = CacheSettings(disk_bytes=1_000_000, folder=str(tmp_path), num_nodes=3)
    enough = float(refused(settings).split("give ")[1].split()[0])
    open_pool(CacheSettings(disk_bytes=int(enough * 1e9), folder=str(tmp_path), num_nodes=3), 1_000_000).close()


def test_settings_contradict_themselves():
    with pytest.raises(UserError, match="--cache-dir is for embedded nodes"):
        CacheSettings(folder="here", nodes=("redis://localhost",))
    with pytest.raises(UserError, match="cache_block_size 0 is not positive"):
        CacheSettings(cache_block_size=0)
    with pytest.raises(UserError, match="plane 'rdma' is not one of ub, vpc"):
        CacheSettings(plane="rdma")


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "under", "/proc/cache"):
        assert "cannot be written to" in refused(CacheSettings(folder=str(folder)))


def test_a_folder_in_use_is_one_line(tmp_path):
    """By another process; one that was killed does not hold it."""
    code = (
        "import sys; from cmjax.serve.caching import FileStore\n"
        "store = FileStore(sys.argv[1] + '/node1', 10**6); print('has it', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "has it\n"
    settings = CacheSettings(folder=str(tmp_path), num_nodes=2)
    assert refused(settings) == f"the cache folder {tmp_path}/node1 is in use by another process"
    FileStore(tmp_path / "node0", 10**6).close()  # the node that could be opened has been closed again
    process.kill()
    process.communicate()
    open_pool(settings, 1_000_000).close()


def test_a_server_that_cannot_hold_a_block_is_one_line(start_server):
    server = start_server("--maxmemory", "2mb")
    message = refused(CacheSettings(nodes=(server.url,)), 3_000_000)
    assert message == f"--cache-node {server.folder}/s/0 has a maxmemory of 2097152 bytes: a block takes 3000000"


def test_a_pool_of_fewer_nodes_leaves_nothing_of_the_others(tmp_path):
    def sizes() -> dict[str, int]:
        return {
            node.name: sum(path.stat().st_size for path in node.rglob("*") if path.is_file())
            for node in tmp_path.glob("node*")
        }

    for count, most in ((3, 10**6), (1, 10**6), (3, 10**6)):
        pool = open_pool(CacheSettings(folder=str(tmp_path), num_nodes=count, disk_bytes=most), 1000)
        pool.put("a", [(b"%d" % number, [b"x" * 9000]) for number in range(60)])
        pool.flush()
        pool.close()
        assert {name for name, size in sizes().items() if size > 9000} == {f"node{index}" for index in range(count)}
        assert sum(sizes().values()) <= most

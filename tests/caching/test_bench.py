"""The benchmark of the pool at a small size: every figure is there, and the tables show it."""

import io
import json
import math
import shutil

from rich.console import Console

from cmjax.bench import pool


def test_every_way_is_measured_and_shown(tmp_path):
    result = pool.run(num_blocks=4, num_small=200, rounds=1, num_index_keys=20_000, folder=str(tmp_path))
    has_server = shutil.which("redis-server") is not None
    assert (result.server is not None) == has_server
    assert len(result.blocks) == 6 + 2 * has_server
    assert len(result.small) == 6 + 4 * has_server
    figures = [result.copy_gb_per_s, *result.blocks.values(), *result.small.values(), result.index.seconds]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert 50 < result.index.bytes_a_key < 400
    console = Console(file=io.StringIO(), width=200)
    for table in pool.tables(result):
        console.print(table)
    text = console.file.getvalue()
    assert all(way in text for way in (*result.blocks, *result.small))
    told = json.loads(json.dumps(pool.report(result)))
    assert told["results"]["shares"]["get, DRAM"] == result.share("get, DRAM")
    assert not list(tmp_path.iterdir())

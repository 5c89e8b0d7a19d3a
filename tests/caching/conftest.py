"""A real Redis server for the tests that need one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.caching.servers import Server


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`start_server("--maxmemory", "20mb")`: a server that listens in the test's folder; ended with the test."""
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server on PATH")
    started: list[Server] = []

    def start(*options: str) -> Server:
        started.append(Server(tmp_path / f"redis{len(started)}", options))
        return started[-1]

    yield start
    for server in started:
        server.end()

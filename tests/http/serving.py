"""A real server: in a thread, over a real engine, or as a process."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from cmjax.checkpoint import GenerationConfig, Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.serve import Engine
from cmjax.serve.http import ServerSettings, create_app
from cmjax.serve.http.template import ChatTemplate
from tests.conftest import ROOT

PATIENCE = 60  # seconds that a client of a test waits for an answer, whatever else the machine does


@contextlib.contextmanager
def served(
    engine: Engine, generation: GenerationConfig | None = None, template: str | None = None, **settings: Any
) -> Iterator[str]:
    """The address of a server for the demonstration model; the engine has been started."""
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL)
    server_settings = ServerSettings(**{"model_name": "demo", **settings})
    app = create_app(
        engine, server_settings, tokenizer, ChatTemplate.find(BUNDLED_MODEL, tokenizer, template), generation
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    (listening,) = server.servers
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


@contextlib.contextmanager
def serving_process(*options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`cmjax serve` with the options, on a port of its own choice: the process and its address, once it is ready."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "serve")}
    command = [sys.executable, "-m", "cmjax", "serve", "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"serving \S+ on (http://\S+)", line):
                    break
            else:
                raise AssertionError("the server did not start: " + "".join(said))
            yield process, found[1]
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_idle(engine: Engine) -> None:
    """Until no request, block or place is in use."""

    def is_idle() -> bool:
        stats = engine.stats()
        return not (stats.num_running or stats.num_waiting or sum(one.num_used_blocks for one in stats.instances))

    wait_until(is_idle)

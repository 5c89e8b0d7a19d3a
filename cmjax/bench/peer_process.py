"""The other sides of `cmjax bench peer`, and the processes of other interpreters that they run in."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.errors import UserError

_FOLDER = Path(__file__).parent
# As a program's own, the folder of `side.py` would come before the standard library, and has a `trace` and more.
_START = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
# Far above what any request takes, on a loaded machine too: what is silent for so long hangs.
REPLY_S = 900.0
_END_S = 3.0
_STDERR_BYTES = 20_000
_TELLING = ("GGML_ASSERT", "error", "Error")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A peer: its name, the option that names its interpreter, what that must have, and what the peer can do."""

    name: str
    flag: str
    packages: str
    program: Path
    formats: tuple[str, ...]


TRANSFORMERS = Kind(
    "transformers",
    "--peer-python",
    "torch and transformers",
    _FOLDER / "transformers_side.py",
    ("bfloat16", "float32"),
)
LLAMA = Kind(
    "llama.cpp",
    "--llama-python",
    "llama-cpp-python and gguf",
    _FOLDER / "llama_side.py",
    ("bfloat16", "float32", "int8"),
)


class SideProcess:
    """A `Side` in a process of another interpreter, asked one thing at a time; it waits while others work."""

    def __init__(self, kind: Kind, python: str, reply_s: float = REPLY_S) -> None:
        self._kind, self._where, self._reply_s = kind, f"{kind.flag} {python}", reply_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        command = [python, "-c", _START, str(_FOLDER / "side.py"), str(kind.program)]
        try:
            # In a session of its own: Ctrl-C is for this process, which ends the other one and what that started.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            self._stderr.close()
            raise UserError(f"{self._where}: {error.strerror}") from error

    def ask(self, do: str, **request: Any) -> Any:
        """The value that answers one request; UserError, in one line, where the side fails, ends or hangs."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(self._reply_s, give_up)
        timer.start()
        try:
            stdin.write(json.dumps({"do": do} | request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            raise UserError(f"{self._where}: no answer to {do!r} in {self._reply_s:g} s")
        if not line.endswith("\n"):
            raise UserError(f"{self._where}: {self._last_words(do)}")
        reply = json.loads(line)
        if "error" in reply:
            missing = "ModuleNotFoundError" in reply["error"] or "ImportError" in reply["error"]
            hint = f"; it needs {self._kind.packages}" if missing else ""
            raise UserError(f"{self._where}: {reply['error']}{hint}")
        return reply["value"]

    def _last_words(self, do: str) -> str:
        """How the process ended, and the most telling line that it left."""
        status = self._process.wait()
        ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - _STDERR_BYTES))
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if any(word in line for word in _TELLING)] or lines
        return f"{ended} at {do!r}" + (f": {telling[-1]}" if telling else "")

    def close(self) -> None:
        """Let the process end, now that nothing is asked any more."""
        assert self._process.stdin is not None
        # It may have ended already, or not want to.
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(_END_S)
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._stderr.close()

    def kill(self) -> None:
        """End the process and its children at once, whatever they do."""
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Peer:
    """One of the other sides, in a process of another interpreter or in this one."""

    def __init__(self, kind: Kind, ask: Callable[..., Any], close: Callable[[], None] = lambda: None) -> None:
        self.name, self.formats, self._ask, self.close = kind.name, kind.formats, ask, close
        self.versions: dict[str, str] = ask("versions")

    def load(self, path: Path, number_format: str) -> None:
        """Load the float32 checkpoint in folder `path` in one of `formats`."""
        self._ask("load", path=str(path), number_format=number_format)

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """`float32[A, B, S, V]`, by each of the A ways that may be timed."""
        with tempfile.TemporaryDirectory(prefix="cmjax-bench-") as folder:
            file = Path(folder) / "logits.npy"
            self._ask("logits", input_ids=input_ids.tolist(), into=str(file))
            return np.load(file)

    def prepare(self, job: str, prompts: np.ndarray, num_steps: int) -> str:
        """Make `run` do the job over `prompts int[B, S]`; return the peer's way that does it fastest."""
        return self._ask("prepare", job=job, prompts=prompts.tolist(), num_steps=num_steps)

    def run(self) -> None:
        """Do the job once."""
        self._ask("run")


def start(kind: Kind, python: str) -> Peer:
    """The peer in a process of the interpreter `python`."""
    process = SideProcess(kind, python)
    try:
        return Peer(kind, process.ask, process.close)
    except BaseException:  # Ctrl-C as well: nobody else knows the process yet
        process.close()
        raise


def transformers_here() -> Peer | None:
    """Transformers in this process, None where it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    from cmjax.bench.transformers_side import Side

    side = Side()
    return Peer(TRANSFORMERS, lambda do, **request: getattr(side, do)(**request))


def start_peers(peer_python: str | None, llama_python: str | None, ends: contextlib.ExitStack) -> list[Peer]:
    """The wanted ones; `ends` ends them."""
    peers = []
    for kind, python in ((TRANSFORMERS, peer_python), (LLAMA, llama_python)):
        if python:
            peers.append(start(kind, python))
            ends.callback(peers[-1].close)
    if not peers and (here := transformers_here()):
        peers.append(here)
    return peers

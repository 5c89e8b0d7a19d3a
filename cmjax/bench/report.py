"""What every benchmark says beside its figures: on which machine, with which versions, from which commit."""

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jaxlib
import psutil

import cmjax
from cmjax.mesh import num_cores
from cmjax.text import JsonObject

_CPU_INFO = Path("/proc/cpuinfo")


def machine() -> JsonObject:
    """The machine and the software, as JSON-ready values; `commit` is None outside a clone."""
    return {
        "cpu": _cpu_name(),
        "cores": num_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "cmjax": cmjax.__version__,
        "commit": commit(),
    }


def _cpu_name() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the clone this runs from, with "+changes" where files differ; None where there is no clone."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True).stdout.strip()


def in_turn(
    contenders: Mapping[str, Callable[[], object]], rounds: int, *, pause_s: float = 0.0
) -> dict[str, list[float]]:
    """Time each contender once a round, in turn, so that a slow moment of the machine meets them all.

    Each runs once before, to be compiled and warm; a call must return when its work is done. `pause_s` is slept before
    each timed call.

    Returns:
        Name -> seconds of each round, so that contenders can be compared round by round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(pause_s)
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return seconds

"""Builds C++ against the installed jaxlib, once per machine, and loads it with its FFI handlers."""

import ctypes
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jaxlib

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")


class BuildError(RuntimeError):
    """A library cannot be built or loaded here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A source to compile: its file name, and the flags that it alone takes."""

    name: str
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded library, or None and the reason in one line."""

    library: ctypes.CDLL | None
    reason: str


def cache_dir() -> pathlib.Path:
    """Where compiled libraries are kept: $CMJAX_CACHE_DIR, by default ~/.cache/cmjax."""
    configured = os.environ.get("CMJAX_CACHE_DIR")
    return pathlib.Path(configured) if configured else pathlib.Path.home() / ".cache" / "cmjax"


def find_compiler() -> str | None:
    """Path of the C++ compiler: $CXX if set (and nothing else then), or the first of g++, clang++, c++ on the PATH."""
    configured = os.environ.get("CXX")
    for name in (configured,) if configured else ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return found
    return None


def build_library(name: str, folder: pathlib.Path, units: Sequence[Unit]) -> pathlib.Path:
    """Path of the library `name` of the sources in `folder`, for this jaxlib; compiled first if it is not in the cache.

    Raises:
      BuildError: no compiler was found, or it failed.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.cc"), *folder.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr((_FLAGS, units)).encode())
    key = f"{jaxlib.__version__}-{platform.system()}-{platform.machine()}-{digest.hexdigest()[:16]}".lower()
    target = cache_dir() / f"{name}-{key}.so"
    if target.exists():
        return target
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX") or "g++ or clang++"
        raise BuildError(f"no C++ compiler was found ({wanted}; install one or set CXX)")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may start at once on a fresh machine; one compiles, the others wait for it.
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(compiler, folder, units, target)
    return target


def _compile(compiler: str, folder: pathlib.Path, units: Sequence[Unit], target: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [str(pathlib.Path(scratch) / f"{index}.o") for index in range(len(units))]

        def compile_unit(unit: Unit, into: str) -> None:
            include = ("-isystem", jax.ffi.include_dir())
            _run([compiler, *_FLAGS, *unit.flags, *include, "-c", str(folder / unit.name), "-o", into])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, units, objects))
        output = pathlib.Path(scratch) / target.name
        _run([compiler, "-shared", "-pthread", *objects, "-o", str(output)])
        with output.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(output, target)  # atomic: nobody ever loads half a file


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else f'exit status {result.returncode}'}")


def load_library(name: str, folder: pathlib.Path, units: Sequence[Unit], handlers: Sequence[str]) -> Loaded:
    """The library, built if need be, its FFI handlers `cmjax_{name}_{handler}` registered; or why there is none."""
    try:
        path = build_library(name, folder, units)
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # of another system that shares the folder, or damaged
            path.unlink(missing_ok=True)
            library = ctypes.CDLL(str(build_library(name, folder, units)))
    except (BuildError, OSError) as error:
        return Loaded(None, str(error))
    for handler in handlers:
        target = f"cmjax_{name}_{handler}"
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return Loaded(library, f"built for jaxlib {jaxlib.__version__}: {path.name}")

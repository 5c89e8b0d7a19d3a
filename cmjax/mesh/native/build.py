"""Builds the C++ fabric against the installed jaxlib, once per machine, and loads it."""

import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jaxlib

_SOURCES = ("fabric.cc", "exchange.cc", "ffi.cc")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
_HANDLERS = ("enter", "start", "done", "nothing", "yield")


class BuildError(RuntimeError):
    """The C++ fabric cannot be built or loaded here; the message says why."""


@dataclasses.dataclass(frozen=True)
class NativeFabric:
    """The loaded library, or None and the reason in one line."""

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


def build() -> pathlib.Path:
    """Path of the shared library for this jaxlib and these sources, compiled first if it is not in the cache.

    Raises:
      BuildError: no compiler was found, or it failed.
    """
    here = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.cc"), *here.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join(_FLAGS).encode())
    key = f"{jaxlib.__version__}-{platform.system()}-{platform.machine()}-{digest.hexdigest()[:16]}".lower()
    target = cache_dir() / f"fabric-{key}.so"
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
            _compile(compiler, [here / name for name in _SOURCES], target)
    return target


def _compile(compiler: str, sources: list[pathlib.Path], target: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = pathlib.Path(scratch) / target.name
        command = [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), *map(str, sources), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise BuildError(f"{compiler} failed: {lines[0] if lines else f'exit status {result.returncode}'}")
        os.replace(output, target)  # atomic: nobody ever loads half a file


@functools.cache
def load() -> NativeFabric:
    """The library with its FFI handlers registered (built at the first call), or the reason why there is none."""
    try:
        path = build()
        library = ctypes.CDLL(str(path))
    except (BuildError, OSError) as error:
        return NativeFabric(None, str(error))
    for name in _HANDLERS:
        handler = getattr(library, f"cmjax_fabric_{name}")
        jax.ffi.register_ffi_target(f"cmjax_fabric_{name}", jax.ffi.pycapsule(handler), platform="cpu")
    _declare(library)
    return NativeFabric(library, f"built for jaxlib {jaxlib.__version__}: {path.name}")


def _declare(library: ctypes.CDLL) -> None:
    pointer, i32, i64, text, real = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p, ctypes.c_double
    signatures = {
        "cmjax_fabric_set_timeout": (None, [real]),
        "cmjax_fabric_set_delay": (None, [text, real, real]),
        "cmjax_fabric_clear_delays": (None, []),
        "cmjax_fabric_num_live": (i64, []),
        "cmjax_fabric_num_threads": (i32, []),
        "cmjax_fabric_memcpy": (None, [pointer, pointer, i64]),
        "cmjax_traffic_snapshot": (pointer, []),
        "cmjax_traffic_free": (None, [pointer]),
        "cmjax_traffic_reset": (None, []),
        "cmjax_traffic_size": (i64, [pointer]),
        "cmjax_traffic_plane": (text, [pointer, i64]),
        "cmjax_traffic_collective": (text, [pointer, i64]),
        "cmjax_traffic_calls": (i64, [pointer, i64]),
        "cmjax_traffic_modelled_s": (real, [pointer, i64]),
        "cmjax_traffic_exposed_s": (real, [pointer, i64]),
        "cmjax_traffic_num_devices": (i32, [pointer]),
        "cmjax_traffic_bytes": (None, [pointer, i64, i32, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments

"""The C++ fabric: what it is built of, and its plain C functions."""

import ctypes
import functools
import pathlib

from cmjax.native import Loaded, Unit, build_library, load_library

_FOLDER = pathlib.Path(__file__).parent
_UNITS = tuple(Unit(name) for name in ("fabric.cc", "exchange.cc", "ffi.cc"))
_HANDLERS = ("enter", "start", "done", "nothing", "yield")


@functools.cache
def load() -> Loaded:
    """The library with its FFI handlers registered (built at the first call), or the reason why there is none."""
    loaded = load_library("fabric", _FOLDER, _UNITS, _HANDLERS)
    if loaded.library is not None:
        _declare(loaded.library)
    return loaded


def build() -> pathlib.Path:
    """Path of the library, see `cmjax.native.build_library`."""
    return build_library("fabric", _FOLDER, _UNITS)


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

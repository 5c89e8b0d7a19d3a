"""The library of kernels: what it is built of, and its plain C functions."""

import ctypes
import functools
import pathlib
import platform

from cmjax.native import Loaded, Unit, load_library

FOLDER = pathlib.Path(__file__).parent
HANDLERS = ("product", "experts", "absorb", "attend", "release")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma")
# form.cc is compiled once for each kind of CPU, under the name it has in the library.
_FORMS: dict[str, tuple[str, ...]] = {"Portable": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    _FORMS |= {"Avx2": ("-mavx2", "-mfma"), "Avx512": _AVX512, "Avx512Bf16": (*_AVX512, "-mavx512bf16")}
FORMS = tuple(_FORMS)
UNITS = (
    Unit("kernels.cc"),
    Unit("ffi.cc"),
    *(Unit("form.cc", (f"-DCMJAX_FORM={name}", *flags)) for name, flags in _FORMS.items()),
)


@functools.cache
def load() -> Loaded:
    """The library with its FFI handlers registered (built at the first call), or the reason why there is none."""
    loaded = load_library("kernels", FOLDER, UNITS, HANDLERS)
    if loaded.library is not None:
        loaded.library.cmjax_kernels_form.restype = ctypes.c_char_p
        loaded.library.cmjax_kernels_use.argtypes = [ctypes.c_char_p]
    return loaded

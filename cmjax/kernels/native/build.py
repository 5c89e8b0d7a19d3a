"""The library of kernels: what it is built of, and its plain C functions."""

import ctypes
import functools
import pathlib
import platform
from collections.abc import Iterable

from cmjax.native import Loaded, Unit, find_compiler, load_library

FOLDER = pathlib.Path(__file__).parent
HANDLERS = (
    "product", "experts", "absorb", "attend", "release", "attend_expanded", "norm", "choose", "pack", "lay_out",
    "sample",
)  # fmt: skip
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma")
# form.cc is compiled once for each kind of CPU, under the name it has in the library.
_FORMS: dict[str, tuple[str, ...]] = {"Portable": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    _FORMS |= {"Avx2": ("-mavx2", "-mfma"), "Avx512": _AVX512, "Avx512Bf16": (*_AVX512, "-mavx512bf16")}
FORMS = tuple(_FORMS)
# What a compiler may be too old for: the others are built without it.
_NEWEST = "Avx512Bf16"


def units(forms: Iterable[str] = FORMS) -> tuple[Unit, ...]:
    """What a library with these forms is built of."""
    kernels = Unit("kernels.cc", () if _NEWEST in forms else ("-DCMJAX_WITHOUT_BF16",))
    return (
        kernels,
        Unit("ffi.cc"),
        Unit("ffi_routing.cc"),
        Unit("ffi_sampling.cc"),
        *(Unit("form.cc", (f"-DCMJAX_FORM={name}", *_FORMS[name])) for name in forms),
    )


@functools.cache
def load() -> Loaded:
    """The library with its FFI handlers registered (built at the first call), or the reason why there is none."""
    loaded = load_library("kernels", FOLDER, units(), HANDLERS)
    if loaded.library is None and find_compiler() is not None and _NEWEST in FORMS:
        loaded = load_library("kernels", FOLDER, units([form for form in FORMS if form != _NEWEST]), HANDLERS)
    if loaded.library is not None:
        loaded.library.cmjax_kernels_form.restype = ctypes.c_char_p
        loaded.library.cmjax_kernels_use.argtypes = [ctypes.c_char_p]
        loaded.library.cmjax_kernels_tiling.argtypes = [ctypes.c_int32, ctypes.POINTER(ctypes.c_int64)]
        loaded.library.cmjax_kernels_tiling.restype = None
    return loaded

"""Which form of the operators runs: C++ or XLA's."""

import contextlib
import ctypes
import dataclasses
import logging
import threading
from collections.abc import Iterator
from typing import Literal, get_args

import jax

from cmjax.errors import UserError
from cmjax.kernels.native import build
from cmjax.options import choice_from_environment

KernelsMode = Literal["auto", "native", "xla"]
_logger = logging.getLogger("cmjax.kernels")


@dataclasses.dataclass(frozen=True)
class KernelStatus:
    """The form in use, "native FORM" (C++, and for which CPU) or "xla", and why."""

    form: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How C++ products by matrices of one type are made on this CPU.

    Attributes:
        step: values of a row that a product takes at a time.
        tile_rows: rows that take the weights as they are read once, at most.
        many_rows: from so many rows on, these are staged by lane and columns laid side by side.
        many_tile: rows that take the weights as they are read once, there.
        is_read_in_place: whether fewer rows of the matrix's own type are read where they are, if whole steps.
        many_block: rows of an expert that columns are laid for at a time, at most; of a product, at least.
        many_bytes: of staged rows of a product that columns are laid for at a time, at most.
    """

    step: int
    tile_rows: int
    many_rows: int
    many_tile: int
    is_read_in_place: bool
    many_block: int
    many_bytes: int


_TYPES = ("f32", "bf16", "s8")  # in the order of the library's own


class _Settings:
    """What the kernels are set to, for the whole process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.mode: KernelsMode = choice_from_environment("CMJAX_KERNELS", get_args(KernelsMode))
        self.has_warned = False
        self.is_helped = True


_SETTINGS = _Settings()


def configure(mode: KernelsMode) -> None:
    """Choose the form of the operators on CPU devices, for the whole process.

    Args:
      mode: "native" (C++, an error where it cannot be built), "xla", or "auto" (C++ where it can be built; the default,
        or $CMJAX_KERNELS). A change drops JAX's caches of compiled programs.
    """
    if mode not in get_args(KernelsMode):
        raise ValueError(f"configure: mode must be one of {get_args(KernelsMode)}, got {mode!r}")
    with _SETTINGS.lock:
        if mode != _SETTINGS.mode:
            _SETTINGS.mode = mode
            jax.clear_caches()  # programs traced before would keep the other form


def mode() -> KernelsMode:
    """What was chosen last; see `configure`."""
    return _SETTINGS.mode


@contextlib.contextmanager
def without_help() -> Iterator[None]:
    """What is lowered meanwhile has kernels that keep to the thread that calls them, however many cores there are."""
    before, _SETTINGS.is_helped = _SETTINGS.is_helped, False
    try:
        yield
    finally:
        _SETTINGS.is_helped = before


def is_helped() -> bool:
    """Whether kernels may call other threads; see `without_help`."""
    return _SETTINGS.is_helped


def is_wanted() -> bool:
    """Whether programs are traced so that CPU devices can use the C++ kernels; this builds nothing."""
    return _SETTINGS.mode != "xla"


def is_native() -> bool:
    """Whether programs for CPU devices use the C++ kernels, which are built at the first call.

    Raises:
      UserError: they were asked for and cannot be built.
    """
    with _SETTINGS.lock:
        if _SETTINGS.mode == "xla":
            return False
        loaded = build.load()
        if loaded.library is None:
            if _SETTINGS.mode == "native":
                raise UserError(f"kernels='native' was asked for, but {loaded.reason}")
            if not _SETTINGS.has_warned:
                _SETTINGS.has_warned = True
                _logger.warning("kernels: %s; running the XLA forms", loaded.reason)
        return loaded.library is not None


def status(platform: str) -> dict[str, KernelStatus]:
    """The form that each operator takes on devices of a platform ("cpu", ...), and why."""
    if platform != "cpu":
        status = KernelStatus("xla", f"platform {platform} has its own products")
    elif _SETTINGS.mode == "xla":
        status = KernelStatus("xla", "kernels='xla' was asked for")
    else:
        loaded = build.load()
        form = f"native {loaded.library.cmjax_kernels_form().decode()}" if loaded.library else "xla"
        status = KernelStatus(form, loaded.reason)
    return dict.fromkeys(build.HANDLERS, status)


def tiling(kind: str) -> Tiling:
    """Of products by matrices of "f32", "bf16" or "s8", in the form in use.

    Raises:
      UserError: the kernels cannot be built here.
    """
    loaded = build.load()
    if loaded.library is None:
        raise UserError(f"no C++ kernels: {loaded.reason}")
    found = (ctypes.c_int64 * len(dataclasses.fields(Tiling)))()
    loaded.library.cmjax_kernels_tiling(_TYPES.index(kind), found)
    step, tile_rows, many_rows, many_tile, is_read_in_place, many_block, many_bytes = found
    return Tiling(step, tile_rows, many_rows, many_tile, bool(is_read_in_place), many_block, many_bytes)

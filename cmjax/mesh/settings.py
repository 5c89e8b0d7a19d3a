"""Settings of the fabric: which form of each collective runs, timeouts, and the modelled delay."""

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import jax
import numpy as np

from cmjax.errors import UserError
from cmjax.mesh.native import build as native_build
from cmjax.native import Loaded
from cmjax.options import choice_from_environment

# XLA:CPU runs collectives on at most this many threads, and each rank of a lax collective blocks one.
MAX_LAX_DEVICES = 256
COLLECTIVES = ("all_to_all", "all_gather", "psum", "psum_scatter", "ppermute", "ragged_all_to_all")

CollectivesMode = Literal["auto", "fabric", "lax"]
RaggedMode = Literal["auto", "native", "padded"]
_logger = logging.getLogger("cmjax.mesh.fabric")


class FabricError(UserError):
    """A collective cannot run as asked; the message names what is missing."""


@dataclasses.dataclass(frozen=True)
class DelayModel:
    """A modelled time for each exchange, by plane; planes not listed take none.

    An exchange completes for a rank no earlier than `multiplier * (latency_s + bytes / bytes_per_s)` after the last
    rank started it, where `bytes` is what that rank sends to others or receives from them, whichever is more.
    The multiplier stretches microseconds until they show in the wall-clock time of a virtual step.
    """

    latency_s: Mapping[str, float]
    bytes_per_s: Mapping[str, float]
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        if set(self.latency_s) != set(self.bytes_per_s):
            raise ValueError(
                f"DelayModel: latency_s has planes {sorted(self.latency_s)}, bytes_per_s {sorted(self.bytes_per_s)}"
            )
        for plane in self.latency_s:
            if self.latency_s[plane] < 0 or self.bytes_per_s[plane] <= 0:
                raise ValueError(
                    f"DelayModel: plane {plane!r} has latency {self.latency_s[plane]} s and bandwidth "
                    f"{self.bytes_per_s[plane]} bytes/s"
                )
        if self.multiplier < 0:
            raise ValueError(f"DelayModel: multiplier must not be negative, got {self.multiplier}")


@dataclasses.dataclass(frozen=True)
class Forms:
    """The form asked for, as traced into each exchange."""

    collectives: CollectivesMode = "auto"
    ragged: RaggedMode = "auto"


@dataclasses.dataclass(frozen=True)
class FormStatus:
    """The form of one collective in use, and why: "fabric" (C++), "lax" or "lax padded"."""

    form: str
    reason: str


class Settings:
    """What the fabric is set to. The fabric has one; its methods are `fabric.configure` and `fabric.status`."""

    def __init__(self, native_ragged_failure: Callable[[str], str | None]) -> None:
        """`native_ragged_failure` says why `lax.ragged_all_to_all` does not serve on a platform, or None."""
        self._native_ragged_failure = native_ragged_failure
        self._lock = threading.Lock()
        self._warned = False
        self.forms = Forms(ragged=choice_from_environment("CMJAX_FABRIC_RAGGED", get_args(RaggedMode)))
        self.delay: DelayModel | None = None
        self.timeout_s = _timeout_from_environment()

    def configure(
        self,
        *,
        timeout_s: float | None = None,
        ragged: RaggedMode | None = None,
        collectives: CollectivesMode | None = None,
        delay: DelayModel | Literal["keep"] | None = "keep",
    ) -> None:
        """Changes the settings given, for the whole process.

        Args:
          timeout_s: seconds without progress after which an exchange fails, naming the missing ranks
            (120, or $CMJAX_FABRIC_TIMEOUT_S).
          ragged: form of `ragged_all_to_all` where lax collectives run: "native" (`lax.ragged_all_to_all`), "padded"
            (an `all_to_all` of worst-case size) or "auto": native, unless it fails when an instance is brought up.
            By default what $CMJAX_FABRIC_RAGGED says, or "auto".
          collectives: "fabric" (C++), "lax", or "auto". Changing a form drops JAX's caches of compiled programs.
          delay: a `DelayModel`, or None for none.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"configure: timeout_s must be positive, got {timeout_s}")
        if ragged not in (None, *get_args(RaggedMode)):
            raise ValueError(f"configure: ragged must be one of {get_args(RaggedMode)}, got {ragged!r}")
        if collectives not in (None, *get_args(CollectivesMode)):
            raise ValueError(f"configure: collectives must be one of {get_args(CollectivesMode)}, got {collectives!r}")
        with self._lock:
            forms = Forms(collectives or self.forms.collectives, ragged or self.forms.ragged)
            if forms != self.forms:
                self.forms = forms
                jax.clear_caches()  # programs traced before would keep the other form
            self.timeout_s = timeout_s if timeout_s is not None else self.timeout_s
            self.delay = delay if delay != "keep" else self.delay
            if native_build.load.cache_info().currsize:
                self._apply(native_build.load())

    def delay_s(self, plane: str, num_bytes: float) -> float:
        """Seconds that the modelled delay gives a transfer of so many bytes by one link; 0 where there is none."""
        delay = self.delay
        if delay is None or plane not in delay.latency_s or not num_bytes:
            return 0.0
        return delay.multiplier * (delay.latency_s[plane] + num_bytes / delay.bytes_per_s[plane])

    def native(self) -> Loaded:
        """The C++ fabric with these settings applied, built at the first call."""
        with self._lock:
            fresh = not native_build.load.cache_info().currsize
            loaded = native_build.load()
            if fresh:
                self._apply(loaded)
            return loaded

    def cpu_uses_native(self, forms: Forms, num_devices: int) -> bool:
        """Whether a program over `num_devices` CPU devices exchanges through C++; False means `lax` collectives.

        Raises:
          FabricError: neither can serve it.
        """
        if forms.collectives == "lax":
            if num_devices > MAX_LAX_DEVICES:
                raise FabricError(_too_many(num_devices, "collectives='lax' was asked for"))
            return False
        loaded = self.native()
        if loaded.library is not None:
            return True
        if forms.collectives == "fabric":
            raise FabricError(f"collectives='fabric' was asked for, but {loaded.reason}")
        if num_devices > MAX_LAX_DEVICES:
            raise FabricError(_too_many(num_devices, loaded.reason))
        if not self._warned:
            self._warned = True
            _logger.warning(
                "fabric: %s; running on lax collectives (ragged ones padded), at most %d devices",
                loaded.reason,
                MAX_LAX_DEVICES,
            )
        return False

    def status(self) -> dict[str, FormStatus]:
        """The form each collective takes on the default platform ("fabric", "lax" or "lax padded"), and why."""
        platform = jax.default_backend()
        statuses = {}
        for name in COLLECTIVES:
            if platform != "cpu":
                form, reason = "lax", f"platform {platform} has its own collectives"
            elif self.forms.collectives == "lax":
                form, reason = "lax", "collectives='lax' was asked for"
            else:
                loaded = self.native()
                form, reason = ("fabric" if loaded.library else "lax"), loaded.reason
            if name == "ragged_all_to_all" and form == "lax" and (why := self._why_padded(platform)):
                form = "lax padded"
                reason += f"; lax.ragged_all_to_all {why}"
            statuses[name] = FormStatus(form, reason)
        return statuses

    def time_memcpy(self, num_bytes: int) -> float:
        """Seconds for a plain copy of `num_bytes` by the threads an exchange uses: the bound a bench compares with."""
        library = self.native().library
        if library is None:
            raise FabricError(f"time_memcpy needs the C++ fabric, but {self.native().reason}")
        source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
        start = time.perf_counter()
        library.cmjax_fabric_memcpy(target.ctypes.data, source.ctypes.data, num_bytes)
        return time.perf_counter() - start

    def _why_padded(self, platform: str) -> str | None:
        if self.forms.ragged == "auto":
            return self._native_ragged_failure(platform)
        return "was set aside by ragged='padded'" if self.forms.ragged == "padded" else None

    def _apply(self, loaded: Loaded) -> None:
        library = loaded.library
        if library is None:
            return
        library.cmjax_fabric_set_timeout(self.timeout_s)
        library.cmjax_fabric_clear_delays()
        if self.delay is not None:
            for plane, latency_s in self.delay.latency_s.items():
                bytes_per_s = self.delay.bytes_per_s[plane]
                stretch = self.delay.multiplier
                if stretch > 0:
                    library.cmjax_fabric_set_delay(plane.encode(), stretch * latency_s, bytes_per_s / stretch)


def _too_many(num_devices: int, reason: str) -> str:
    return (
        f"fabric: {num_devices} devices need the C++ fabric (lax collectives on CPU stop at {MAX_LAX_DEVICES}), "
        f"but {reason}"
    )


def _timeout_from_environment() -> float:
    text = os.environ.get("CMJAX_FABRIC_TIMEOUT_S", "120")
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = 0.0
    if not timeout_s > 0:
        raise UserError(f"CMJAX_FABRIC_TIMEOUT_S must be a positive number of seconds, got {text!r}")
    return timeout_s

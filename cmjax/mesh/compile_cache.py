"""Compiled programs on disk, once for all instances of a kind."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from jax._src import cache_key
from jax._src.lib import xla_client


class _KeyOfAnyDevices:
    """JAX's name for a program in its cache, the same for a CPU program wherever it runs."""

    def __init__(self, original: Callable[..., str]) -> None:
        self._original = original

    def __call__(self, module: Any, devices: Any, compile_options: Any, backend: Any, *args: Any, **kwargs: Any) -> str:
        if backend.platform == "cpu":
            compile_options = _on_first_devices(compile_options)
        return self._original(module, devices, compile_options, backend, *args, **kwargs)


def _on_first_devices(compile_options: Any) -> Any:
    """The same options for as many devices, counted from 0; those given are what the program is compiled with."""
    assignment = compile_options.device_assignment
    if not assignment:
        return compile_options
    shape = assignment.replica_count(), assignment.computation_count()
    options = copy.deepcopy(compile_options)
    options.device_assignment = xla_client.DeviceAssignment.create(np.arange(shape[0] * shape[1]).reshape(shape))
    return options


def share_compiled_programs() -> None:
    """Have JAX's compilation cache find a CPU program whatever devices it was compiled for, as it does for GPUs.

    A CPU program holds nothing of its devices, but JAX counts them among what it was compiled with: the second instance
    of a kind would compile all that the first one has. For the whole process; nothing where JAX has changed inside.
    """
    original = getattr(cache_key, "get", None)
    if original is not None and not isinstance(original, _KeyOfAnyDevices):
        cache_key.get = _KeyOfAnyDevices(original)

"""Compiled programs on disk, once for all instances of a kind."""

import copy
import math
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh


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
    options = copy.deepcopy(compile_options)
    try:
        assignment = options.device_assignment
        shape = assignment.replica_count(), assignment.computation_count()
        options.device_assignment = type(assignment).create(np.arange(math.prod(shape)).reshape(shape))
    except (AttributeError, TypeError):  # no devices, or another JAX
        return compile_options
    return options


def _cache_key() -> ModuleType | None:
    """Where JAX names programs; None where it does so elsewhere."""
    try:
        module = import_module("jax._src.cache_key")
    except ImportError:
        return None
    return module if callable(getattr(module, "get", None)) else None


def share_compiled_programs() -> None:
    """Have JAX's compilation cache find a CPU program whatever devices it was compiled for, as it does for GPUs.

    A CPU program holds nothing of its devices, but JAX counts them among what it was compiled with: the second instance
    of a kind would compile all that the first one has. For the whole process; nothing where JAX has changed inside.
    """
    module = _cache_key()
    if module is not None and not isinstance(module.get, _KeyOfAnyDevices):
        vars(module)["get"] = _KeyOfAnyDevices(module.get)


def programs_are_shared(mesh: Mesh | AbstractMesh) -> bool:
    """Whether a program compiled for a mesh is found in the cache for others of its form."""
    is_kept = jax.config.jax_compilation_cache_dir is not None and jax.config.jax_enable_compilation_cache
    if not is_kept or isinstance(mesh, AbstractMesh):
        return False
    platform = mesh.devices.flat[0].platform
    return platform == "gpu" or (platform == "cpu" and isinstance(getattr(_cache_key(), "get", None), _KeyOfAnyDevices))

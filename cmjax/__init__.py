"""cmjax: a CloudMatrix384-class serving system in JAX."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cmjax.checkpoint import load
    from cmjax.model import Model

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> object:
    # Lazy, so that `import cmjax` and `cmjax --help` do not pay for JAX.
    if name in ("Model", "load"):
        from cmjax import checkpoint, model

        return getattr(model if name == "Model" else checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""A model from a folder, whatever lies in it."""

import dataclasses
import os

import jax.numpy as jnp
from numpy.typing import DTypeLike

from cmjax.checkpoint.weights import Quant, load_checkpoint
from cmjax.errors import UserError
from cmjax.model import Model
from cmjax.options import check_bounds, option
from cmjax.quant import QUANT_MODES

QUANT_CHOICES: tuple[Quant, ...] = (*QUANT_MODES, "none", "auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFormats:
    """The number formats of a model: what `load` is told."""

    dtype: str = option(
        "float32", "Of weights and activations.", flag="--dtype", choices=("float32", "bfloat16", "float16")
    )
    quant: Quant | None = option(
        None,
        "The large products of attention and FFN: int8, the same values as floats (fake), floats (none), or int8 where "
        "it is measured to be faster (auto).",
        flag="--quant",
        choices=QUANT_CHOICES,
        unset="what is stored",
    )

    def __post_init__(self) -> None:
        check_bounds(self)


def load(
    path: str | os.PathLike[str], dtype: DTypeLike = jnp.float32, quant: Quant | None = None, rows: int = 1
) -> Model:
    """Load a model from a Hugging Face folder (`config.json` and `*.safetensors`) or an Orbax checkpoint.

    Args:
        path: the folder.
        dtype: of weights and activations: float32 (the default, whatever the config names), bfloat16 or float16.
        quant: "int8" multiplies the large matrices of attention and FFN in int8, weights with a scale a channel and
            activations with one a token (paper section 4.5); "fake" the same values as floats; "none" as floats;
            "auto" those in int8 that are measured to be faster so, here and now, at `rows` rows; weights that are
            stored as floats are rounded to the nearest (`cmjax quantize` does better). By default nothing is rounded:
            an array whose matrices are all stored in int8 is multiplied in int8, any other in floats.
        rows: for "auto": rows of a step on one device, its sequences in decode, its tokens in prefill.

    Raises:
        UserError: what is missing, truncated, misshapen or not supported, by name.
    """
    if quant not in (None, *QUANT_CHOICES):
        raise UserError(f"quant {quant!r} is not supported; supported: {', '.join(QUANT_CHOICES)}")
    if rows < 1:
        raise UserError(f"rows {rows} is not positive")
    config, params, digest = load_checkpoint(os.fspath(path), dtype=dtype, quant=quant, rows=rows)
    return Model(config, params, digest)

"""The next token of each request, of its logits and settings."""

import dataclasses
import functools

import jax
import numpy as np

from cmjax.kernels.primitive import INLINE, Form, Result, make_primitive, run_kernel

Array = jax.Array
_SAMPLE = make_primitive("sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """What is static about sampling.

    Attributes:
        width: rows of each request, side by side.
        first: how many of a request's drafts come before the token of its first row; one more for each row.
        num_bias, num_stop, num_word_tokens, num_mask_bytes: room in a request's settings.
        not_finite, nothing_allowed: in place of a token where a row's logits hold NaN or infinity, and where the
            settings leave none.
    """

    width: int = 1
    first: int = 0
    num_bias: int = 0
    num_stop: int = 0
    num_word_tokens: int = 0
    num_mask_bytes: int = 0
    not_finite: int
    nothing_allowed: int


@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=INLINE)
def choose_tokens(
    form: Form, logits: Array, words: Array, positions: Array, history: Array, drafts: Array, spec: SamplerSpec
) -> Array:
    """The token of each row, `int32[rows]`.

    Args:
      form: the XLA form, `form(logits, words, positions, history, drafts, spec=spec)`.
      logits: `float32[rows, vocabulary]`.
      words: `int32[requests, any]`, the settings of each request, as `cmjax.serve.steps.PackedSampling` has them; of no
        width: the best token.
      positions: `int32[rows]`, of the tokens to choose.
      history: `int32[requests, any]`, what each request has generated, -1 padded; of no width: nothing that counts.
      drafts: `int32[requests, any]`, guessed to come after it.
    """
    operands = (logits, words, positions, history, drafts)
    serves = logits.dtype == np.float32 and logits.size > 0 and all(one.dtype == np.int32 for one in operands[1:])
    tokens = Result(positions.shape, np.dtype(np.int32))
    run = functools.partial(form, spec=spec)
    return run_kernel(_SAMPLE, run, operands, tokens, dataclasses.asdict(spec), serves=serves)

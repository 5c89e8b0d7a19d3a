"""Training-free calibration of int8 weights (paper section 4.5): what each technique does to one shared input.

All functions work on the host, in float32 (numpy), on matrices `[out, in]` that read one input, and on calibration rows
`[rows, in]` of that input. None needs a gradient, and none leaves anything to do at run time: scales and rotations are
absorbed into the weights before and after, clipping and compensation into the rounded values. Errors are squared
Frobenius norms of outputs.
"""

from collections.abc import Sequence

import numpy as np

from cmjax.quant.array import INT8_MAX, QuantArray, dequantize_host, quantize

# Exponents of the scale search: 0 leaves the input as it is, 1 takes all of its unevenness into the weights.
SCALE_GRID = tuple(i / 20 for i in range(21))
# Shares of a block's largest value that it may be clipped to: closely below 1, and down to a lone outlier's.
CLIP_GRID = (*(1 - i / 20 for i in range(6)), *(2 ** (-i / 2) for i in range(1, 17)))
_DAMPING = 0.01
_COLUMNS = 128
_CHANNELS = 2048


def quantized_rows(inputs: np.ndarray) -> np.ndarray:
    """`inputs[rows, in]` as the int8 product sees them: rounded, with a scale a row (`quantize_rows` on the host)."""
    scale = np.abs(inputs).max(-1, keepdims=True) / np.float32(INT8_MAX)
    safe = np.where(scale > 0, scale, 1)
    return np.rint(inputs / safe) * scale


def rounded(weight: np.ndarray) -> np.ndarray:
    """`weight[out, in]` as the int8 product sees it: rounded to the nearest, with a scale a channel."""
    return dequantize_host(quantize(weight), np.float32)


def output_error(inputs: np.ndarray, weight: np.ndarray, seen_inputs: np.ndarray, seen_weight: np.ndarray) -> float:
    """`|| seen_inputs seen_weight^T - inputs weight^T ||^2`: what becomes of the output."""
    difference = seen_inputs @ seen_weight.T - inputs @ weight.T
    return float(np.sum(np.square(difference, dtype=np.float64)))


def search_scale(
    inputs: np.ndarray,
    quantized: Sequence[np.ndarray],
    importance: Sequence[float] | None = None,
    grid: Sequence[float] = SCALE_GRID,
) -> np.ndarray:
    """The scale of each input channel that loses least over all consumers (equation 3): `float32[in]`, positive.

    The consumers' columns are multiplied by it and the input divided, where it is made; the candidates are
    `max|x|^a / max|w|^(1 - a)` over the channels, for exponents a of `grid`, and no scale at all.

    Args:
        inputs: calibration rows.
        quantized: the matrices that read the input and will be rounded; consumers that stay floats have no say.
        importance: weight of each consumer's error, 1 by default (an expert's share of the rows, say).
    """
    importance = [1.0] * len(quantized) if importance is None else importance
    reach = np.abs(inputs).max(0)
    largest = np.max([np.abs(weight).max(0) for weight in quantized], axis=0)
    is_used = (reach > 0) & (largest > 0)
    scales = [np.ones(inputs.shape[1], np.float32)]
    for exponent in grid:
        scale = np.ones(inputs.shape[1], np.float32)
        scale[is_used] = reach[is_used] ** exponent / largest[is_used] ** (1 - exponent)
        # One factor for all channels changes nothing; this one keeps the numbers where they were.
        scale[is_used] /= np.exp(np.log(scale[is_used]).mean()) if is_used.any() else 1
        scales.append(scale)
    seen = [quantized_rows(inputs / scale) for scale in scales]
    errors = np.zeros(len(scales))
    counts = [len(weight) for weight in quantized]
    channels, share = np.concatenate(quantized), np.repeat(np.asarray(importance, np.float32), counts)
    channels, share = channels[share > 0], share[share > 0]
    # Experts are many and small: products over several of them at once, as many as keep the outputs small.
    for begin in range(0, len(channels), _CHANNELS):
        weight, weighting = channels[begin : begin + _CHANNELS], share[begin : begin + _CHANNELS]
        wanted = inputs @ weight.T
        for index, scale in enumerate(scales):
            difference = seen[index] @ rounded(weight * scale).T - wanted
            errors[index] += float(np.einsum("ro,ro->o", difference, difference) @ weighting)
    return scales[int(np.argmin(errors))]


def orthogonal_matrix(width: int, seed: int = 0) -> np.ndarray:
    """A random rotation that spreads any channel over all: `float32[width, width]`, orthogonal.

    A Hadamard matrix with random signs where `width` is a power of two; else a Kronecker product of the largest one
    that divides it and a random orthogonal matrix for the rest.
    """
    rng = np.random.default_rng(seed)
    power = width & -width
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rest, triangle = np.linalg.qr(rng.standard_normal((width // power, width // power)))
    rest *= np.sign(np.diag(triangle))
    signs = rng.choice([-1.0, 1.0], width)
    return (np.kron(rest, hadamard / np.sqrt(power)) * signs[:, None]).astype(np.float32)


def search_clip(
    gram: np.ndarray, weight: np.ndarray, block_channels: int = 1, grid: Sequence[float] = CLIP_GRID
) -> np.ndarray:
    """How far the values of each channel may reach (equation 4): `float32[out]`, clipping what is beyond.

    A block is `block_channels` output channels, which share the share `a` of their largest values; the one of `grid`
    whose rounded block loses least output is taken.

    Args:
        gram: `float[in, in]`, the sum of `x x^T` over calibration rows.
        weight: `[out, in]`.
        block_channels: channels of a block.
        grid: shares to try.
    """
    largest = np.abs(weight).max(1)
    num_blocks = -(-len(weight) // block_channels)
    block = np.arange(len(weight)) // block_channels
    least, best = np.full(num_blocks, np.inf), np.ones(num_blocks, np.float32)
    for share in grid:
        loss = weight - dequantize_host(round_to(weight, largest * np.float32(share)), np.float32)
        errors = np.einsum("oi,oi->o", loss @ gram, loss)
        error = np.bincount(block, errors, num_blocks)
        best = np.where(error < least, np.float32(share), best)
        least = np.minimum(error, least)
    return largest * best[block]


def round_to(weight: np.ndarray, reach: np.ndarray) -> QuantArray:
    """Round `weight[out, in]` to the nearest of the 255 steps between `-reach` and `reach`, `float32[out]`."""
    scale = (reach / np.float32(INT8_MAX)).astype(np.float32)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    qvalue = np.clip(np.rint(weight * inverse[:, None]), -INT8_MAX, INT8_MAX).astype(np.int8)
    return QuantArray(qvalue, scale)


def round_compensated(gram: np.ndarray, weight: np.ndarray, reach: np.ndarray) -> QuantArray:
    """Round column by column, and let the columns that follow make up for the error of those before.

    What is still free is moved to where it loses least output, by the inverse of the Gram matrix (optimal brain
    surgeon, as GPTQ orders it: from the first column to the last, updates in blocks).

    Args:
        gram: `float[in, in]`, the sum of `x x^T` over calibration rows.
        weight: `[out, in]`.
        reach: `float32[out]`, the largest value that each channel can have.
    """
    width = weight.shape[1]
    scale = (reach / np.float32(INT8_MAX)).astype(np.float64)
    inverse_scale = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    damped = gram.astype(np.float64)
    damped[np.diag_indices(width)] += _DAMPING * max(float(np.trace(damped)) / width, 1e-12)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T  # upper: row i says how an error at i spreads
    rest, qvalue = weight.astype(np.float64), np.zeros(weight.shape, np.int8)
    for begin in range(0, width, _COLUMNS):
        end = min(begin + _COLUMNS, width)
        errors = np.zeros((len(weight), end - begin))
        for i in range(begin, end):
            steps = np.clip(np.rint(rest[:, i] * inverse_scale), -INT8_MAX, INT8_MAX)
            qvalue[:, i] = steps
            error = (rest[:, i] - steps * scale) / factor[i, i]
            errors[:, i - begin] = error
            rest[:, i:end] -= np.outer(error, factor[i, i:end])
        rest[:, end:] -= errors @ factor[begin:end, end:]
    return QuantArray(qvalue, scale.astype(np.float32))


def blended_gram(own: np.ndarray, own_rows: int, shared: np.ndarray, shared_rows: int, least_rows: int) -> np.ndarray:
    """The Gram matrix for an expert that few calibration rows reached.

    Rows that it lacks, up to `least_rows`, are taken to be like those of the whole layer: its own matrix plus that of
    the layer, weighted to the missing number.
    """
    missing = max(0, least_rows - own_rows)
    return own + shared * (missing / max(1, shared_rows))

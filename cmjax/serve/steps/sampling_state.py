"""How the rows of a batch are sampled: arrays of the host, and as one array of a step."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.schedule import Ragged, SamplingRows, SamplingShape

# On the host, or in a step.
Array = np.ndarray | jax.Array

# What is read where a token is chosen, one value a row; and rows of a width that the shape gives, with what fills them.
_VALUES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_positions",
    "asks_logprobs",
    "seed",
)
_LISTS = {"bias_ids": -1, "bias_values": 0, "stop_ids": -1, "word_ids": -1, "word_ends": -1}
_MASKS = {"prompt_mask": 0, "allowed_mask": 0xFF}


@flax.struct.dataclass
class SamplingState:
    """How each of the rows of a batch is sampled.

    Attributes:
        temperature: `float32[rows]`, 0 for the best token.
        top_k: `int32[rows]`, 0 for all.
        top_p, min_p: `float32[rows]`, 1 and 0 for all.
        presence_penalty, frequency_penalty: `float32[rows]`.
        repetition_penalty: `float32[rows]`, 1 for none.
        min_positions: `int32[rows]`, the first position that may hold a stop token.
        asks_logprobs: `int32[rows]`, whether the log probabilities of its tokens are asked for.
        seed: `uint32[rows, 2]`, high and low half.
        bias_ids, bias_values: `int32[rows, any]`, -1 padded, and `float32` of the same shape.
        stop_ids: `int32[rows, any]`, -1 padded; a token among them is a request's last.
        word_ids, word_ends: `int32[rows, any]`, -1 padded: the tokens of bad words, one word after another, and how
            many come after each in its word.
        prompt_mask, allowed_mask: `uint8[rows, bytes]`, a bit for each token of the vocabulary, the lowest of a byte
            first: those of the prompt (where there is a repetition penalty), and those that are allowed.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    presence_penalty: Array
    frequency_penalty: Array
    repetition_penalty: Array
    min_positions: Array
    asks_logprobs: Array
    seed: Array
    bias_ids: Array
    bias_values: Array
    stop_ids: Array
    word_ids: Array
    word_ends: Array
    prompt_mask: Array
    allowed_mask: Array

    @classmethod
    def empty(
        cls, rows: int, num_bias: int = 0, num_stop: int = 0, num_word_tokens: int = 0, num_mask_bytes: int = 0
    ) -> "SamplingState":
        """Host arrays for `rows` greedy rows, with room for so much each."""
        zeros = [np.zeros(rows, np.float32) for _ in range(6)]
        return cls(
            temperature=zeros[0],
            top_k=np.zeros(rows, np.int32),
            top_p=zeros[1] + 1,
            min_p=zeros[2],
            presence_penalty=zeros[3],
            frequency_penalty=zeros[4],
            repetition_penalty=zeros[5] + 1,
            min_positions=np.zeros(rows, np.int32),
            asks_logprobs=np.zeros(rows, np.int32),
            seed=np.zeros((rows, 2), np.uint32),
            bias_ids=np.full((rows, num_bias), -1, np.int32),
            bias_values=np.zeros((rows, num_bias), np.float32),
            stop_ids=np.full((rows, num_stop), -1, np.int32),
            word_ids=np.full((rows, num_word_tokens), -1, np.int32),
            word_ends=np.full((rows, num_word_tokens), -1, np.int32),
            prompt_mask=np.zeros((rows, num_mask_bytes), np.uint8),
            allowed_mask=np.full((rows, num_mask_bytes), 0xFF, np.uint8),
        )

    @classmethod
    def for_shape(cls, rows: int, shape: SamplingShape, vocabulary: int) -> "SamplingState":
        """Host arrays for `rows` greedy rows, with room for all that a shape allows."""
        num_mask_bytes = -(-vocabulary // 8) if shape.has_masks else 0
        return cls.empty(rows, shape.num_bias, shape.num_stop, shape.num_word_tokens, num_mask_bytes)

    def write(self, rows: np.ndarray, given: SamplingRows) -> None:
        """Write requests' settings into rows of host arrays that have room for them."""
        for name in _VALUES:
            getattr(self, name)[rows] = getattr(given, name)
        for name, filler in _LISTS.items():
            getattr(self, name)[rows] = filler
            getattr(given, name).write_into(getattr(self, name), rows)
        if self.prompt_mask.shape[1]:
            self.prompt_mask[rows] = _mask(given.prompt_ids, self.prompt_mask.shape[1])
            allowed = _mask(given.allowed_ids, self.allowed_mask.shape[1])
            allowed[given.allowed_ids.lengths == 0] = 0xFF
            self.allowed_mask[rows] = allowed

    def take(self, narrow: "SamplingState") -> None:
        """Write all rows of host arrays with room for less into these."""
        for field in dataclasses.fields(self):
            values = getattr(narrow, field.name)
            getattr(self, field.name)[tuple(map(slice, values.shape))] = values

    def rows(self, index: np.ndarray, shape: SamplingShape, vocabulary: int) -> "SamplingState":
        """Some rows of host arrays, with room for what a shape allows."""
        narrow = SamplingState.for_shape(0, shape, vocabulary)
        fields = {field.name: getattr(self, field.name)[index] for field in dataclasses.fields(self)}
        for name in (*_LISTS, *_MASKS):
            fields[name] = fields[name][:, : getattr(narrow, name).shape[1]]
        return SamplingState(**fields)

    def clear(self, rows: np.ndarray) -> None:
        """Make rows of host arrays greedy, so that they do not have the others draw, sort or add."""
        empty = SamplingState.empty(1)
        for name in _VALUES:
            getattr(self, name)[rows] = getattr(empty, name)[0]
        for name, filler in (_LISTS | _MASKS).items():
            getattr(self, name)[rows] = filler


@flax.struct.dataclass
class PackedSampling:
    """A `SamplingState` as one array: one argument of a step to cut by rank, and to send to hundreds of devices, in
    place of a dozen and more.

    Attributes:
        words: `int32[rows, any]`, the bytes of each row's fields one after another, each from a word on.
        layout: dtype and width of each field, None for one of a value a row.
    """

    words: Array
    layout: tuple[tuple[str, int | None], ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, state: SamplingState) -> "PackedSampling":
        """Pack host arrays."""
        arrays = [np.asarray(getattr(state, field.name)) for field in dataclasses.fields(state)]
        parts = [np.ascontiguousarray(a.reshape(len(a), -1)).view(np.uint8).reshape(len(a), -1) for a in arrays]
        padded = [np.pad(part, ((0, 0), (0, -part.shape[1] % 4))) for part in parts]
        layout = tuple((a.dtype.name, a.shape[1] if a.ndim == 2 else None) for a in arrays)
        return cls(np.concatenate(padded, axis=1).view(np.int32), layout)

    def unpacked(self) -> SamplingState:
        """In a step."""
        words, begin, fields = jnp.asarray(self.words), 0, []
        for dtype, width in self.layout:
            count, per_word = 1 if width is None else width, 4 // np.dtype(dtype).itemsize
            num_words = -(-count // per_word)
            part = lax.bitcast_convert_type(words[:, begin : begin + num_words], dtype)
            values = part.reshape(len(words), num_words * per_word)
            fields.append(values[:, 0] if width is None else values[:, :width])
            begin += num_words
        return SamplingState(*fields)

    @property
    def room(self) -> dict[str, int]:
        """What a row has room for, as `SamplingState.empty` takes it."""
        names = [field.name for field in dataclasses.fields(SamplingState)]
        widths = {name: width or 0 for name, (_, width) in zip(names, self.layout, strict=True)}
        return {
            "num_bias": widths["bias_ids"],
            "num_stop": widths["stop_ids"],
            "num_word_tokens": widths["word_ids"],
            "num_mask_bytes": widths["prompt_mask"],
        }


def _mask(ids: Ragged, num_bytes: int) -> np.ndarray:
    """A bit for each token id, `uint8[rows, num_bytes]`."""
    bits = np.zeros((len(ids.lengths), num_bytes * 8), bool)
    bits[np.repeat(np.arange(len(ids.lengths)), ids.lengths), ids.values] = True
    return np.packbits(bits, axis=1, bitorder="little")

"""The rows of a decode instance on the host: what its devices are told when a sequence comes, grows or goes."""

import dataclasses

import jax
import numpy as np

from cmjax.model import DecodeBatch
from cmjax.schedule import DecodeGrowth, DecodeJoins, SamplingShape
from cmjax.serve.steps import DecodeState, PackedSampling, SamplingState, Settled


class DecodeRows:
    """A row for each place, `[ranks * places]`, kept up with what the devices compute; rows of places that no sequence
    has mean nothing.

    Args:
        num_ranks, num_places: of the instance.
        max_blocks, max_tokens: of the longest request.
        num_drafts: k.
        shape: of all that is compiled.
        vocab_size: of the model.
    """

    def __init__(
        self,
        num_ranks: int,
        num_places: int,
        max_blocks: int,
        max_tokens: int,
        num_drafts: int,
        shape: SamplingShape,
        vocab_size: int,
    ) -> None:
        self.num_ranks, self.num_places, self.num_drafts, self.shape = num_ranks, num_places, num_drafts, shape
        self.vocab_size = vocab_size
        self._max_blocks, self._max_tokens = max_blocks, max_tokens
        size = num_ranks * num_places
        self.batch = DecodeBatch(
            token_ids=np.zeros(size, np.int32),
            positions=np.zeros(size, np.int32),
            last_positions=np.zeros(size, np.int32),
            block_table=np.full((size, max_blocks), -1, np.int32),
        )
        self.sampling = SamplingState.for_shape(size, shape, vocab_size) if shape.is_sampled else None
        self.history = np.full((size, max_tokens), -1, np.int32) if shape.has_penalties else None
        self._history_lengths = np.zeros(size, np.int64)
        self._num_settled = np.ones(size, np.int32)
        self._next_token_ids = np.zeros((size, num_drafts + 1), np.int32)

    def widened(self, shape: SamplingShape) -> "DecodeRows":
        """The same rows, with room for what `shape` adds."""
        sizes = (self.num_ranks, self.num_places, self._max_blocks, self._max_tokens, self.num_drafts)
        wide = DecodeRows(*sizes, shape, self.vocab_size)
        wide.batch, wide._num_settled, wide._next_token_ids = self.batch, self._num_settled, self._next_token_ids
        if wide.sampling is not None and self.sampling is not None:
            wide.sampling.take(self.sampling)
        if self.history is not None:
            wide.history, wide._history_lengths = self.history, self._history_lengths
        return wide

    def join(self, joins: DecodeJoins) -> None:
        """Rows that begin."""
        places, batch = joins.places, self.batch
        batch.token_ids[places] = joins.token_ids
        batch.positions[places] = joins.positions
        batch.last_positions[places] = joins.last_positions
        batch.block_table[places] = -1
        joins.blocks.write_into(batch.block_table, places)
        if self.sampling is not None:
            self.sampling.write(places, joins.sampling)
        if self.history is not None:
            self.history[places] = -1
            joins.history.write_into(self.history, places)
            self._history_lengths[places] = joins.history.lengths
        # The hidden state that came with the latents is that of the token before the newest.
        self._num_settled[places] = 1
        self._next_token_ids[places] = 0
        self._next_token_ids[places, 0] = joins.token_ids

    def grow(self, growth: DecodeGrowth) -> None:
        """Rows that have more blocks."""
        growth.blocks.write_into(self.batch.block_table, growth.places, growth.first)
        self.batch.last_positions[growth.places] = growth.last_positions

    def advance(self, places: np.ndarray, token_ids: np.ndarray, num_steps: int) -> None:
        """What a call of `num_steps` steps has made of rows, `int32[steps * (k + 1), rows]`."""
        width, row = self.num_drafts + 1, np.arange(len(places))
        steps = token_ids.reshape(num_steps, width, -1)
        is_token = steps >= 0
        per_step = is_token.sum(1)
        counts = per_step.sum(0)
        self._append_history(places, token_ids)
        moved = counts > 0
        # Those of the last step that made any are what the MTP module has yet to see.
        last_step = num_steps - 1 - np.argmax(per_step[::-1] > 0, axis=0)
        settled = np.where(is_token, steps, 0)[last_step, :, row]
        newest = settled[row, np.maximum(per_step[last_step, row] - 1, 0)]
        self.batch.positions[places] += counts.astype(np.int32)
        self.batch.token_ids[places[moved]] = newest[moved]
        self._num_settled[places[moved]] = per_step[last_step, row][moved]
        self._next_token_ids[places[moved]] = settled[moved]

    def _append_history(self, places: np.ndarray, token_ids: np.ndarray) -> None:
        if self.history is None:
            return
        is_token = token_ids >= 0
        index = self._history_lengths[places] + np.cumsum(is_token, axis=0) - 1
        rows = np.broadcast_to(places, token_ids.shape)
        is_token &= index < self.history.shape[1]
        self.history[rows[is_token], index[is_token]] = token_ids[is_token]
        self._history_lengths[places] += is_token.sum(0)

    def row_of(self, places: np.ndarray, num_slots: int) -> np.ndarray:
        """The row of each place, `int64`, among `ranks * num_slots`: that of the place where every place has one, else
        in turn."""
        if num_slots == self.num_places:
            return places.astype(np.int64)
        ranks = places // self.num_places
        first = np.searchsorted(ranks, ranks)  # of the same rank: places ascend
        return ranks * num_slots + np.arange(len(places)) - first

    def _rows_of(self, places: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
        """The row of each place, and the place of each row.

        Rows without a sequence repeat a place, and are switched off by their position.
        """
        rows, of_row = self.row_of(places, num_slots), np.zeros(self.num_ranks * num_slots, np.int64)
        of_row[rows] = places
        return rows, of_row

    def state(self, places: np.ndarray, num_slots: int, shape: SamplingShape, hidden: jax.Array | None) -> DecodeState:
        """These places as the host arrays of a step, `[ranks * num_slots]`, all else empty; without their sampling.

        Args:
            hidden: the devices' hidden states of all places, where drafts are made.
        """
        rows, of_row = self._rows_of(places, num_slots)
        positions = np.full(len(of_row), -1, np.int32)
        positions[rows] = self.batch.positions[places]
        batch = DecodeBatch(
            token_ids=self.batch.token_ids[of_row],
            positions=positions,
            last_positions=self.batch.last_positions[of_row],
            block_table=self.batch.block_table[of_row],
        )
        settled = None
        if self.num_drafts:
            assert hidden is not None
            settled = Settled(
                hidden,
                (of_row % self.num_places).astype(np.int32),
                self._next_token_ids[of_row],
                self._num_settled[of_row],
            )
        history = self.history[of_row] if self.history is not None and shape.has_penalties else None
        return DecodeState(batch, None, settled, history)

    def sampling_of(self, places: np.ndarray, num_slots: int, shape: SamplingShape) -> PackedSampling | None:
        """How these places are sampled, as a host array for the same step; None where the shape only takes the best."""
        if not shape.is_sampled:
            return None
        if self.sampling is None:
            raise ValueError(f"no rows have been made for {shape}: compile it first")
        rows, of_row = self._rows_of(places, num_slots)
        found = self.sampling.rows(of_row, shape, self.vocab_size)
        # An empty row must not make the others draw, sort or add.
        is_empty = np.ones(len(of_row), bool)
        is_empty[rows] = False
        found.clear(is_empty)
        return PackedSampling.of(found)


@dataclasses.dataclass(frozen=True)
class StateKey:
    """What the devices' state is of: the same rows in the same variant go on by themselves."""

    num_slots: int
    shape: SamplingShape
    places: bytes

"""Generated tokens beside those of a reference: an independent implementation's, or the model's own on one device."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.checkpoint import read_json
from cmjax.errors import UserError
from cmjax.model import Model

REFERENCE = "reference.json"
# A reference token that led the second best by less than this says nothing about which of the two is right.
CLEAR_MARGIN = 1e-3
CLEAR_ROUNDED = 0.1  # of the logits' standard deviation, where activations and what travels are rounded


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and its greedy continuation; `margins` tell how far each token led the second best, in logits."""

    prompt_ids: list[int]
    token_ids: list[int]
    margins: list[float]

    @property
    def num_clear(self) -> int:
        """Tokens before the first close call: from there on another continuation may be right too."""
        return next((i for i, margin in enumerate(self.margins) if margin < CLEAR_MARGIN), len(self.margins))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Generated tokens against the reference's.

    Attributes:
        num_sequences: all of them.
        num_tokens: those of the sequences that were compared.
        num_equal: those of them that are the reference's.
        num_unclear: those not compared, for they follow a close call of the reference or are one.
    """

    num_sequences: int
    num_tokens: int
    num_equal: int
    num_unclear: int

    @property
    def is_equal(self) -> bool:
        """Whether every token that was compared is the reference's; nothing compared is no proof."""
        return self.num_equal == self.num_tokens > 0

    def sentence(self, unclear: str = "come after a close call") -> str:
        """What came out, for people; `unclear` says why tokens were not compared."""
        verdict = "The generated tokens equal the reference's" if self.is_equal else "DIFFERENT from the reference"
        counts = f"{self.num_equal:,} of {self.num_tokens:,} tokens of {self.num_sequences} sequences"
        more = f" ({self.num_unclear:,} more {unclear})" if self.num_unclear else ""
        return f"{verdict}: {counts}{more}."


def compare(expected: Sequence[Completion], generated: Sequence[Sequence[int]]) -> Comparison:
    """Compare sequences token for token, each up to the reference's first close call."""
    num_tokens = num_equal = num_unclear = 0
    for one, token_ids in zip(expected, generated, strict=True):
        clear = one.num_clear
        num_tokens += clear
        num_equal += sum(a == b for a, b in zip(one.token_ids[:clear], token_ids, strict=False))
        num_unclear += len(one.token_ids) - clear
    return Comparison(len(expected), num_tokens, num_equal, num_unclear)


def compare_to_one_device(
    model: Model, prompts: Sequence[Sequence[int]], generated: Sequence[Sequence[int]], batch: int = 32
) -> Comparison:
    """Compare each token with the best one that the model finds on one device after those before it.

    For a quantized model, whose tokens are not a float model's: what travels between ranks is rounded too, so only
    tokens that lead by a tenth of the logits' deviation are certain.
    """
    sequences = [[*prompt, *token_ids] for prompt, token_ids in zip(prompts, generated, strict=True)]
    longest = max(map(len, sequences))
    padded = np.zeros((-(-len(sequences) // batch) * batch, longest), np.int32)
    for row, ids in zip(padded, sequences, strict=False):
        row[: len(ids)] = ids
    num_tokens = num_equal = num_unclear = 0
    for begin in range(0, len(sequences), batch):
        logits = np.asarray(model.logits(padded[begin : begin + batch]))
        for prompt, token_ids, rows in zip(
            prompts[begin : begin + batch], generated[begin : begin + batch], logits, strict=False
        ):
            rows = rows[len(prompt) - 1 : len(prompt) - 1 + len(token_ids)]
            second, best = np.sort(rows, axis=-1)[:, -2:].T
            is_clear = best - second > CLEAR_ROUNDED * rows.std()
            num_tokens += int(is_clear.sum())
            num_equal += int((is_clear & (rows.argmax(-1) == token_ids)).sum())
            num_unclear += int((~is_clear).sum())
    return Comparison(len(sequences), num_tokens, num_equal, num_unclear)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What an independent implementation, `source`, generated greedily from the checkpoint beside it."""

    path: Path
    source: str
    completions: list[Completion]

    @classmethod
    def read(cls, folder: Path) -> "Reference":
        """Read `reference.json`; a UserError tells what is wrong with it."""
        path = folder / REFERENCE
        if not path.is_file():
            raise UserError(f"{folder}: no {REFERENCE} there to compare with")
        values = read_json(path)
        source, entries = values.get("source"), values.get("completions")
        if not isinstance(source, str):
            raise UserError(f"{path}: source must be a text")
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{path}: completions must be a list of at least one")
        return cls(path, source, [_completion(entry, f"{path}: completion {i}") for i, entry in enumerate(entries)])

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have."""
        for index, one in enumerate(self.completions):
            for token in (*one.prompt_ids, *one.token_ids):
                if token >= vocab_size:
                    raise UserError(
                        f"{self.path}: completion {index}: token id {token} is outside the model's vocabulary "
                        f"(0 to {vocab_size - 1})"
                    )

    def take(self, count: int, max_tokens: int) -> list[Completion]:
        """The first `count`, from the beginning again where there are fewer, of at most `max_tokens` tokens each."""
        chosen = (self.completions[index % len(self.completions)] for index in range(count))
        return [Completion(one.prompt_ids, one.token_ids[:max_tokens], one.margins[:max_tokens]) for one in chosen]


def _completion(entry: object, where: str) -> Completion:
    """An entry of the file, checked."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be a JSON object")
    for name in ("prompt_ids", "token_ids", "margins"):
        what, is_right = ("numbers from 0", _is_margin) if name == "margins" else ("token ids", _is_token_id)
        if name not in entry:
            raise UserError(f"{where}: {name} is missing")
        if not isinstance(entry[name], list) or not entry[name] or not all(map(is_right, entry[name])):
            raise UserError(f"{where}: {name} must be a list of {what}, at least one")
    if len(entry["token_ids"]) != len(entry["margins"]):
        raise UserError(f"{where}: {len(entry['token_ids'])} token_ids, but {len(entry['margins'])} margins")
    return Completion(entry["prompt_ids"], entry["token_ids"], entry["margins"])


def _is_token_id(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_margin(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0

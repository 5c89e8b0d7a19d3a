"""Texts to calibrate a model on, and to measure it with."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from cmjax.errors import UserError
from cmjax.options import check_bounds, option
from cmjax.text import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How much text a model is calibrated on."""

    sequences: int = option(128, "Sequences to calibrate on.", flag="--sequences", minimum=1)
    length: int = option(256, "Tokens of each.", flag="--length", minimum=3)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A text, where it comes from, and its subject area."""

    path: str
    area: str
    text: str


def read_texts(path: Path) -> list[TextFile]:
    """Read JSON lines with `path`, `area` and `text`; a UserError names the line that is something else."""
    files = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            files.append(TextFile(**{name: str(values[name]) for name in ("path", "area", "text")}))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no JSON object with path, area and text") from error
    if not files:
        raise UserError(f"{path}: holds no text")
    return files


def calibration_ids(folder: Path, data: Path, sequences: int, length: int, seed: int) -> np.ndarray:
    """`int32[sequences, length]` (fewer of a short text): its tokens end to end, cut, in random order.

    Args:
        folder: of the model, whose tokenizer it is.
        data: the text, as `read_texts` takes it.
    """
    tokenizer = Tokenizer.from_folder(folder)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stream = [token for file in read_texts(data) for token in [*begin, *tokenizer.encode(file.text)]]
    if len(stream) < length:
        raise UserError(f"{data}: the text has {len(stream)} tokens, a sequence needs {length}: lower --length")
    rows = np.array(stream[: len(stream) // length * length], np.int32).reshape(-1, length)
    return rows[np.random.default_rng(seed).permutation(len(rows))[:sequences]]

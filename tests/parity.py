"""The parity cases of `tests/data/parity`: checkpoints, and what an independent implementation computes from them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cmjax.checkpoint import SafetensorsFolder, load_checkpoint, write_safetensors
from cmjax.model import ModelConfig, Params

FOLDER = Path(__file__).parent / "data" / "parity"
CASES = tuple(sorted(path.name for path in FOLDER.iterdir() if path.is_dir()))
MTP_CASES = ("v3-ep320", "v3-mtp", "v3-tied")
# After a step whose two best logits are closer than this, later tokens of that row need not match.
CLEAR_MARGIN = 1e-3


class Checkpoint:
    """A parity case's config and tensors, to be changed and written somewhere."""

    def __init__(self, name: str) -> None:
        source = SafetensorsFolder(FOLDER / name)
        self.config = json.loads((FOLDER / name / "config.json").read_text())
        self.tensors = {key: source.read(key) for key in source.names()}

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        write_safetensors(folder / "model.safetensors", self.tensors)
        return folder


@dataclass(frozen=True)
class ParityCase:
    """One case: its checkpoint, loaded in float32, and the arrays of its `reference.npz`.

    `generated` is the greedy continuation of `prompt`; `margin`, where the case has it, the lead of each of its tokens.
    """

    name: str
    path: Path
    config: ModelConfig
    params: Params
    digest: str
    input_ids: np.ndarray  # int32[B, S]
    logits: np.ndarray  # float32[B, S, V]
    mtp_logits: np.ndarray | None  # float32[B, S - 1, V]
    prompt: np.ndarray | None  # int32[B, P]
    generated: np.ndarray | None  # int32[B, N]
    margin: np.ndarray | None  # float32[B, N]

    def num_clear(self, row: int) -> int:
        """How many tokens of `generated[row]` are certain: those before the first close call."""
        assert self.margin is not None
        close = np.flatnonzero(self.margin[row] < CLEAR_MARGIN)
        return int(close[0]) if len(close) else self.margin.shape[1]


@cache
def load_case(name: str) -> ParityCase:
    """The case called `name`, read once per process: its arrays must not be written to."""
    path = FOLDER / name
    config, params, digest = load_checkpoint(path)
    with np.load(path / "reference.npz") as stored:
        arrays = dict(stored)
    optional = {key: arrays.get(key) for key in ("mtp_logits", "prompt", "generated", "margin")}
    return ParityCase(name, path, config, params, digest, arrays["input_ids"], arrays["logits"], **optional)

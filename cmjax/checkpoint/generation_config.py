"""A model folder's `generation_config.json`: what ends a text, and how it is best sampled."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from cmjax.errors import UserError
from cmjax.text import read_json

# What vLLM takes from the file, and what a request calls it.
_DEFAULTS = {
    "temperature": float,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "top_k": int,
    "max_new_tokens": int,
}
FILE_NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What holds where a request leaves it open.

    Attributes:
        eos_token_ids: any of them ends a text; None: those of config.json do.
        defaults: of `temperature`, `top_p`, `min_p`, `top_k`, `repetition_penalty` and `max_tokens`, those that it has.
        where: the file, for messages.
    """

    eos_token_ids: tuple[int, ...] | None = None
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)
    where: str = FILE_NAME

    @classmethod
    def find(cls, folder: Path, choice: str = "auto") -> "GenerationConfig":
        """That of a model folder, which need not have one, as vLLM's `--generation-config` has it.

        Args:
            folder: the model's.
            choice: "auto", all of the file; "vllm", what ends a text and no defaults; else another folder to read.

        Raises:
            UserError: the folder that is named has none, or what is there is malformed.
        """
        if choice not in ("auto", "vllm"):
            path = Path(choice) / FILE_NAME
            if not path.is_file():
                raise UserError(f"--generation-config {choice}: {path} not found; it takes auto, vllm or a folder")
            return cls.from_file(path)
        path = folder / FILE_NAME
        found = cls.from_file(path) if path.is_file() else cls()
        return found if choice == "auto" else dataclasses.replace(found, defaults={})

    @classmethod
    def from_file(cls, path: Path) -> "GenerationConfig":
        """Read one.

        Raises:
            UserError: it is no JSON object, or a field is of the wrong kind.
        """
        config = read_json(path)
        eos = config.get("eos_token_id")
        ids = [eos] if _is_id(eos) else eos
        if ids is not None and not (isinstance(ids, list) and all(map(_is_id, ids))):
            raise UserError(f"{path}: eos_token_id must be a token id or a list of them, found {eos!r}")
        defaults: dict[str, float] = {}
        for name, kind in _DEFAULTS.items():
            value = config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value % 1 != 0):
                wanted = "an integer" if kind is int else "a number"
                raise UserError(f"{path}: {name} must be {wanted}, found {value!r}")
            defaults["max_tokens" if name == "max_new_tokens" else name] = kind(value)
        return cls(None if ids is None else tuple(ids), defaults, str(path))

    def check(self, vocab_size: int) -> None:
        """Refuse token ids that a model of this vocabulary does not have."""
        outside = [token for token in self.eos_token_ids or () if token >= vocab_size]
        if outside:
            raise UserError(
                f"{self.where}: eos_token_id {outside[0]} is outside the vocabulary (0 to {vocab_size - 1})"
            )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

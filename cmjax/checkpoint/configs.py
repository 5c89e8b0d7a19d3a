"""Configs of models, with or without weights: of a folder, of a file, or one of those that ship with the package."""

import dataclasses
from importlib import resources
from pathlib import Path

from cmjax.checkpoint.formats import Int8Channels, stored_format
from cmjax.errors import UserError
from cmjax.model import ModelConfig
from cmjax.text import read_json


@dataclasses.dataclass(frozen=True)
class FoundConfig:
    """A model's config.

    Attributes:
        name: what to call it.
        config: of the model.
        is_int8: whether its checkpoint stores its large matrices in int8.
    """

    name: str
    config: ModelConfig
    is_int8: bool


def shipped_models() -> list[str]:
    """Names that `find_config` knows without a file."""
    return sorted(file.name.removesuffix(".json") for file in _shipped().iterdir() if file.name.endswith(".json"))


def find_config(model: str) -> FoundConfig:
    """The config that `model` names: a folder with a `config.json`, such a file, or a shipped name ("deepseek-r1").

    Raises:
        UserError: there is no such thing, or it is not supported, by name.
    """
    path = Path(model)
    if model.lower() in shipped_models():
        file = Path(str(_shipped().joinpath(f"{model.lower()}.json")))
        name = model.lower()
    elif path.is_dir():
        file, name = path / "config.json", path.resolve().name
    elif path.is_file():
        file, name = path, path.stem
    else:
        raise UserError(f"model {model!r} is no folder, no file and none of {', '.join(shipped_models())}")
    hf = read_json(file)
    return FoundConfig(name, ModelConfig.from_hf(hf), isinstance(stored_format(hf), Int8Channels))


def _shipped() -> resources.abc.Traversable:
    return resources.files("cmjax.model").joinpath("configs")

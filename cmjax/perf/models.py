"""Configs of models to price: those that ship with the package, or a `config.json`."""

import json
from importlib import resources
from pathlib import Path

from cmjax.errors import UserError
from cmjax.model import ModelConfig

_SUFFIX = ".json"


def shipped() -> list[str]:
    """Names of the configs that ship with the package."""
    folder = resources.files("cmjax.model") / "configs"
    return sorted(one.name.removesuffix(_SUFFIX) for one in folder.iterdir() if one.name.endswith(_SUFFIX))


def find_config(name: str) -> ModelConfig:
    """A config by its name, or by the path of a `config.json` or of a folder that holds one.

    Raises:
        UserError: there is none; it lists the names.
    """
    if name in shipped():
        text = (resources.files("cmjax.model") / "configs" / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
        return ModelConfig.from_hf(json.loads(text))
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--model {name}: no such config; give a config.json, or one of {', '.join(shipped())}")
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{file}: holds no JSON object")
    return ModelConfig.from_hf(contents)

"""Options that several commands share, beside those made of settings."""

from collections.abc import Callable
from pathlib import Path

import click

from cmjax.cli.flags import Function
from cmjax.errors import UserError

# In a clone, where the package is installed editable, the demonstration model and its held-out text lie beside it.
_MODELS = Path(__file__).resolve().parents[2] / "models"
BUNDLED_MODEL = _MODELS / "demo"
HELDOUT = _MODELS / "data" / "heldout.jsonl"
CALIBRATION = _MODELS / "data" / "calibration.jsonl"


def model_option(function: Function) -> Function:
    """`--model`, the bundled one by default."""
    return click.option(
        "--model",
        "folder",
        default=str(BUNDLED_MODEL),
        metavar="DIR",
        help="Hugging Face folder or cmjax checkpoint.  [default: the demonstration model of a clone]",
    )(function)


def find_model(folder: str) -> Path:
    """The folder that `--model` names; a UserError where there is none, before anything is looked for in it."""
    path = Path(folder)
    if path == BUNDLED_MODEL and not path.is_dir():
        raise UserError(f"{path}: the bundled model is part of a clone of the repository; give --model")
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    return path


def count_option(
    flag: str, default: int, help: str, *, least: int = 1, most: int | None = None
) -> Callable[[Function], Function]:
    """An option of a command's own that is a number of something."""
    return click.option(flag, type=click.IntRange(min=least, max=most), default=default, show_default=True, help=help)


def data_option(default: Path, help: str) -> Callable[[Function], Function]:
    """`--data`: texts, by default those that lie beside the bundled model."""
    return click.option("--data", type=click.Path(path_type=Path), default=default, metavar="FILE", help=help)


def plot_option(function: Function) -> Function:
    """`--plot`: a picture beside the tables."""
    return click.option(
        "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the figures, as PNG or SVG."
    )(function)


def model_config_option(function: Function) -> Function:
    """`--model`, of which no weights are needed: see `cmjax.checkpoint.configs.find_config`."""
    return click.option(
        "--model",
        default="deepseek-r1",
        show_default=True,
        metavar="CONFIG",
        help="A config.json, its folder, or the name of a config that ships with the package.",
    )(function)


def json_option(function: Function) -> Function:
    """`--json`: one JSON object on standard output, nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def config_option(function: Function) -> Function:
    """`--config`: a YAML file of the command's own options."""
    return click.option(
        "--config", callback=_read_config, is_eager=True, expose_value=False, help="YAML of options and values."
    )(function)


def _read_config(context: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Take defaults from a YAML file: an option's name, with - or _, and its value; the command line comes first."""
    if path is None:
        return None
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"--config needs pip install 'cmjax[serve]' ({error})") from error
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: must hold names of options and their values")
    names = {
        option.removeprefix("--"): parameter
        for parameter in context.command.params
        for option in parameter.opts
        if option.startswith("--") and option not in ("--config", "--help")
    }
    defaults: dict[str, object] = {}
    for key, value in given.items():
        parameter = names.get(str(key).replace("_", "-"))
        if parameter is None or parameter.name is None:
            raise UserError(f"{path}: there is no option {key!r}; see {context.command_path} --help")
        if parameter.multiple and isinstance(value, str):
            value = [value]
        defaults[parameter.name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path

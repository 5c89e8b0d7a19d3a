"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cmjax.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

# In a clone, where the package is installed editable, the demonstration model and its held-out text lie beside it.
_MODELS = Path(__file__).resolve().parents[2] / "models"
BUNDLED_MODEL = _MODELS / "demo"
HELDOUT = _MODELS / "data" / "heldout.jsonl"
CALIBRATION = _MODELS / "data" / "calibration.jsonl"
CALIBRATION_SEQUENCES, CALIBRATION_LENGTH = 128, 256
SUPERNODES = ("cloudmatrix384", "cloudmatrix384-dies")


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
    """What `--model` names; a UserError where it is the bundled one, and this is no clone."""
    path = Path(folder)
    if path == BUNDLED_MODEL and not path.is_dir():
        raise UserError(f"{path}: the bundled model is part of a clone of the repository; give --model")
    return path


def instance_options(function: Function) -> Function:
    """What the instances are: the arguments of `cmjax.mesh.carve`."""
    options = (
        click.option(
            "--supernode",
            type=click.Choice(SUPERNODES),
            default=SUPERNODES[0],
            show_default=True,
            help="Machine to stand in for; with -dies, a device is one die of an NPU.",
        ),
        click.option("--ep", type=int, help="Devices of a decode instance.  [default: 320, or an equal share of all]"),
        click.option("--prefill-ep", type=int, help="Devices of a prefill instance.  [default: min(ep, 32)]"),
        click.option(
            "--prefill-instances",
            type=int,
            help="Prefill instances; 0 lets prefill share decode's devices.  [default: what fits, at most 2]",
        ),
        click.option("--decode-instances", type=int, default=1, show_default=True, help="Decode instances."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def quant_option(function: Function) -> Function:
    """`--quant`, None by default: as the checkpoint is stored."""
    return click.option(
        "--quant",
        type=click.Choice(("int8", "fake", "none", "auto")),
        help="The large products of attention and FFN: int8, the same values as floats (fake), floats (none), or int8 "
        "where it is measured to be faster (auto).  [default: what is stored]",
    )(function)


def format_options(function: Function) -> Function:
    """`--dtype`, `--quant`, `--dispatch-dtype`, `--combine-dtype`."""
    floats = ("float32", "bfloat16", "float16")
    options = (
        click.option(
            "--dtype",
            type=click.Choice(floats),
            default="float32",
            show_default=True,
            help="Of weights and activations.",
        ),
        quant_option,
        click.option(
            "--dispatch-dtype",
            type=click.Choice((*floats, "int8")),
            help="What a row is on its way to the experts.  [default: int8 for a model in int8, else as it is]",
        ),
        click.option(
            "--combine-dtype",
            type=click.Choice(floats),
            help="What a row is on its way back.  [default: bfloat16 for a model in int8, else as it is]",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def engine_options(function: Function) -> Function:
    """The settings of `cmjax.serve.EngineSettings`; an option that is not given keeps the command's default."""
    positive = click.IntRange(min=1)
    options = (
        format_options,
        click.option(
            "--max-model-len",
            type=positive,
            help="Most tokens of one request, prompt and output together.  [default: what the prompts need]",
        ),
        click.option(
            "--max-num-seqs",
            type=positive,
            help="Requests that one decode rank runs together.  [default: what the prompts need, at most 8]",
        ),
        click.option("--block-size", type=positive, default=16, show_default=True, help="Tokens of a cache block."),
        click.option(
            "--max-num-batched-tokens",
            type=positive,
            default=2048,
            show_default=True,
            help="Tokens of one prefill step of an instance; longer prompts take several.",
        ),
        click.option("--steps-per-call", type=positive, default=8, show_default=True, help="Decode steps a call."),
        click.option(
            "--mtp",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Tokens that the model's MTP module guesses ahead in each decode step.",
        ),
        click.option(
            "--microbatches",
            type=click.Choice(("1", "2", "auto")),
            default="1",
            show_default=True,
            help="Two take turns in a step, one attending while the other's rows travel; auto tries both.",
        ),
        click.option(
            "--redundant-experts",
            type=click.IntRange(min=0),
            help="Second copies of routed experts in the decode instance.  [default: what fills the ranks]",
        ),
        click.option(
            "--shared-replicas",
            type=click.IntRange(min=0),
            help="Slots of the decode instance for the shared expert.  [default: one in ten where ranks are left over]",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def sampling_options(function: Function) -> Function:
    """The fields of `cmjax.serve.SamplingParams` that say how a token is chosen."""
    options = (
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the best token."),
        click.option("--top-k", type=int, default=0, show_default=True, help="Draw from so many; 0 for all."),
        click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the best that reach it."),
        click.option("--min-p", type=float, default=0.0, show_default=True, help="Least share of the best's chance."),
        click.option("--presence-penalty", type=float, default=0.0, show_default=True, help="For tokens used before."),
        click.option("--frequency-penalty", type=float, default=0.0, show_default=True, help="For each use before."),
        click.option("--seed", type=int, help="Equal seeds give equal tokens.  [default: another one each time]"),
        click.option("--logprobs", type=int, help="Log probabilities of so many of the best tokens in --json."),
        click.option("--prompt-logprobs", type=int, help="The same for the prompt's tokens."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def json_option(function: Function) -> Function:
    """`--json`: one JSON object on standard output, nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)

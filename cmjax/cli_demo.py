"""`cmjax demo`: the whole way of a batch of prompts through 384 virtual devices, compared with a reference."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmjax.cli_generate import (
    carve_from,
    collect,
    memory_errors,
    placement_table,
    progress_bar,
    result_tables,
    settings_from,
)
from cmjax.cli_options import BUNDLED_MODEL, engine_options, instance_options, json_option
from cmjax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from cmjax.serve import GenerateResult

# A reference token that led the second best by less than this says nothing about which of the two is right.
CLEAR_MARGIN = 1e-3
OUTPUTS_SHOWN = 5
EXIT_DIFFERENT = 1


@click.command(
    epilog="""\b
    Examples:
      cmjax demo                        384 virtual devices: prefill 2 x EP32, decode EP320
      cmjax demo --ep 8 --prompts 16    a small machine
      cmjax demo --json | jq .reference
    \b
    Ends with status 1 where the tokens are not those of the reference."""
)
@click.option(
    "--model",
    "folder",
    metavar="DIR",
    help="Hugging Face folder with a reference.npz beside the weights.  [default: the one bundled with a clone]",
)
@click.option("--prompts", "num_prompts", type=click.IntRange(min=1), default=320, show_default=True, help="How many.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=24, show_default=True, help="Tokens to generate for each."
)
@click.option("--out", "out", type=Path, default=Path("out"), show_default=True, help="Folder for the picture.")
@instance_options
@engine_options
@json_option
@click.pass_context
def demo(
    context: click.Context,
    folder: str | None,
    num_prompts: int,
    max_tokens: int,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve a small DeepSeek-V3 on a virtual supernode, and compare its tokens with a reference.

    Prompts are prefilled on EP32 instances, their KV is handed over to the decode instance, and EP320 generates.
    """
    begin = time.perf_counter()
    from rich.console import Console

    from cmjax.mesh import fabric
    from cmjax.model import load
    from cmjax.serve import Engine, SamplingParams

    reference = Reference.read(find_model(folder))
    prompts = reference.prompts(num_prompts)
    pools = carve_from(options)
    model = load(reference.folder, dtype=options["dtype"])
    settings = settings_from(options, model.config, prompts, max_tokens, pools)
    load_s = time.perf_counter() - begin
    stdout, stderr = Console(file=sys.stdout), Console(stderr=True)
    with memory_errors(settings), progress_bar(stderr) as progress:
        engine = Engine(model, pools, settings=settings)
        if not as_json:
            _show_machine(engine, stdout)
        result = engine.generate(prompts, SamplingParams(max_tokens=max_tokens), progress=progress)
    traffic = fabric.books.snapshot()
    report = collect(engine, result, traffic)
    comparison = reference.compare(result)
    picture = draw(engine, result, traffic, out)
    report["timings"] |= {"load_s": load_s, "total_s": time.perf_counter() - begin}
    report |= {"reference": dataclasses.asdict(comparison), "picture": picture and str(picture)}
    if as_json:
        click.echo(json.dumps(report))
    else:
        for table in result_tables(report, OUTPUTS_SHOWN):
            stdout.print(table)
        stdout.print(comparison.sentence(), highlight=False, soft_wrap=True)
        drawn = f"Picture: {picture}" if picture else "No picture: matplotlib is missing (pip install 'cmjax[plot]')"
        stdout.print(f"{drawn}. {report['timings']['total_s']:.0f} s in all.", highlight=False, soft_wrap=True)
    if not comparison.is_equal:
        context.exit(EXIT_DIFFERENT)


def find_model(folder: str | None) -> Path:
    """The folder asked for, or the bundled one, which only a clone has."""
    path = Path(folder) if folder else BUNDLED_MODEL
    if not (path / "reference.npz").is_file():
        advice = "" if folder else " (the bundled model is part of a clone of the repository); give --model"
        raise UserError(f"{path}: no reference.npz there{advice}")
    return path


def _show_machine(engine: Any, console: Any) -> None:
    from cmjax.cli_generate import placement
    from cmjax.cli_info import collect as collect_info
    from cmjax.cli_info import topology_tables

    report = collect_info(engine.pools)
    for one, instance in zip(report["instances"], (*engine.prefill, engine.decode), strict=True):
        one["placement"] = placement(instance)
    for table in (*topology_tables(report), placement_table(report)):
        console.print(table)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Generated tokens against the reference's, counting only those whose margin is clear.

    Attributes:
        num_sequences: reference prompts, compared over all their tokens.
        num_tokens, num_equal: of those.
        num_first, num_first_equal: the other prompts, of which the reference knows the first token.
    """

    num_sequences: int
    num_tokens: int
    num_equal: int
    num_first: int
    num_first_equal: int

    @property
    def is_equal(self) -> bool:
        """Whether every token that was compared is the reference's."""
        return self.num_equal == self.num_tokens > 0 and self.num_first_equal == self.num_first

    def sentence(self) -> str:
        """What came out, for people."""
        verdict = "The generated tokens equal the reference's" if self.is_equal else "DIFFERENT from the reference"
        return (
            f"{verdict}: {self.num_equal} of {self.num_tokens} tokens of {self.num_sequences} reference sequences, and "
            f"{self.num_first_equal} of {self.num_first} first tokens of the other prompts."
        )


@dataclasses.dataclass(frozen=True)
class Reference:
    """What an independent implementation computed from the checkpoint in `folder` (see tests/data/parity/README.md)."""

    folder: Path
    input_ids: "np.ndarray"  # int32[B, S]
    logits: "np.ndarray"  # float32[B, S, V], of one forward over input_ids
    prompt: "np.ndarray"  # int32[B, P]
    generated: "np.ndarray"  # int32[B, N], greedy
    margin: "np.ndarray"  # float32[B, N], top logit minus the second

    @classmethod
    def read(cls, folder: Path) -> "Reference":
        """Read `reference.npz`."""
        import zipfile

        import numpy as np

        names = [field.name for field in dataclasses.fields(cls)][1:]
        path = folder / "reference.npz"
        try:
            with np.load(path) as stored:
                missing = [name for name in names if name not in stored]
                if missing:
                    raise UserError(f"{path}: {missing[0]} is missing")
                return cls(folder, **{name: stored[name] for name in names})
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be read: {error}") from error

    def _prefix(self, index: int) -> tuple[int, int]:
        """Row and length of a prompt beyond the reference's own: beginnings of `input_ids`, of many lengths."""
        rows, length = self.input_ids.shape
        # 7 has no divisor in common with most lengths, so that successive prompts differ and the shortest come early.
        return index % rows, 1 + (index // rows * 7) % length

    def prompts(self, count: int) -> list[list[int]]:
        """The reference's prompts, and beginnings of its sequences up to `count` in all."""
        own = [row.tolist() for row in self.prompt[:count]]
        prefixes = (self._prefix(index) for index in range(count - len(own)))
        return own + [self.input_ids[row, :length].tolist() for row, length in prefixes]

    def compare(self, result: "GenerateResult") -> Comparison:
        """Compare all tokens of the reference's prompts, and the first of the others, where the margin is clear.

        The reference's own tokens are compared up to its first close call: beyond it a row may rightly differ.
        """
        import numpy as np

        outputs = [output.token_ids for output in result.outputs]
        own = min(len(self.prompt), len(outputs))
        num_tokens = num_equal = 0
        for row in range(own):
            close = np.flatnonzero(self.margin[row] < CLEAR_MARGIN)
            stop = min(int(close[0]) if len(close) else self.margin.shape[1], len(outputs[row]))
            num_tokens += stop
            num_equal += int(np.sum(self.generated[row, :stop] == outputs[row][:stop]))
        num_first = num_first_equal = 0
        for index, output in enumerate(outputs[own:]):
            row, length = self._prefix(index)
            second, best = np.sort(self.logits[row, length - 1])[-2:]
            if best - second >= CLEAR_MARGIN:
                num_first += 1
                num_first_equal += output[0] == int(self.logits[row, length - 1].argmax())
        return Comparison(own, num_tokens, num_equal, num_first, num_first_equal)


def draw(engine: Any, result: "GenerateResult", traffic: Any, folder: Path) -> Path | None:
    """Draw the expert load and the traffic of the decode instance; None where matplotlib is missing."""
    try:
        from cmjax.cli_picture import draw_picture
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return None
    config, devices = engine.model.config, [device.id for device in engine.pools.decode[0].devices]
    sent = traffic.matrix("ub", "ragged_all_to_all")
    matrix = sent[min(devices) : max(devices) + 1, min(devices) : max(devices) + 1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kinds = rank_kinds(engine.decode.placement)
        return draw_picture(folder / "demo.png", config.moe_layer_ids, result.decode_load, matrix, kinds)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from error


def rank_kinds(placement: Any) -> dict[str, range]:
    """Which ranks hold shared replicas, routed and redundant experts, where each rank holds one expert."""
    if placement is None or placement.num_local_experts != 1:
        return {}
    routed = placement.num_shared_replicas
    redundant = routed + placement.num_routed_experts
    kinds = {"shared": range(routed), "routed": range(routed, redundant)}
    return kinds | {"redundant": range(redundant, placement.num_physical_experts)}

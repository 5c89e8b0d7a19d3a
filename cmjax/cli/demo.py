"""`cmjax demo`: the whole way of a batch of prompts through 384 virtual devices, compared with a reference."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmjax.cli.generate import collect, outputs_table, placement_table, readable, result_tables
from cmjax.cli.options import engine_options, find_model, instance_options, json_option, model_option
from cmjax.cli.running import (
    carve_from,
    find_tokenizer,
    load_from,
    memory_errors,
    progress_bar,
    seqs_per_rank,
    settings_from,
)
from cmjax.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from cmjax.model import Model
    from cmjax.serve import GenerateResult

REFERENCE = "reference.json"
# A reference token that led the second best by less than this says nothing about which of the two is right.
CLEAR_MARGIN = 1e-3
CLEAR_ROUNDED = 0.1  # of the logits' standard deviation, where activations and what travels are rounded
OUTPUTS_SHOWN = 3
EXIT_DIFFERENT = 1


@click.command(
    epilog="""\b
    Examples:
      cmjax demo                        384 virtual devices: prefill 2 x EP32, decode EP320
      cmjax demo --ep 8 --prompts 16    a small machine
      cmjax demo --json | jq .reference
    \b
    A model given with --model needs a reference.json beside the weights (scripts/make_demo_reference.py).
    A quantized model (--quant int8) is compared with itself on one device instead.
    Ends with status 1 where the tokens are not those that they are compared with."""
)
@model_option
@click.option(
    "--prompts",
    "num_prompts",
    type=click.IntRange(min=1),
    default=320,
    show_default=True,
    help="How many; beyond those of the reference, they come again.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Tokens to generate for each, at most those of the reference.",
)
@click.option("--out", "out", type=Path, default=Path("out"), show_default=True, help="Folder for the picture.")
@instance_options
@engine_options
@json_option
@click.pass_context
def demo(
    context: click.Context,
    folder: str,
    num_prompts: int,
    max_tokens: int,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Let a small DeepSeek-V3 write Python on a virtual supernode, and compare its tokens with a reference.

    Prompts are prefilled on EP32 instances, their KV is handed over to the decode instance, and EP320 generates.
    """
    begin = time.perf_counter()
    from rich.console import Console

    from cmjax.mesh import fabric
    from cmjax.serve import Engine, SamplingParams

    path = find_model(folder)
    reference = Reference.read(path)
    tokenizer = find_tokenizer(path)
    pools = carve_from(options)
    model = load_from(path, options, seqs_per_rank(options, num_prompts, pools))
    reference.check_vocabulary(model.config.vocab_size)
    expected = reference.take(num_prompts, max_tokens)
    prompts = [one.prompt_ids for one in expected]
    sampling = [SamplingParams(max_tokens=len(one.token_ids)) for one in expected]
    settings = settings_from(options, model.config, prompts, max(one.max_tokens for one in sampling), pools)
    load_s = time.perf_counter() - begin
    stdout, stderr = Console(file=sys.stdout), Console(stderr=True)
    with memory_errors(settings), progress_bar(stderr) as progress:
        engine = Engine(model, pools, settings=settings)
        if not as_json:
            _show_machine(engine, stdout)
        result = engine.generate(prompts, sampling, progress=progress)
    traffic = fabric.traffic.snapshot()
    report = collect(engine, result, traffic, tokenizer)
    generated = [output.token_ids for output in result.outputs]
    if model.quant is None:
        source, unclear = reference.source, "come after a close call"
        comparison = compare(expected, generated)
    else:
        source, unclear = f"the same model in {model.quant} on one device", "are close calls"
        comparison = compare_to_one_device(model, prompts, generated)
    picture = draw(engine, result, traffic, out)
    report["timings"] |= {"load_s": load_s, "total_s": time.perf_counter() - begin}
    report["reference"] = {"source": source, **dataclasses.asdict(comparison)}
    report["picture"] = picture and str(picture)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _show_result(report, comparison.sentence(unclear), stdout)
    if not comparison.is_equal:
        context.exit(EXIT_DIFFERENT)


# -- the comparison ---------------------------------------------------------------------------------------------------


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
    model: "Model", prompts: Sequence[Sequence[int]], generated: Sequence[Sequence[int]], batch: int = 32
) -> Comparison:
    """Compare each token with the best one that the model finds on one device after those before it.

    For a quantized model, whose tokens are not a float model's: what travels between ranks is rounded too, so only
    tokens that lead by a tenth of the logits' deviation are certain.
    """
    import numpy as np

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
        from cmjax.checkpoint import read_json

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


def _completion(entry: Any, where: str) -> Completion:
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


def _is_token_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_margin(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


# -- what is shown ----------------------------------------------------------------------------------------------------


def _show_machine(engine: Any, console: Any) -> None:
    from cmjax.cli.generate import placement
    from cmjax.cli.info import collect as collect_info
    from cmjax.cli.info import topology_tables

    report = collect_info(engine.pools)
    for one, instance in zip(report["instances"], (*engine.prefill, *engine.fleet.decode.values()), strict=True):
        one["placement"] = placement(instance)
    for table in (*topology_tables(report), placement_table(report)):
        console.print(table)


def _show_result(report: dict[str, Any], verdict: str, console: Any) -> None:
    outputs = report["outputs"]
    if "text" in outputs[0]:
        for line in completion_lines(outputs):
            console.print(line, soft_wrap=True)
    else:
        console.print(outputs_table(outputs, OUTPUTS_SHOWN))
    for table in result_tables(report):
        console.print(table)
    picture = report["picture"]
    drawn = f"Picture: {picture}" if picture else "No picture: matplotlib is missing (pip install 'cmjax[plot]')"
    source = f"Reference: {report['reference']['source']}."
    for text in (verdict, source, f"{drawn}. {report['timings']['total_s']:.0f} s in all."):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def completion_lines(outputs: Sequence[dict[str, Any]]) -> "Iterator[Text]":
    """The first completions as text: the prompt dimmed behind a bar, what was generated bright behind an angle."""
    from rich.text import Text

    shown = outputs[:OUTPUTS_SHOWN]
    yield Text(f"Generated: {len(shown)} of {len(outputs)} completions, | prompt, > continuation", style="italic")
    for output in shown:
        yield Text()
        prompt, continuation = readable(output["prompt"]), readable(output["text"])
        prompt.stylize("dim")
        continuation.stylize("bold green")
        num_prompt_lines = prompt.plain.count("\n") + 1
        for index, line in enumerate((prompt + continuation).split("\n")):
            yield Text("  | ", style="dim") + line if index < num_prompt_lines else Text("  > ", style="green") + line
    yield Text()


def draw(engine: Any, result: "GenerateResult", traffic: Any, folder: Path) -> Path | None:
    """Draw the expert load and the traffic of the decode instance; None where matplotlib is missing."""
    try:
        from cmjax.cli.picture import draw_picture
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

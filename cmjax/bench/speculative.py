"""`cmjax bench decode --mtp K`: decoding with drafts of the model's own MTP module beside decoding without."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from cmjax.bench.report import machine
from cmjax.bench.tables import define, new_table
from cmjax.errors import UserError
from cmjax.mesh import Pools, Supernode, carve
from cmjax.model import Model
from cmjax.schedule import DecodePlan, Request
from cmjax.serve import Engine, EngineSettings, SamplingParams
from cmjax.text import JsonObject

BOUNDS = {"one device, one sequence": 1.2, "320 devices, a sequence a rank": 1.0}
DEFINITIONS = {
    "ms a step": "a call of several steps over their number, the host's bookkeeping included; median of all calls",
    "tokens a step": "of one sequence, in the same calls",
    "kept": "share of the drafts that were kept in free generation; a step's first refused draft ends it",
    "forced": "teacher-forced: how often the module's first guess is the model's own choice, given the text so far, "
    "over what plain decoding wrote after the first prompts",
    "speedup": "tokens/s with drafts over tokens/s without, each the median of the rounds, which take turns",
    "bound": "tokens a step x ms a step without drafts / ms a step with them",
}
_PROMPT = 64  # tokens, where the model brings no prompts


def run(
    model: Model,
    folder: Path,
    *,
    num_drafts: int,
    ep_size: int = 1,
    batches: Sequence[int] = (1, 8, 32),
    num_steps: int = 16,
    num_calls: int = 4,
    rounds: int = 5,
) -> JsonObject:
    """Time decode with and without drafts, from the same prompts, at several batch sizes.

    Args:
        folder: the model's; prompts come from its `reference.json`, where it has one, else they are random.
        num_drafts: k.
        ep_size: devices of the decode instance.
        batches: sequences of a rank.
        num_steps, num_calls: steps of a call, and calls of a round.
        rounds: timed rounds of each form.

    Raises:
        UserError: for a model without an MTP module.
    """
    if model.params.mtp is None:
        raise UserError(f"{folder}: the model has no MTP module (num_nextn_predict_layers) to draft with")
    pools = carve(Supernode.preset("cloudmatrix384"), ep_size=ep_size, num_prefill_instances=0)
    results = []
    for batch in batches:
        prompts = _prompts(model, folder, batch * ep_size)
        plain, drafting = (
            _Run(model, pools, prompts, batch, drafts, num_steps, num_calls) for drafts in (0, num_drafts)
        )
        for _ in range(rounds + 1):
            for one in (plain, drafting):
                one.round()
        results.append(_result(model, prompts, batch, plain, drafting))
    return {
        "benchmark": "decode",
        "machine": machine(),
        "settings": {
            "num_drafts": num_drafts,
            "ep_size": ep_size,
            "num_steps": num_steps,
            "num_calls": num_calls,
            "rounds": rounds,
        },
        "results": results,
        "bounds": BOUNDS,
        "definitions": DEFINITIONS,
    }


def _prompts(model: Model, folder: Path, count: int) -> list[list[int]]:
    file = folder / "reference.json"
    if file.is_file():
        stored = [one["prompt_ids"] for one in json.loads(file.read_text(encoding="utf-8"))["completions"]]
    else:
        stored = np.random.default_rng(0).integers(0, model.config.vocab_size, (32, _PROMPT)).tolist()
    return [stored[index % len(stored)] for index in range(count)]


class _Run:
    """One form: rounds of calls that always begin after the prompts."""

    def __init__(
        self,
        model: Model,
        pools: Pools,
        prompts: list[list[int]],
        batch: int,
        num_drafts: int,
        num_steps: int,
        num_calls: int,
    ) -> None:
        # No sequence may end within a round: the batch would not be the same to its end.
        self.max_tokens = num_calls * num_steps * (num_drafts + 1) + 2
        longest = max(map(len, prompts)) + self.max_tokens
        if longest > model.config.max_position_embeddings:
            raise UserError(
                f"{num_calls} calls of {num_steps} steps may need {longest} tokens of a sequence; the model's "
                f"max_position_embeddings is {model.config.max_position_embeddings}"
            )
        settings = EngineSettings(
            max_model_len=longest,
            max_num_seqs_per_rank=batch,
            steps_per_call=num_steps,
            num_speculative_tokens=num_drafts,
        )
        self.engine = Engine(model, pools, settings=settings)
        self.prompts, self.num_steps, self.num_calls = prompts, num_steps, num_calls
        self.step_s: list[float] = []
        self.tokens_per_s: list[float] = []
        self.token_ids: list[list[int]] = []
        self.kept = np.zeros(num_drafts + 1, np.int64)

    def round(self) -> None:
        """Prefill, then time the calls; the first round compiles, and does not count."""
        scheduler, sampling = self.engine.core.scheduler, SamplingParams(max_tokens=self.max_tokens)
        requests = [
            Request(f"prompt {index}", prompt, sampling, model=self.engine.model.digest)
            for index, prompt in enumerate(self.prompts)
        ]
        self.engine.fleet.open()
        (planner,) = scheduler.decode.values()
        planner.is_patient = True
        for request in requests:
            scheduler.submit(request)
        before = planner.kept_drafts.copy(), planner.num_tokens
        seconds: list[float] = []
        while len(seconds) < self.num_calls:
            for loop in self.engine.fleet.loops:
                begin = time.perf_counter()
                if isinstance(loop.turn(patience_s=0.001), DecodePlan):
                    seconds.append(time.perf_counter() - begin)
        if self.token_ids:
            self.step_s += [one / self.num_steps for one in seconds]
            self.tokens_per_s.append((planner.num_tokens - before[1]) / sum(seconds))
            self.kept += planner.kept_drafts - before[0]
        self.token_ids = [list(request.token_ids) for request in requests]
        for request in requests:
            scheduler.cancel(request)


def _result(model: Model, prompts: list[list[int]], batch: int, plain: _Run, drafting: _Run) -> JsonObject:
    per_step = np.arange(1, len(drafting.kept) + 1)
    tokens_a_step = float(drafting.kept @ per_step / drafting.kept.sum())
    step_s = {"plain": float(np.median(plain.step_s)), "drafting": float(np.median(drafting.step_s))}
    rates = {"plain": float(np.median(plain.tokens_per_s)), "drafting": float(np.median(drafting.tokens_per_s))}
    pairs = zip(plain.token_ids, drafting.token_ids, strict=True)
    return {
        "seqs_per_rank": batch,
        "num_sequences": len(prompts),
        "step_s": step_s,
        "tokens_per_s": rates,
        "tokens_a_step": tokens_a_step,
        "kept": (tokens_a_step - 1) / (len(drafting.kept) - 1),
        "teacher_forced": _agreement(model, prompts, plain.token_ids),
        "speedup": rates["drafting"] / rates["plain"],
        "bound": tokens_a_step * step_s["plain"] / step_s["drafting"],
        "equal_sequences": sum(one == other[: len(one)] for one, other in pairs),
    }


def _agreement(model: Model, prompts: list[list[int]], token_ids: list[list[int]], most: int = 8) -> float:
    """Share of the places after the prompts where the MTP module's best token is the model's own."""
    same = total = 0
    for prompt, generated in list(zip(prompts, token_ids, strict=True))[:most]:
        ids = np.array([prompt + generated])
        chosen = np.asarray(model.logits(ids)).argmax(-1)[0, 1:]
        guesses = np.asarray(model.mtp_logits(ids)).argmax(-1)[0]
        is_after = np.arange(len(guesses)) >= len(prompt) - 1
        same, total = same + int((chosen == guesses)[is_after].sum()), total + int(is_after.sum())
    return same / total


def tables(report: JsonObject) -> list[Table]:
    """Both forms of `cmjax bench decode --mtp`."""
    settings = report["settings"]
    title = (
        f"{settings['num_drafts']} drafts a step, {settings['ep_size']} devices; "
        f"medians of {settings['rounds']} rounds of {settings['num_calls']} calls of {settings['num_steps']} steps"
    )
    columns = (
        "a rank",
        "ms a step",
        "with",
        "tokens/s",
        "with",
        "tokens a step",
        "kept",
        "forced",
        "speedup",
        "bound",
    )
    table = new_table(title, *columns, numbers_from=0)
    for row in report["results"]:
        forms = ("plain", "drafting")
        table.add_row(
            str(row["seqs_per_rank"]),
            *(f"{row['step_s'][form] * 1e3:.2f}" for form in forms),
            *(f"{row['tokens_per_s'][form]:,.0f}" for form in forms),
            f"{row['tokens_a_step']:.2f}",
            *(f"{row[name]:.0%}" for name in ("kept", "teacher_forced")),
            *(f"{row[name]:.2f}" for name in ("speedup", "bound")),
        )
    notes = {"equal": "the tokens of each form are the same in as many of the sequences: "}
    notes["equal"] += ", ".join(f"{row['equal_sequences']} of {row['num_sequences']}" for row in report["results"])
    return [define(table, report["definitions"] | notes)]

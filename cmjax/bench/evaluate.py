"""Held-out text: bits per byte beside a compressor's, next-token accuracy, MTP agreement, balance of the experts, KL
divergence from another model."""

import collections
import dataclasses
import lzma
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.table import Table

from cmjax.bench.tables import new_table, number
from cmjax.checkpoint import TextFile, Tokenizer
from cmjax.errors import UserError
from cmjax.mesh import Instance
from cmjax.model import Model, ModelConfig, placed_layer_names
from cmjax.options import check_bounds, option
from cmjax.serve import EngineSettings, Scorer, TextScores, score_together
from cmjax.text import JsonObject

# The comparison with the compressor: files of at least so many bytes, and the first so many of each.
MIN_COMPARED_BYTES = 4096
MAX_COMPARED_BYTES = 65536
MAX_DEFAULT_CONTEXT = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How much of a text is scored, and in which windows."""

    context: int | None = option(
        None,
        "Most tokens to look at together.",
        flag="--context",
        minimum=2,
        unset=f"the model's max_position_embeddings, at most {MAX_DEFAULT_CONTEXT}",
    )
    stride: int | None = option(
        None, "Tokens between the windows of a long text.", flag="--stride", minimum=1, unset="context / 2"
    )
    max_characters: int | None = option(
        None, "Only so many characters of each file.", flag="--characters", minimum=1, unset="all"
    )
    max_files: int | None = option(None, "Only so many files of each area.", flag="--files", minimum=1, unset="all")

    def __post_init__(self) -> None:
        check_bounds(self)

    def cut(self, files: Sequence[TextFile]) -> list[TextFile]:
        """The files that are wanted, and of each what is wanted."""
        taken: collections.Counter[str] = collections.Counter()
        chosen = []
        for file in files:
            if self.max_files is None or taken[file.area] < self.max_files:
                chosen.append(dataclasses.replace(file, text=file.text[: self.max_characters]))
            taken[file.area] += 1
        return chosen

    def windows(self, config: ModelConfig) -> dict[str, int]:
        """`context` and `stride` for a model of this kind."""
        context = self.context or min(config.max_position_embeddings, MAX_DEFAULT_CONTEXT)
        return {"context": context, "stride": self.stride or max(1, context // 2)}


def lzma_bytes(data: bytes) -> int:
    """Bytes that raw LZMA2 at preset 9 needs, without any container."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


@dataclasses.dataclass
class Tally:
    """Sums over tokens of any number of files."""

    files: int = 0
    num_bytes: int = 0
    tokens: int = 0
    nats: float = 0.0
    top1: int = 0
    drafts: int = 0
    draft_agrees: int = 0
    lzma_bytes: int = 0
    compared_bytes: int = 0
    compared_nats: float = 0.0
    compared_files: int = 0
    kl_nats: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        names = [field.name for field in dataclasses.fields(self)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def report(self, has_mtp: bool) -> dict[str, float | int | None]:
        """The figures, JSON-ready; None where there is nothing to divide by."""

        def share(part: float, whole: float) -> float | None:
            return part / whole if whole else None

        bits_per_nat = 1 / math.log(2)
        ours = share(self.compared_nats * bits_per_nat, self.compared_bytes)
        theirs = share(8 * self.lzma_bytes, self.compared_bytes)
        return {
            "files": self.files,
            "bytes": self.num_bytes,
            "tokens": self.tokens,
            "bits_per_byte": share(self.nats * bits_per_nat, self.num_bytes),
            "top1": share(self.top1, self.tokens),
            "mtp_agreement": share(self.draft_agrees, self.drafts) if has_mtp else None,
            "kl_divergence": share(self.kl_nats, self.tokens),
            "compared_files": self.compared_files,
            "compared_bytes": self.compared_bytes,
            "compared_bits_per_byte": ours,
            "lzma_bits_per_byte": theirs,
            "ratio_to_lzma": ours / theirs if ours is not None and theirs else None,
        }


def compared_tokens(text: str, ends: Sequence[int]) -> tuple[int, bytes]:
    """How many of a text's tokens are compared with the compressor, and their bytes; none of a short text.

    Args:
        text: whole.
        ends: where each of its tokens ends, in characters.
    """
    whole = text.encode()
    if len(whole) < MIN_COMPARED_BYTES:
        return 0, b""
    if len(whole) <= MAX_COMPARED_BYTES:
        return len(ends), whole
    prefix = whole[:MAX_COMPARED_BYTES].decode(errors="ignore")
    # The last token that ends inside, and whose character no other token goes on with.
    count = int(np.searchsorted(ends, len(prefix), side="right"))
    while count and count < len(ends) and ends[count] == ends[count - 1]:
        count -= 1
    return count, text[: ends[count - 1] if count else 0].encode()


def _tally(text: str, ends: Sequence[int], scores: TextScores, has_drafts: bool) -> Tally:
    tokens = len(ends)
    count, compared = compared_tokens(text, ends)
    return Tally(
        files=1,
        num_bytes=len(text.encode()),
        tokens=tokens,
        nats=-float(scores.logprobs.sum(dtype=np.float64)),
        top1=int(scores.is_top1.sum()),
        drafts=tokens - 1 if has_drafts else 0,
        draft_agrees=int(scores.draft_agrees.sum()),
        lzma_bytes=lzma_bytes(compared) if count else 0,
        compared_bytes=len(compared),
        compared_nats=-float(scores.logprobs[:count].sum(dtype=np.float64)),
        compared_files=int(count > 0),
        kl_nats=float(scores.kl_divergence.sum(dtype=np.float64)),
    )


def evaluate_together(
    models: Mapping[str, Model],
    tokenizer: Tokenizer,
    files: Sequence[TextFile],
    instance: Instance,
    *,
    context: int,
    stride: int,
    settings: EngineSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, JsonObject]:
    """Score held-out files on an instance, teacher-forced, at every token of every file, with each model.

    Args:
        models: by name; the first is the reference of the others' KL divergence.
        tokenizer: of them all.
        files: what to score.
        instance: devices of any number.
        context, stride: see `Scorer`.
        settings: sizes and formats.
        progress: called with (tokens done, tokens in all), first with none done.

    Returns:
        For each model: `areas` (by name), `all` (every token alike), `area_mean` (every area alike), each with the
        fields of `Tally.report`, and `expert_balance`: the busiest expert's rows over the mean, for each MoE layer.

    Raises:
        UserError: a tokenizer that is not the models', a context they cannot take.
    """
    for model in models.values():
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {model.config.vocab_size}"
            )
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise UserError("tokenizer_config.json names neither bos_token nor eos_token for the first token to follow")
    encoded = [tokenizer.encode_with_ends(file.text) for file in files]
    scorers = {
        name: Scorer(model, instance, context=context, stride=stride, settings=settings)
        for name, model in models.items()
    }
    total, done = sum(len(ids) for ids, _ in encoded), 0

    def notify(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    notify(0)
    scores = score_together(list(scorers.values()), [[bos, *ids] for ids, _ in encoded], notify)
    ends = [ends for _, ends in encoded]
    return {
        name: _report(models[name], files, ends, own, scorer.expert_load())
        for (name, scorer), own in zip(scorers.items(), scores, strict=True)
    }


def _report(
    model: Model,
    files: Sequence[TextFile],
    ends: Sequence[Sequence[int]],
    scores: Sequence[TextScores],
    load: np.ndarray,
) -> JsonObject:
    has_mtp = model.params.mtp is not None
    areas: dict[str, Tally] = {}
    for file, own_ends, one in zip(files, ends, scores, strict=True):
        areas[file.area] = areas.get(file.area, Tally()) + _tally(file.text, own_ends, one, has_mtp)
    reports = {area: areas[area].report(has_mtp) for area in sorted(areas)}
    return {
        "areas": reports,
        "all": sum(areas.values(), Tally()).report(has_mtp),
        "area_mean": {name: _mean([report[name] for report in reports.values()]) for name in _AVERAGED},
        "expert_balance": _balance(load, model),
    }


_AVERAGED = (
    "bits_per_byte",
    "top1",
    "mtp_agreement",
    "kl_divergence",
    "compared_bits_per_byte",
    "lzma_bits_per_byte",
    "ratio_to_lzma",
)


def _mean(values: Sequence[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _balance(load: np.ndarray, model: Model) -> dict[str, float]:
    names = placed_layer_names(model.config)
    return {name: float(rows.max() / max(rows.mean(), 1e-9)) for name, rows in zip(names, load, strict=True)}


def tables(report: JsonObject) -> list[Table]:
    """The figures of one model by area; `report` also says `context` and `ep_size`."""
    columns = ("area", "KB", "bits/byte", "top-1 %", "MTP %", "compared", "LZMA", "ratio")
    table = new_table(f"Held-out text, context {report['context']}, EP{report['ep_size']}", *columns, numbers_from=1)
    for name, row in [*report["areas"].items(), ("mean of areas", report["area_mean"]), ("all", report["all"])]:
        if name == "mean of areas":
            table.add_section()
        table.add_row(
            name,
            number(row.get("bytes"), "{:,.0f}", 1e-3),
            number(row["bits_per_byte"], "{:.3f}"),
            number(row["top1"], "{:.1f}", 100),
            number(row["mtp_agreement"], "{:.1f}", 100),
            number(row["compared_bits_per_byte"], "{:.3f}"),
            number(row["lzma_bits_per_byte"], "{:.3f}"),
            number(row["ratio_to_lzma"], "{:.3f}"),
        )
    return [table]

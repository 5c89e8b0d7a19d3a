"""Measured points of decode, one a line of a CSV file: what would the model have said?

Two forms, told apart by their columns:

- of GPUs (`system`, `backend`, `precision`, `isl`, `osl`, `decode`, `running_per_gpu`, `tpot_ms`), where `decode` reads
  `5x(TP1 DP8 EP8)`: instances and their layout;
- of Ascend (`dies`, `ep`, `dp`, `batch`, `context`, `drafts`, `acceptance`, `balance`): batch is of a die, `acceptance`
  of a draft, `balance` the busiest die's expert rows over the mean; empty cells take the machine's. Optional: `id`,
  `hardware` (ascend-910), `microbatches` (the faster of 1 and 2), `shared_replicas`, `tpot_ms` (what was measured).
"""

import csv
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from cmjax.errors import UserError
from cmjax.model import ModelConfig
from cmjax.perf.hardware import Hardware, hardware, names
from cmjax.perf.layout import MOST_BATCH, MOST_RANKS, Layout
from cmjax.perf.price import Format, Pricing, StepPrice, check_fits, price
from cmjax.text import JsonObject

_GPU = ("system", "backend", "precision", "isl", "osl", "decode", "running_per_gpu")
_ASCEND = ("dies", "ep", "dp", "batch", "context", "drafts", "acceptance", "balance")
_LAYOUT = re.compile(r"(\d{1,9})x\(TP(\d{1,9}) DP(\d{1,9}) EP(\d{1,9})\)")
# Other names of columns, and of precisions.
_ALIASES = {"batch_per_die": "batch", "batch_a_die": "batch", "ctx": "context", "kv_len": "context", "mtp": "drafts"}
_PRECISIONS = {"nvfp4": "fp4", "fp8_block": "fp8", "bfloat16": "bf16"}
# Far above any measurement, so that nonsense is refused before anything is sized by it.
_MOST_DIES, _MOST_CONTEXT, _MOST_SLOTS, _MOST_DRAFTS, _MOST_MS = 65_536, 10**7, 65_536, 16, 1e9
NOT_RUN = "the engine has attention data-parallel and experts expert-parallel over the same devices, and nothing else"

Row = tuple[int, Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class _Point:
    """What a line asks for: a step, the tokens that it gives a request, and whether its microbatches are given."""

    layout: Layout
    machine: Hardware
    pricing: Pricing
    tokens: float
    is_fixed: bool


def read(path: Path) -> list[Row]:
    """The lines of a file, each with its number there; UserError where it is of neither form."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            rows: list[Row] = [(reader.line_num, _named(row)) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from error
    columns = set(rows[0][1]) if rows else set()
    if not rows:
        raise UserError(f"{path}: holds no line of data")
    if not (set(_GPU) <= columns or set(_ASCEND) <= columns):
        raise UserError(
            f"{path}: has the columns {', '.join(sorted(columns))}; give {', '.join(_GPU)}, or {', '.join(_ASCEND)}"
        )
    return rows


def _named(row: Mapping[str | None, Any]) -> dict[str, str]:
    """A line under the names of this page; cells beyond the header are dropped, those that are missing are empty."""
    cells = ((str(name).strip().lower().replace(" ", "_"), value) for name, value in row.items() if name is not None)
    return {_ALIASES.get(name, name): (value or "").strip() for name, value in cells}


def predict(rows: Iterable[Row], config: ModelConfig, source: str) -> list[JsonObject]:
    """One result a line: id, group, published and predicted TPOT in ms (None where there is none), error, reason.

    A cell that is broken is a UserError, which names the line; what we do not price is a result with a reason.
    """
    results = []
    for number, row in rows:
        where = f"{source}, line {number}"
        try:
            results.append({"label": row.get("id") or where, "unit": "ms TPOT"} | _predicted(row, config))
        except UserError as error:  # the only place that says where
            raise UserError(f"{where}: {error}") from error
    return results


def _predicted(row: Mapping[str, str], config: ModelConfig) -> JsonObject:
    published = _number(row, "tpot_ms", 0, _MOST_MS, is_above=True) if row.get("tpot_ms") else None
    result: JsonObject = {"published": published, "predicted": None, "error": None, "reason": ""}
    # A file has one form, but may have more columns than it needs.
    found = _gpu_point(row, config) if "system" in row else _ascend_point(row, config)
    if isinstance(found, str):
        return result | {"reason": found}
    try:
        step = faster(found.layout, found.machine, found.pricing, found.is_fixed)
    except UserError as error:
        return result | {"reason": str(error)}
    predicted = step.seconds * 1e3 / found.tokens
    off = None if published is None else predicted / published - 1
    reason = _misfit(found.layout, found.machine, step)
    return result | {"predicted": predicted, "error": off, "reason": reason}


def _misfit(layout: Layout, machine: Hardware, step: StepPrice) -> str:
    """Why the memory model has no place for it; who measured it had, so that it is priced all the same."""
    try:
        check_fits(layout, machine, step.memory)
    except UserError as error:
        return f"by our model of the memory it does not fit: {error}"
    return ""


def faster(layout: Layout, machine: Hardware, pricing: Pricing, is_fixed: bool = False) -> StepPrice:
    """The step as it is laid out or, unless that is fixed, in two microbatches where that is faster."""
    first = price(layout, machine, pricing)
    if is_fixed or layout.microbatches == 2 or layout.batch % 2:
        return first
    second = price(dataclasses.replace(layout, microbatches=2), machine, pricing)
    return min(first, second, key=lambda found: found.seconds)


def _gpu_point(row: Mapping[str, str], config: ModelConfig) -> _Point | str:
    """The point, or why it is not priced."""
    found = _LAYOUT.fullmatch(row["decode"])
    if not found:
        raise UserError(f"decode {row['decode']!r} does not read like 5x(TP1 DP8 EP8)")
    sizes = dict(zip(("instances", "TP", "DP", "EP"), found.groups(), strict=True))
    _, tp, dp, ep = (_count(sizes, name, 1, _MOST_DIES if name == "instances" else MOST_RANKS) for name in sizes)
    context = _count(row, "isl", 1, _MOST_CONTEXT) + _count(row, "osl", 1, _MOST_CONTEXT) / 2
    batch = max(1, round(_number(row, "running_per_gpu", 0, MOST_BATCH, is_above=True)))  # a mean over time
    redundant = max(0, _count(row, "eplb_slots", 0, _MOST_SLOTS, default=0) - config.num_routed_experts)
    system, precision = row["system"].lower().removesuffix("_sxm"), row["precision"].lower()
    precision = _PRECISIONS.get(precision, precision)
    if system not in names():
        return f"system {row['system']!r} is unknown; there are {', '.join(names())}"
    if precision not in get_args(Format):
        return f"precision {row['precision']!r} is unknown; there are {', '.join(get_args(Format))}"
    if tp != 1 or dp != ep:
        return NOT_RUN
    # SGLang's recipes for FP8 weights keep cache and core attention in bfloat16; the others have them in FP8.
    is_wide = precision == "bf16" or (row["backend"].lower() == "sglang" and precision == "fp8")
    pricing = Pricing(format=cast(Format, precision), cache_itemsize=2 if is_wide else 1, check_memory=False)
    machine = hardware(system)
    layout = Layout(
        config=config, phase="decode", ep_size=ep, batch=batch, context=context, balance=machine.balance,
        quant=None if precision == "bf16" else "int8",
        num_redundant_experts=-(-(config.num_routed_experts + redundant) // ep) * ep - config.num_routed_experts,
        num_shared_replicas=0,
    )  # fmt: skip
    return _Point(layout, machine, pricing, 1.0, is_fixed=True)


def _ascend_point(row: Mapping[str, str], config: ModelConfig) -> _Point | str:
    """The point, or why it is not priced."""
    dies, ep, dp = (
        _count(row, "dies", 1, _MOST_DIES),
        _count(row, "ep", 1, MOST_RANKS),
        _count(row, "dp", 1, MOST_RANKS),
    )
    batch, drafts = _count(row, "batch", 1, MOST_BATCH), _count(row, "drafts", 0, _MOST_DRAFTS, default=0)
    context = _number(row, "context", 0, _MOST_CONTEXT, is_above=True)
    acceptance = _number(row, "acceptance", 0, 1, default=0.7)
    microbatches = _count(row, "microbatches", 1, 2, default=1)
    replicas = _count(row, "shared_replicas", 0, MOST_RANKS) if row.get("shared_replicas") else None
    balance = _number(row, "balance", 1, 100) if row.get("balance") else None
    name = (row.get("hardware") or "ascend-910").lower()
    if name not in names():
        return f"hardware {row['hardware']!r} is unknown; there are {', '.join(names())}"
    if dp != ep or dies % ep:
        return NOT_RUN
    machine = hardware(name)
    layout = Layout(
        config=config, phase="decode", ep_size=ep, batch=batch, context=context, drafts=drafts,
        microbatches=microbatches, balance=machine.balance if balance is None else balance,
        num_shared_replicas=replicas,
    )  # fmt: skip
    pricing = Pricing(check_memory=False)
    return _Point(layout, machine, pricing, tokens_a_step(drafts, acceptance), bool(row.get("microbatches")))


def tokens_a_step(drafts: int, acceptance: float) -> float:
    """Tokens that a decode step gives a request, each draft kept with this probability if those before it were."""
    return sum(acceptance**count for count in range(drafts + 1))


def _count(row: Mapping[str, str], name: str, least: int, most: int, default: int | None = None) -> int:
    """A cell that counts something."""
    value = _number(row, name, least, most, default)
    if value != int(value):
        raise UserError(f"{name} {row[name]} is no whole number")
    return int(value)


def _number(
    row: Mapping[str, str], name: str, least: float, most: float, default: float | None = None, is_above: bool = False
) -> float:
    """A cell from `least` (above it, where `is_above`) to `most`; `default`, where there is one, if it is empty."""
    text = row.get(name) or ""
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"{name} {text[:40]!r} is no number") from error
    if not least <= value <= most or (is_above and value == least):
        raise UserError(f"{name} {text[:40]} is not {'above' if is_above else 'from'} {least:g} to {most:,.10g}")
    return value

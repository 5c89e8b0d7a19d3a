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
from typing import Any

from cmjax.errors import UserError
from cmjax.model import ModelConfig
from cmjax.perf.hardware import Hardware, hardware
from cmjax.perf.layout import Layout
from cmjax.perf.price import Format, Pricing, StepPrice, price

_GPU = ("system", "backend", "precision", "isl", "osl", "decode", "running_per_gpu")
_ASCEND = ("dies", "ep", "dp", "batch", "context", "drafts", "acceptance", "balance")
_LAYOUT = re.compile(r"(\d+)x\(TP(\d+) DP(\d+) EP(\d+)\)")
# Other names of columns.
_ALIASES = {"batch_per_die": "batch", "batch_a_die": "batch", "ctx": "context", "kv_len": "context", "mtp": "drafts"}
NOT_RUN = "the engine has attention data-parallel and experts expert-parallel over the same devices, and nothing else"


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a file; UserError where it is of neither form."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [_named(row) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from error
    columns = set(rows[0]) if rows else set()
    if not rows:
        raise UserError(f"{path}: holds no line of data")
    if not (set(_GPU) <= columns or set(_ASCEND) <= columns):
        raise UserError(
            f"{path}: has the columns {', '.join(sorted(columns))}; give {', '.join(_GPU)}, or {', '.join(_ASCEND)}"
        )
    return rows


def _named(row: Mapping[str | None, Any]) -> dict[str, str]:
    """A line under the names of this page; cells beyond the header are dropped, those that are missing are empty."""
    names = ((str(name).strip().lower().replace(" ", "_"), value) for name, value in row.items() if name is not None)
    return {_ALIASES.get(name, name): (value or "").strip() for name, value in names}


def predict(rows: Iterable[Mapping[str, str]], config: ModelConfig, source: str) -> list[dict[str, Any]]:
    """One result a line: id, group, published and predicted TPOT in ms (None where there is none), error, reason."""
    return [_predicted(row, config, f"{source}, line {number}") for number, row in enumerate(rows, 2)]


def _predicted(row: Mapping[str, str], config: ModelConfig, where: str) -> dict[str, Any]:
    result: dict[str, Any] = {"label": row.get("id") or where, "unit": "ms TPOT", "reason": "", "predicted": None}
    result["published"] = _number(row, "tpot_ms", where) if row.get("tpot_ms") else None
    if "system" in row:
        machine, layout, pricing, tokens = _gpu_point(row, config, where)
    else:
        machine, layout, pricing, tokens = _ascend_point(row, config, where)
    if layout is None:
        return result | {"reason": NOT_RUN, "error": None}
    try:
        found = faster(layout, machine, pricing, bool(row.get("microbatches")) or "system" in row)
    except UserError as error:
        return result | {"reason": str(error), "error": None}
    predicted = found.seconds * 1e3 / tokens
    published = result["published"]
    off = None if published is None else predicted / published - 1
    return result | {"predicted": predicted, "error": off}


def faster(layout: Layout, machine: Hardware, pricing: Pricing, is_fixed: bool = False) -> StepPrice:
    """The step as it is laid out or, unless that is fixed, in two microbatches where that is faster."""
    first = price(layout, machine, pricing)
    if is_fixed or layout.microbatches == 2 or layout.batch % 2:
        return first
    second = price(dataclasses.replace(layout, microbatches=2), machine, pricing)
    return min(first, second, key=lambda found: found.seconds)


def _gpu_point(
    row: Mapping[str, str], config: ModelConfig, where: str
) -> tuple[Hardware, Layout | None, Pricing, float]:
    found = _LAYOUT.fullmatch((row["decode"] or "").strip())
    if not found:
        raise UserError(f"{where}: decode {row['decode']!r} does not read like 5x(TP1 DP8 EP8)")
    _, tp, dp, ep = map(int, found.groups())
    machine = hardware(row["system"].removesuffix("_sxm"))
    formats: dict[str, Format] = {"fp8": "fp8", "fp4": "fp4", "int8": "int8"}
    if row["precision"] not in formats:
        raise UserError(f"{where}: precision {row['precision']!r} is not one of {', '.join(formats)}")
    # SGLang's recipes for FP8 weights keep cache and core attention in bfloat16; the others have them in FP8.
    is_wide = row["backend"] == "sglang" and row["precision"] == "fp8"
    pricing = Pricing(format=formats[row["precision"]], cache_itemsize=2 if is_wide else 1, check_memory=False)
    context = _number(row, "isl", where) + _number(row, "osl", where) / 2
    batch = max(1, round(_number(row, "running_per_gpu", where)))
    if tp != 1 or dp != ep:
        return machine, None, pricing, 1.0
    slots = row.get("eplb_slots") or "0"
    redundant = max(0, int(_to_number(slots, "eplb_slots", where)) - config.num_routed_experts)
    layout = Layout(
        config=config, phase="decode", ep_size=ep, batch=batch, context=context, balance=machine.balance,
        num_redundant_experts=-(-(config.num_routed_experts + redundant) // ep) * ep - config.num_routed_experts,
        num_shared_replicas=0,
    )  # fmt: skip
    return machine, layout, pricing, 1.0


def _ascend_point(
    row: Mapping[str, str], config: ModelConfig, where: str
) -> tuple[Hardware, Layout | None, Pricing, float]:
    machine = hardware(row.get("hardware") or "ascend-910")
    dies, ep, dp = (int(_number(row, name, where)) for name in ("dies", "ep", "dp"))
    if dp != ep or dies % ep:
        return machine, None, Pricing(), 1.0
    drafts = int(_number(row, "drafts", where, 0))
    acceptance = _number(row, "acceptance", where, 0.7)
    if not 0 <= acceptance <= 1:
        raise UserError(f"{where}: acceptance {acceptance:g} is not from 0 to 1")
    try:
        layout = Layout(
            config=config,
            phase="decode",
            ep_size=ep,
            batch=max(1, round(_number(row, "batch", where))),
            context=_number(row, "context", where),
            drafts=drafts,
            microbatches=int(_number(row, "microbatches", where, 1)),
            balance=_number(row, "balance", where, machine.balance),
            num_shared_replicas=int(row["shared_replicas"]) if row.get("shared_replicas") else None,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return machine, layout, Pricing(), tokens_a_step(drafts, acceptance)


def tokens_a_step(drafts: int, acceptance: float) -> float:
    """Tokens that a decode step gives a request, each draft kept with this probability if those before it were."""
    return sum(acceptance**count for count in range(drafts + 1))


def _number(row: Mapping[str, str], name: str, where: str, default: float | None = None) -> float:
    text = (row.get(name) or "").strip()
    if not text and default is not None:
        return default
    return _to_number(text, name, where)


def _to_number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"{where}: {name} {text!r} is no number") from error
    if not 0 <= value < float("inf"):
        raise UserError(f"{where}: {name} {text} is no number from 0 on")
    return value

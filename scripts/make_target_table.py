"""Compile the matrix of steps for accelerators that are not here, and write its table into docs/targets.md.

Decode and prefill, bfloat16 and int8, one and two microbatches, without and with a draft, at EP32, EP256 and EP320, for
a TPU and a GPU, each with the paper's batch or the largest below it that fits. Takes about an hour on two cores:

  make targets
  python scripts/make_target_table.py --targets v5p --ep 320 --results /tmp/targets.json

What has been compiled is kept in the file of --results: a run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax

from cmjax.bench.report import commit
from cmjax.checkpoint.configs import find_config
from cmjax.errors import UserError
from cmjax.targets import StepReport, StepRequest, compile_apart
from cmjax.targets.advice import share_that_fits

PAGE = Path(__file__).parents[1] / "docs" / "targets.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
GIB = 2**30
# The paper's: 96 tokens a die in decode, 16,384 tokens in a prefill step, 4,096 tokens of context.
SEQUENCES, TOKENS, CONTEXT = 96, 16_384, 4_096
ATTEMPTS = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """One step of the matrix, at the batch that it was compiled with last."""

    request: StepRequest
    report: StepReport
    first: StepReport  # at the paper's batch


def requests(model: str, targets: list[str], sizes: list[int]) -> list[StepRequest]:
    """All of them, the paper's batch."""
    config = find_config(model).config.to_hf()
    found = []
    for target, ep_size, quant, microbatches in itertools.product(targets, sizes, (None, "int8"), (1, 2)):
        common = {
            "max_model_len": CONTEXT,
            "block_size": 128,
            "steps_per_call": 1,
            "max_num_batched_tokens": TOKENS,
            "microbatches": microbatches,
        }
        for drafts in (0, 1):
            # A draft is one of the tokens of the batch.
            settings = common | {
                "max_num_seqs_per_rank": SEQUENCES // (1 + drafts),
                "num_speculative_tokens": drafts,
            }
            found.append(StepRequest(target, "decode", ep_size, config, settings, quant=quant))
        found.append(StepRequest(target, "prefill", ep_size, config, common, quant=quant))
    return found


def compile_row(request: StepRequest) -> Row:
    """Compile it, with a smaller batch where it does not fit."""
    first = report = compile_apart(request)
    key = "max_num_seqs_per_rank" if request.role == "decode" else "max_num_batched_tokens"
    unit = 2 if request.role == "decode" else 2 * request.ep_size
    for _ in range(ATTEMPTS):
        batch = request.settings[key]
        if report.status != "too large" or report.total is None or report.memory is None:
            break
        smaller = int(batch * min(share_that_fits(report), 0.95)) // unit * unit
        if smaller < unit:
            break
        request = dataclasses.replace(request, settings=request.settings | {key: smaller})
        report = compile_apart(request)
    return Row(request, report, first)


def read_row(kept: dict[str, Any]) -> Row:
    """As it was written down."""
    request, report, first = kept["request"], kept["report"], kept["first"]
    return Row(StepRequest(**request), StepReport(**report), StepReport(**first))


def line(row: Row) -> str:
    """Of the table."""
    request, report, settings = row.request, row.report, row.request.settings
    batch = settings["max_num_seqs_per_rank"] if request.role == "decode" else report.tokens
    cells = [
        request.target,
        request.role,
        str(request.ep_size),
        request.quant or request.dtype,
        str(settings["microbatches"]),
        str(settings.get("num_speculative_tokens", 0)) if request.role == "decode" else "",
    ]
    sizes = (report.weights, report.cache, report.exchange, report.temporaries, report.total)
    if report.status == "ok":
        cells += [f"{batch:,}", *(f"{size / GIB:.1f}" for size in sizes)]
        cells.append("-" if report.estimate_s is None else f"{report.estimate_s * 1e3:.0f} ms")
        cells.append("" if row.first.status == "ok" else f"paper's batch {short(row.first)}")
    else:
        cells += ["none", *["-"] * 6, short(row.first)]
    return f"| {' | '.join(cells)} |"


def short(report: StepReport) -> str:
    """Why it does not serve."""
    return (report.reason or report.status).replace("|", "/")


def table(rows: list[Row]) -> str:
    """All, in Markdown."""
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row.report.versions
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    num_ok = sum(row.report.status == "ok" for row in rows)
    head = (
        f"{datetime.date.today():%-d %B %Y}, {listed}: {num_ok} of {len(rows)} compile and fit. Sizes in GiB a device; "
        "`temporaries` hold the exchange buffers.\n\n"
        "| target | step | EP | weights in | microbatches | drafts | batch | weights | cache | exchange | "
        "temporaries | total | XLA | |\n|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|\n"
    )
    return head + "\n".join(map(line, rows)) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-r1")
    parser.add_argument("--targets", default="v5p,h100", help="with commas between them")
    parser.add_argument("--ep", default="32,256,320", help="with commas between them")
    parser.add_argument("--results", type=Path, default=Path("out/targets.json"), help="a JSON file")
    options = parser.parse_args()
    wanted = requests(options.model, options.targets.split(","), [int(size) for size in options.ep.split(",")])
    keys: list[str] = []
    kept = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    for number, request in enumerate(wanted, 1):
        # Of other versions it would be another program.
        key = json.dumps([dataclasses.asdict(request), jax.__version__, commit()], sort_keys=True)
        keys.append(key)
        if key not in kept:
            kept[key] = dataclasses.asdict(compile_row(request))
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(kept), encoding="utf-8")
        print(f"{number} of {len(wanted)} {line(read_row(kept[key]))}", file=sys.stderr, flush=True)
    rows = [read_row(kept[key]) for key in keys]
    rows.sort(key=lambda row: (row.request.target, row.request.role, row.request.ep_size))
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0 if all(row.report.status in ("ok", "too large") for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))

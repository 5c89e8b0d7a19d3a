"""Pictures of what was simulated; matplotlib (`cmjax[plot]`) is needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmjax.errors import UserError
from cmjax.perf.plan import Candidate


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot needs pip install 'cmjax[plot]' ({error})") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from error
    return path


def comparison(report: Mapping[str, Any], path: Path) -> Path:
    """Predicted over published of each end-to-end row."""
    rows = [row for row in report["rows"] if row["error"] is not None and row["end_to_end"]]
    figure = _figure(11, 2 + 0.2 * len(rows))
    axes = figure.subplots()
    for is_paper, color, name in ((True, "tab:red", "the paper"), (False, "tab:blue", "other systems")):
        at = [index for index, row in enumerate(rows) if row["paper"] is is_paper]
        axes.barh(at, [100 * rows[index]["error"] for index in at], color=color, label=name)
    axes.set_yticks(range(len(rows)), [row["label"][:70] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvspan(-12, 12, color="0.9", zorder=0)
    axes.set_xlim(-60, 60)
    axes.set_xlabel("predicted over published, % (gray: 12; longer bars are cut)")
    axes.legend(loc="lower right")
    return _save(figure, path)


def points(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Predicted against measured TPOT."""
    pairs = [(one["published"], one["predicted"]) for one in results if one["predicted"] and one["published"]]
    if not pairs:
        raise UserError("--plot: no point has both a measured and a predicted TPOT")
    figure = _figure(6, 6)
    axes = figure.subplots()
    longest = max(max(pair) for pair in pairs) * 1.1
    axes.plot([0, longest], [0, longest], color="0.5", linewidth=0.8)
    axes.fill_between([0, longest], [0, longest * 0.85], [0, longest * 1.15], color="0.9", label="15 %")
    axes.scatter(*zip(*pairs, strict=True), s=16, color="tab:red", zorder=3)
    axes.set_xlabel("measured TPOT, ms")
    axes.set_ylabel("predicted TPOT, ms")
    axes.legend()
    return _save(figure, path)


def front(decode: Sequence[Candidate], prefill: Sequence[Candidate], path: Path) -> Path:
    """The Pareto fronts of a plan: throughput of a device against latency."""
    figure = _figure(11, 4.5)
    for axes, candidates, what in zip(figure.subplots(1, 2), (decode, prefill), ("TPOT", "TTFT"), strict=True):
        axes.plot([c.latency_s * 1e3 for c in candidates], [c.tokens_per_s for c in candidates], "o-", markersize=4)
        for one in candidates[:: max(1, len(candidates) // 8)]:
            label = f"EP{one.layout.ep_size} x{one.layout.batch}"
            axes.annotate(
                label, (one.latency_s * 1e3, one.tokens_per_s), fontsize=7, textcoords="offset points", xytext=(4, -8)
            )
        axes.set_xlabel(f"{what}, ms")
        axes.set_ylabel("tokens/s of a device")
        axes.grid(alpha=0.3)
    return _save(figure, path)


def what_if(result: Mapping[str, Any], path: Path) -> Path:
    """The columns that a what-if names, over its rows."""
    x, series = result["plot"]
    columns, rows = result["columns"], result["rows"]
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    group = columns.index("machine") if "machine" in columns else None
    names = [None] if group is None else list(dict.fromkeys(row[group] for row in rows))
    for column in series:
        for name in names:
            chosen = [row for row in rows if group is None or row[group] == name]
            at = [str(row[columns.index(x)]) for row in chosen]
            axes.plot(at, [row[columns.index(column)] for row in chosen], "o-", label=name or column)
    axes.set_xlabel(x)
    axes.set_ylabel(", ".join(series))
    axes.set_title(result["title"], fontsize=9)
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, path)

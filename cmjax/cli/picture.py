"""The picture that `cmjax demo` draws: expert load by layer, and who sent how much to whom."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

MAX_BAR_LAYERS = 4


def draw_picture(
    path: Path, moe_layer_ids: Sequence[int], load: np.ndarray, sent: np.ndarray, kinds: Mapping[str, range]
) -> Path:
    """Save the picture as PNG.

    Args:
        moe_layer_ids: layer numbers of the first rows of `load`; one more row is the MTP module's.
        load: `int64[moe layers, routed experts]`, rows by expert.
        sent: `int64[ranks, ranks]`, bytes from each rank (first axis) to each other.
        kinds: what the ranks hold, marked along the axes: name -> ranks.
    """
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(13, 6), layout="constrained")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.1, 1))[0]
        shown = layers_shown(len(moe_layer_ids))
        if shown:
            panels = left.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
            for panel, index in zip(panels, shown, strict=True):
                _draw_load(panel, moe_layer_ids[index], load[index])
            panels[-1].set_xlabel("routed expert")
        title = f"Decode: rows that each expert received (EP{len(sent)})"
        left.suptitle("\n".join(line for line in (title, left_out(moe_layer_ids, load)) if line))
        _draw_traffic(right, right.subplots(), sent, kinds)
        figure.savefig(path, dpi=120)
    return path


def layers_shown(num_layers: int) -> list[int]:
    """Which of the layers have a panel: where they are too many, some at equal distances, the last one among them."""
    return sorted({int(index) for index in np.linspace(num_layers - 1, 0, min(num_layers, MAX_BAR_LAYERS))})


def left_out(moe_layer_ids: Sequence[int], load: np.ndarray) -> str:
    """What received rows and has no panel, in words; "" where nothing has been left out. The arguments are those of
    `draw_picture`."""
    shown = layers_shown(len(moe_layer_ids))
    hidden = [layer_id for index, layer_id in enumerate(moe_layer_ids) if index not in shown and load[index].any()]
    parts = [f"{'layers' if len(hidden) > 1 else 'layer'} {_spans(hidden)}"] if hidden else []
    parts += ["the MTP module's"] if load[len(moe_layer_ids) :].any() else []
    return f"not shown: {' and '.join(parts)}" if parts else ""


def _spans(numbers: Sequence[int]) -> str:
    """Numbers that rise, as `4-6, 8`."""
    found = ""
    for number, before, after in zip(numbers, [None, *numbers], [*numbers[1:], None], strict=False):
        if before is None or number != before + 1:
            found += f"{', ' if found else ''}{number}"
        elif after != number + 1:
            found += f"-{number}"
    return found


def _draw_load(axes: Axes, layer_id: int, rows: np.ndarray) -> None:
    axes.bar(np.arange(len(rows)), rows, width=1.0, color="tab:blue")
    axes.axhline(rows.mean(), color="tab:red", linestyle="--", linewidth=1, label=f"mean {rows.mean():.1f}")
    axes.set_title(f"layer {layer_id}: busiest {rows.max()} = {rows.max() / max(rows.mean(), 1e-9):.1f} x mean")
    axes.set_ylabel("rows")
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.legend(loc="upper right")


def _draw_traffic(figure: Figure, axes: Axes, sent: np.ndarray, kinds: Mapping[str, range]) -> None:
    kilobytes = sent / 1e3
    shown = np.where(sent > 0, kilobytes, np.nan)
    axes.set_facecolor("0.92")
    if np.isfinite(shown).any():
        low, high = np.nanmin(shown), np.nanmax(shown)
        image = axes.imshow(shown, norm=LogNorm(low, max(high, low * 1.01)), cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axes, label="kB, logarithmic (gray: none)", shrink=0.8)
    spans = [f"{ranks[0]}-{ranks[-1]} {kind}" for kind, ranks in kinds.items() if len(ranks)]
    for ranks in kinds.values():
        if ranks.start:
            axes.axhline(ranks.start - 0.5, color="0.4", linewidth=0.6)
            axes.axvline(ranks.start - 0.5, color="0.4", linewidth=0.6)
    axes.set_xlabel("destination rank" + (f"  (experts held: {', '.join(spans)})" if spans else ""))
    axes.set_ylabel("source rank")
    axes.set_title("Decode: dispatch and combine, source x destination")

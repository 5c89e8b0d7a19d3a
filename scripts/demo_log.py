"""The curve of a training: its log file, what it tells people meanwhile, and its picture."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def write_whole(path: Path, text: str) -> None:
    """Write a file that is as it was or as it should be, whenever the process is killed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


class Log:
    """The curve: one JSON object a line, and the same for people on standard output."""

    def __init__(self, path: Path, steps: int, tokens_per_step: int, bytes_per_token: float, first_step: int) -> None:
        self.path, self.steps, self.tokens_per_step = path, steps, tokens_per_step
        self.bytes_per_token = bytes_per_token
        # What came after the checkpoint is done again.
        kept = [row for row in self.rows() if row["step"] <= first_step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.begin = self.window = time.perf_counter()
        self.step = self.window_step = first_step
        self.reports: list[dict[str, Any]] = []

    def rows(self) -> list[dict[str, float]]:
        """Every row so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def add(self, report: dict[str, Any]) -> None:
        """Take in what the next step reported."""
        self.step += 1
        self.reports.append(report)

    def write(self) -> None:
        """Report the means since the last time."""
        values = {name: float(np.mean([float(r[name]) for r in self.reports])) for name in self.reports[0]}
        self.reports, step = [], self.step
        now = time.perf_counter()
        rate = (step - self.window_step) * self.tokens_per_step / (now - self.window)
        self.window, self.window_step = now, step
        values["bits_per_byte"] = values["loss"] / math.log(2) / self.bytes_per_token
        row = {"step": step, **values, "tokens_per_s": rate, "seconds": self.seconds_before + now - self.begin}
        with self.path.open("a") as out:
            out.write(json.dumps({name: round(value, 5) for name, value in row.items()}) + "\n")
        left = (self.steps - step) * self.tokens_per_step / rate
        print(
            f"step {step}/{self.steps}  loss {values['loss']:.3f}  {values['bits_per_byte']:.3f} bits/byte  "
            f"mtp {values['mtp_loss']:.3f}  busiest expert {values['busiest']:.1f}x  {rate:.0f} tokens/s  "
            f"{left / 60:.0f} min left",
            flush=True,
        )


def draw_curve(rows: list[dict[str, float]], path: Path) -> None:
    """Loss and balance over the steps, as a PNG."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = [row["step"] for row in rows]
    top.plot(steps, [row["bits_per_byte"] for row in rows], label="next token, bits per byte of training text")
    top.plot(steps, [row["mtp_loss"] / row["loss"] for row in rows], label="MTP module's loss over the model's")
    top.set_ylim(0.5, 3.0)
    top.legend()
    bottom.plot(steps, [row["busiest"] for row in rows], color="tab:red", label="busiest expert over the mean, a step")
    bottom.set_ylim(0, 10)
    bottom.legend()
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)

"""How far a command is: a bar on a terminal, and a line now and then where standard error goes elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

# (what is being done, how much of it has been, how much there is in all or None where nobody knows)
Report = Callable[[str, int, int | None], None]
EVERY_S = 10.0


@contextmanager
def shown_progress(unit: str) -> Iterator[Report]:
    """A callback that shows on standard error how far a command is; `unit`: of what it counts, such as "tokens"."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(unit, lambda line: click.echo(line, err=True))
        return
    columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bars:
        task = bars.add_task("loading", total=None)
        shown = [""]

        def report(what: str, done: int, total: int | None) -> None:
            if what != shown[0]:
                bars.reset(task, description=what)  # the speed of what came before says nothing of this
                shown[0] = what
            bars.update(task, completed=done, total=total)

        yield report


class Lines:
    """A `Report` in lines: one when something begins, and then one every `EVERY_S` seconds, if there is news.

    Args:
        unit: of what is counted.
        tell: called with each line.
        clock: seconds.
    """

    def __init__(self, unit: str, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._unit, self._tell, self._clock = unit, tell, clock
        self._what = ""
        self._began = self._told = 0.0
        self._first = 0

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = self._clock()
        if what != self._what:
            self._what, self._began, self._first = what, now, done
        elif now - self._told < EVERY_S:
            return
        self._told = now
        parts = [what] if total is None else [f"{what}: {done:,} of {total:,} {self._unit}"]
        elapsed, new = now - self._began, done - self._first
        if elapsed:
            parts.append(f"{_seconds(elapsed)} so far")
        if total is not None and elapsed and new > 0:
            parts.append(f"about {_seconds((total - done) * elapsed / new)} left")
        self._tell(", ".join(parts))


def _seconds(value: float) -> str:
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

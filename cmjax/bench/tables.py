"""How tables look, of the benchmarks and of the command."""

from collections.abc import Mapping

from rich import box
from rich.table import Table


def new_table(title: str, *columns: str, numbers_from: int | None = None) -> Table:
    """An empty table; columns from `numbers_from` on are aligned to the right."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        is_number = numbers_from is not None and index >= numbers_from
        table.add_column(column, overflow="fold", justify="right" if is_number else "left")
    return table


def define(table: Table, definitions: Mapping[str, str]) -> Table:
    """The table with what its words mean below it."""
    table.caption = "\n".join(f"{name}: {text}" for name, text in definitions.items())
    return table


def number(value: float | None, form: str, factor: float = 1) -> str:
    """A cell: the value times `factor` in this form, a dash where there is none."""
    return "-" if value is None else form.format(value * factor)

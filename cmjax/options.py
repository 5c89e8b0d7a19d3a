"""Settings said once: in the fields of a dataclass, each with its help, its bounds and its name at the command line.

`option` makes such a field, `check_bounds` refuses what is out of bounds. The command's options, its `--help` and
docs/options.md are made of the same fields (`cmjax.cli.flags`, `cmjax.cli.options_page`).
"""

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from cmjax.errors import UserError

T = TypeVar("T", bound=str)
_KEY = "cmjax.option"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """What a setting's field says besides its type.

    Attributes:
        default: of the field; `dataclasses.MISSING` where it must be given.
        help: what it sets, for `--help` and the documentation.
        flag: its name at the command line, for one that is on by default "--x/--no-x"; None: it has none there.
        minimum, maximum: the least and the most allowed; infinity where it is allowed itself.
        is_open: the minimum itself is not allowed.
        must_be: the bounds in words, where the numbers do not say them well.
        choices: the only values there are.
        unset: what holds where nothing is given, for a default that does not say it.
        scale: what a number at the command line is multiplied by.
        metavar: what stands for the value in `--help`.
    """

    help: str
    default: Any = None
    flag: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    is_open: bool = False
    must_be: str = ""
    choices: tuple[object, ...] = ()
    unset: str = ""
    scale: float | None = None
    metavar: str | None = None

    @property
    def bounds(self) -> str:
        """The bounds for people, "" where there are none."""
        if self.must_be or self.minimum is None:
            return self.must_be
        least = f"{'above' if self.is_open else 'from'} {self.minimum:g}"
        return least if self.maximum in (None, math.inf) else f"{least} to {self.maximum:g}"

    @property
    def limits(self) -> dict[str, float]:
        """The bounds under the names that pydantic has for them."""
        named = {"gt" if self.is_open else "ge": self.minimum, "le": self.maximum}
        return {name: limit for name, limit in named.items() if limit is not None}

    def problem(self, value: Any) -> str | None:
        """What is wrong with a number, to follow its name; None where nothing is. NaN is wrong wherever there are
        bounds, and infinity unless it is the maximum."""
        low, high = self.minimum, self.maximum
        if low is None and high is None:
            return None
        is_low = low is not None and (value < low or (self.is_open and value == low))
        is_finite = isinstance(value, numbers.Integral) or math.isfinite(value)
        if not is_low and (is_finite if high is None else value <= high):
            return None
        if not self.must_be and high in (None, math.inf) and is_low:
            if (low, self.is_open) in ((0, True), (1, False)):
                return "is not positive"
            if low == 0 and isinstance(value, numbers.Integral):
                return "is negative"
        return f"is out of range: it must be {self.bounds}"


def option(default: object, help: str, **details: Any) -> Any:
    """A dataclass field; the details are those of `Option`."""
    return dataclasses.field(default=default, metadata={_KEY: Option(help=help, default=default, **details)})


@functools.cache
def options_of(settings: type) -> dict[str, tuple[Option, Any]]:
    """Field -> its option, and its type without None, of the fields that `option` made."""
    hints = typing.get_type_hints(settings)
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]  # there is no type for these
    return {f.name: (f.metadata[_KEY], _without_none(hints[f.name])) for f in fields if _KEY in f.metadata}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    return functools.reduce(lambda one, other: one | other, [a for a in typing.get_args(hint) if a is not type(None)])


def check_bounds(settings: object) -> None:
    """Refuse numbers out of bounds, what is no number, and what is none of the choices; for `__post_init__`.

    Raises:
        UserError: one line that names the field and what it may be.
    """
    own_class: Any = type(settings)  # mypy takes type[object] for unhashable
    for name, (one, kind) in options_of(own_class).items():
        value = getattr(settings, name)
        if value is None:
            continue
        if kind is int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise UserError(f"{name} {value!r} is no integer")
        if kind is float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise UserError(f"{name} {value!r} is no number")
        if kind in (int, float) and (problem := one.problem(value)):
            raise UserError(f"{name} {value} {problem}")
        if one.choices and value not in one.choices:
            raise UserError(f"{name} {value!r} is not one of {', '.join(map(str, one.choices))}")


def choice_from_environment(name: str, choices: Sequence[T]) -> T:
    """The environment variable `name`, one of `choices`; the first of them where it is not set.

    Raises:
        UserError: it is something else.
    """
    text = os.environ.get(name, choices[0])
    for choice in choices:
        if text == choice:
            return choice
    raise UserError(f"{name} must be one of {', '.join(choices)}, got {text!r}")

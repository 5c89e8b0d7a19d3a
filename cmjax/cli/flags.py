"""Command-line options made of settings: what `cmjax.options` says of a field becomes its flag and its help."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import click

from cmjax.errors import UserError
from cmjax.options import Option, options_of

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., object])

MAX_TOKEN_ID = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Given(Generic[T]):
    """What a command line says of settings that it may leave some of open.

    Attributes:
        kind: of the settings.
        values: field -> what was given, or the default.
        left_open: the fields that the command fills in itself, as its `--help` says.
    """

    kind: type[T]
    values: Mapping[str, Any]
    left_open: Collection[str] = ()

    def get(self, field: str) -> Any:
        """What was given, or the default; None where it is open."""
        return self.values.get(field)

    def make(self, **open_fields: object) -> T:
        """The settings; `open_fields` says what holds for fields left open.

        Raises:
            TypeError: these are not the fields that `--help` says are filled in: it would show other defaults than
                there are.
        """
        kind: Any = self.kind  # mypy takes type[T] for unhashable
        settings = options_of(kind)
        open_by_help = {field for field in open_fields if settings[field][0].default is not dataclasses.MISSING}
        if open_by_help != set(self.left_open):
            raise TypeError(f"{sorted(open_fields)} are filled in, --help says it of {sorted(self.left_open)}")
        return self.kind(**{**open_fields, **self.values})


class SettingOption(click.Option):
    """An option made of a setting: the documentation lists it with the settings of its kind.

    Attributes:
        kind, field: the setting.
        default_text: the default of this command, where it is not the setting's.
    """

    def __init__(self, kind: type, field: str, default_text: str, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.kind, self.field, self.default_text = kind, field, default_text


class TokenIds(click.ParamType):
    """Token ids with commas between them: `1,2,3`."""

    name = "ids"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        ids = []
        for word in str(value).split(","):
            try:
                ids.append(int(word))
            except ValueError:
                self.fail(f"{word.strip()!r} in {value!r} is not a token id; give integers such as 1,2,3", param, ctx)
            if abs(ids[-1]) > MAX_TOKEN_ID:
                self.fail(f"token id {ids[-1]} is outside every vocabulary", param, ctx)
        return tuple(ids)


class _Number(click.ParamType):
    """A number that keeps to its option's bounds."""

    name = "float"

    def __init__(self, option: Option) -> None:
        self.option = option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(click.FLOAT.convert(value, param, ctx))
        problem = self.option.problem(number * (self.option.scale or 1))
        if problem:
            raise UserError(f"{self.option.flag} {number:g} {problem}")
        return number


def options_for(
    name: str, kind: type[T], *, only: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[[Function], Function]:
    """Options for all fields of `kind` that have a flag; the command gets a `kind` as its parameter `name`.

    Args:
        only: for these fields.
        defaults: field -> default, where it is not the settings' own.
    """
    return _options(name, kind, only, defaults or {}, {}, lambda given: given.make())


def given_options_for(
    name: str, kind: type[T], left_open: Mapping[str, str] | None = None, *, only: Sequence[str] = ()
) -> Callable[[Function], Function]:
    """As `options_for`, where the command fills in some fields: it gets a `Given[kind]`.

    Args:
        left_open: field -> what holds where it is not given, in place of the settings' own default.
        only: for these fields.
    """
    return _options(name, kind, only, {}, left_open or {}, lambda given: given)


def _options(
    name: str,
    kind: type[T],
    only: Sequence[str],
    defaults: Mapping[str, Any],
    left_open: Mapping[str, str],
    finish: Callable[[Given[T]], object],
) -> Callable[[Function], Function]:
    options = list(_make(name, kind, only, defaults, left_open))

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(*args: object, **parsed: object) -> object:
            found = {option.field: parsed.pop(f"{name}__{option.field}") for option in options}
            values = {field: _value(kind, field, value) for field, value in found.items() if value is not None}
            return function(*args, **{name: finish(Given(kind, values, left_open.keys()))}, **parsed)

        # As `click.option` does; the last one comes first in the help.
        params: list[click.Parameter] = command.__dict__.setdefault("__click_params__", [])
        params.extend(reversed(options))
        return command  # type: ignore[return-value]  # its signature is click's business

    return decorate


def _value(kind: type, field: str, value: Any) -> object:
    option, hint = options_of(kind)[field]
    return hint(value * option.scale) if option.scale else value


def _make(
    name: str, kind: type, only: Sequence[str], defaults: Mapping[str, Any], left_open: Mapping[str, str]
) -> Iterator[SettingOption]:
    for field, (option, hint) in options_of(kind).items():
        if option.flag is None or (only and field not in only):
            continue
        default = None if field in left_open else defaults.get(field, option.default)
        if default is dataclasses.MISSING:
            default = None
        if option.scale and default is not None:
            default /= option.scale
        unset = left_open.get(field, option.unset)
        help = option.help + (f"  [default: {unset}]" if unset else "")
        attributes: dict[str, Any] = {"help": help, "metavar": option.metavar}
        if hint is bool:
            attributes["is_flag"] = True
            if "/" in option.flag:  # "--x/--no-x": either may be said, and the help says which holds
                attributes |= {"default": default, "show_default": True}
        else:
            attributes |= {"type": _type(option, hint), "multiple": hint == tuple[str, ...]}
            attributes |= {} if default in (None, ()) else {"default": default, "show_default": not unset}
        own_text = left_open.get(field) or str(defaults.get(field, ""))
        yield SettingOption(kind, field, own_text, param_decls=[option.flag, f"{name}__{field}"], **attributes)


def _type(option: Option, hint: type) -> click.ParamType | type:
    if option.choices:
        return click.Choice(option.choices)
    if hint == tuple[str, ...]:
        return str
    if hint == tuple[int, ...]:
        return TokenIds()
    if hint is float or option.scale:
        return _Number(option)
    if hint is int and option.minimum is not None and not option.must_be:
        most = option.maximum
        return click.IntRange(int(option.minimum), None if most is None else int(most))
    return hint

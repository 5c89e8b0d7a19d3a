"""docs/options.md: all settings with their options, and the options that commands have of their own.

`python -m cmjax.cli.options_page > docs/options.md` writes it anew; a test compares the two.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import click

from cmjax.cli.command import command_group
from cmjax.cli.flags import SettingOption
from cmjax.options import Option, options_of

INTRODUCTION = """# Options

A setting is a field of a dataclass, which holds its default, its bounds, its help and its flag; the command's options
and this page are made of them. In the YAML file that `--config` of `cmjax serve` reads, an option has its name without
the dashes.

```sh
python -m cmjax.cli.options_page > docs/options.md   # after a change of settings
```
"""


def page() -> str:
    """The whole page."""
    commands = dict(_commands(command_group, "cmjax"))
    users: dict[type, dict[str, dict[str, SettingOption]]] = {}  # kind -> command -> field -> its option there
    for name, command in commands.items():
        for option in command.params:
            if isinstance(option, SettingOption):
                users.setdefault(option.kind, {}).setdefault(name, {})[option.field] = option
    parts = [INTRODUCTION]
    parts += [_settings(kind, by_command) for kind, by_command in sorted(users.items(), key=lambda one: _name(one[0]))]
    parts += [part for name, command in commands.items() if (part := _own_options(name, command))]
    return "\n".join(parts)


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for one in command.list_commands(context):
        found = command.get_command(context, one)
        if found is not None:
            yield from _commands(found, f"{name} {one}")


def _settings(kind: type, users: dict[str, dict[str, SettingOption]]) -> str:
    """A section: the fields of a settings class, and what differs in some of the commands."""
    rows = []
    for field, (option, _) in options_of(kind).items():
        differing: dict[str, list[str]] = {}  # default -> the commands that have it
        for name, options in users.items():
            if field in options and (text := options[field].default_text):
                differing.setdefault(text, []).append(f"`{name}`")
        default = "; ".join([_default(option), *(f"{text} in {', '.join(ours)}" for text, ours in differing.items())])
        rows.append((f"`{field}`", f"`{option.flag}`" if option.flag else "", default, _may_be(option), option.help))
    summary = (kind.__doc__ or "").splitlines()[0]
    listed = ", ".join(f"`{name}`" for name in users)
    table = _table(("setting", "option", "default", "may be", "what it is"), rows)
    return f"## `{_name(kind)}`\n\n{summary} Of {listed}.\n\n{table}"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _default(option: Option) -> str:
    default = option.default
    if option.unset or default in (None, (), dataclasses.MISSING):
        return option.unset
    return f"`{default.__name__ if callable(default) else default}`"


def _may_be(option: Option) -> str:
    return ", ".join(f"`{one}`" for one in option.choices) or option.bounds


def _own_options(name: str, command: click.Command) -> str:
    """A section: what a command takes besides settings."""
    rows = []
    for param in command.params:
        if isinstance(param, click.Option) and not isinstance(param, SettingOption) and not param.hidden:
            shown = param.default if isinstance(param.default, tuple) else (param.default,)
            default = ", ".join(f"`{one}`" for one in shown) if param.show_default else ""
            rows.append((", ".join(f"`{one}`" for one in param.opts), default, param.help or ""))
    return f"## `{name}`\n\n{_table(('option', 'default', 'what it is'), rows)}" if rows else ""


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    click.echo(page(), nl=False)

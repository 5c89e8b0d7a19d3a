"""Options made of settings: what is said once in a field is the flag, its help, its bounds and the page in docs."""

import dataclasses
import math

import click
import pytest
from click.testing import CliRunner

from cmjax.cli.flags import Given, given_options_for, options_for
from cmjax.cli.options_page import page
from cmjax.errors import UserError
from cmjax.options import Option, check_bounds, option
from tests.conftest import ROOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oven:
    """Settings of every kind."""

    degrees: float = option(180.0, "How hot.", flag="--degrees", minimum=0, is_open=True, maximum=300)
    minutes: int = option(30, "How long.", flag="--minutes", minimum=1)
    fan: bool = option(False, "Whether air moves.", flag="--fan")
    mode: int | str = option(1, "Which.", flag="--mode", choices=(1, 2, "auto"))
    racks: tuple[str, ...] = option((), "One each.", flag="--rack")
    shelf: int | None = option(None, "Where.", flag="--shelf", minimum=0, unset="in the middle")
    grams: int = option(500, "What it holds, in kg.", flag="--kg", scale=1000)
    light: bool = option(True, "Whether it shines.", flag="--light/--no-light")
    hidden: int = option(7, "Has no flag.")

    def __post_init__(self) -> None:
        check_bounds(self)


def command(decorator):
    seen = []

    @click.command()
    @decorator
    def run(oven: object) -> None:
        seen.append(oven)

    def invoke(*args: str) -> object:
        result = CliRunner().invoke(run, args)
        if isinstance(result.exception, UserError):
            raise result.exception
        return seen.pop() if result.exit_code == 0 and seen else result.output

    return invoke


def test_a_command_gets_its_settings_as_one_object():
    invoke = command(options_for("oven", Oven))
    assert invoke() == Oven()
    given = ("--degrees", "250.5", "--minutes", "5", "--fan", "--mode", "auto", "--rack", "a", "--rack", "b")
    expected = Oven(degrees=250.5, minutes=5, fan=True, mode="auto", racks=("a", "b"), shelf=2, grams=1500)
    assert invoke(*given, "--shelf", "2", "--kg", "1.5") == expected
    assert invoke("--mode", "2").mode == 2
    assert [invoke(*given).light for given in ((), ("--light",), ("--no-light",))] == [True, True, False]


def test_help_says_defaults_and_bounds():
    text = " ".join(str(command(options_for("oven", Oven, defaults={"minutes": 9}))("--help")).split())
    assert "--degrees FLOAT How hot. [default: 180.0]" in text
    assert "--minutes INTEGER RANGE How long. [default: 9; x>=1]" in text
    assert "--shelf INTEGER RANGE Where. [default: in the middle] [x>=0]" in text
    assert "--mode [1|2|auto] Which. [default: 1]" in text
    assert "--kg FLOAT What it holds, in kg. [default: 0.5]" in text
    assert "--light / --no-light Whether it shines. [default: light]" in text
    assert "hidden" not in text
    assert "--fan" not in command(options_for("oven", Oven, only=("minutes",)))("--help")


def test_what_is_left_open_is_the_commands_to_say():
    invoke = command(given_options_for("oven", Oven, {"minutes": "what the cake needs"}))
    open_one, given = invoke("--degrees", "200"), invoke("--minutes", "3")
    assert isinstance(open_one, Given)
    assert (open_one.get("minutes"), given.get("minutes"), given.get("degrees")) == (None, 3, 180.0)
    assert open_one.make(minutes=44) == Oven(degrees=200.0, minutes=44)
    assert given.make(minutes=44) == Oven(minutes=3)
    assert "[default: what the cake needs]" in " ".join(invoke("--help").split())
    # What the help says is left open is what is filled in, no more and no less.
    for other in ({}, {"minutes": 44, "degrees": 1.0}, {"shelf": 1}):
        with pytest.raises(TypeError, match=r"--help says it of \['minutes'\]"):
            given.make(**other)


def test_mistakes_name_the_option():
    invoke = command(options_for("oven", Oven))
    assert "Invalid value for '--minutes': 0 is not in the range x>=1" in invoke("--minutes", "0")
    assert "Invalid value for '--mode'" in invoke("--mode", "3")
    with pytest.raises(UserError, match="--degrees 301 is out of range: it must be above 0 to 300"):
        invoke("--degrees", "301")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degrees": 0.0}, "degrees 0.0 is out of range: it must be above 0 to 300"),
        ({"degrees": math.nan}, "degrees nan is out of range"),
        ({"degrees": "hot"}, "degrees 'hot' is no number"),
        ({"minutes": 0}, "minutes 0 is not positive"),
        ({"minutes": True}, "minutes True is no integer"),
        ({"shelf": -1}, "shelf -1 is negative"),
        ({"mode": 3}, "mode 3 is not one of 1, 2, auto"),
    ],
)
def test_settings_check_themselves(settings, message):
    with pytest.raises(UserError, match=message):
        Oven(**settings)


def test_infinity_is_in_bounds_where_it_is_the_maximum():
    assert Option(help="", minimum=0, is_open=True, maximum=math.inf).problem(math.inf) is None
    assert Option(help="", minimum=0, is_open=True, maximum=math.inf).problem(0) == "is not positive"
    assert Option(help="", minimum=0).problem(math.inf) == "is out of range: it must be from 0"
    assert Option(help="").problem(math.nan) is None


def test_the_page_in_docs_is_what_the_settings_say():
    found = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert found == page(), "run: python -m cmjax.cli.options_page > docs/options.md"

"""What README and docs say can be done, can be: commands parse, Python runs or compiles, files and targets exist."""

import ast
import importlib
import pkgutil
import re
import shlex

import click
import pytest

from cmjax.bench.reference import Reference
from cmjax.checkpoint import Tokenizer
from cmjax.cli.command import command_group
from cmjax.cli.options import BUNDLED_MODEL
from tests.conftest import ROOT
from tests.test_architecture import ROOMS

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES["README.md"] = README


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


def check_command(words: list[str]) -> None:
    """Parse a `cmjax` command line without running it; click raises where it is wrong. A bare name must exist."""
    command: click.Command = command_group
    context = click.Context(command, info_name="cmjax")
    while words and isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, f"{context.command_path} has no {name}"
    if words:
        command.make_context(command.name, list(words), parent=context)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        if not target.startswith(("http:", "https:")):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_text_exist(page):
    for name in re.findall(r"`((?:cmjax|scripts|tests|docs|models)/[\w./*-]+)`", PAGES[page]):
        assert list(ROOT.glob(name.rstrip("/"))), name


@pytest.mark.parametrize("page", PAGES)
def test_names_in_text_exist(page):
    for name in re.findall(r"`(cmjax(?:\.\w+)+)", PAGES[page]):
        pkgutil.resolve_name(name)


def test_the_map_is_the_order_of_the_rooms():
    rows = re.findall(r"^\| `cmjax/([\w/]+?)(?:/|\.py)` \|", README, re.MULTILINE)
    there = [room for room in ROOMS if list((ROOT / "cmjax").glob(f"{room.replace('.', '/')}*"))]
    assert [row.replace("/", ".") for row in rows][::-1] == there


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = shell_lines(PAGES[page]) + re.findall(r"`(cmjax [^`.]+|make [^`.]+)`", PAGES[page])
    for line in lines:
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "cmjax":
            check_command(words[1:])
        else:
            assert words[0] in ("python", "pip"), line


def test_the_readme_has_commands():
    assert len(shell_lines(README)) > 8
    with pytest.raises(click.UsageError):
        check_command(["generate", "--nonsense"])
    with pytest.raises(AssertionError):
        check_command(["nonsense"])


@pytest.mark.parametrize("page", PAGES)
def test_python_imports_what_there_is(page):
    for block in blocks(PAGES[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def test_the_first_examples_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    engine, collective = blocks(README, "python")
    names: dict = {}
    exec(engine.replace("ep_size=320", "ep_size=8"), names)
    assert len(names["result"].outputs[0].token_ids) == 8
    exec(collective, names)
    assert names["y"].reshape(320, 320)[3, 7] == 7 * 320 + 3


def test_the_transcript_is_the_references():
    (transcript,) = blocks(README, "text")
    reference, tokenizer = Reference.read(BUNDLED_MODEL), Tokenizer.from_folder(BUNDLED_MODEL)
    first_line = tokenizer.decode(reference.completions[0].token_ids[:32]).strip().splitlines()[0]
    assert f"  >     {first_line}" in transcript
    assert "The generated tokens equal the reference's" in transcript


def test_life_of_a_token_names_every_room():
    steps = re.findall(r"^\d+\. .*?(?=^\d+\. |\Z)", README.split("## Life of a token")[1], re.MULTILINE | re.DOTALL)
    assert len(steps) == 15
    named = " ".join(steps)
    assert all(f"cmjax/{room}/" in named for room in ("mesh", "moe", "model", "serve"))

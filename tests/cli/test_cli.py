"""The command line: errors are one line and status 2, `--json` is one object, `info` tells the machine."""

import ast
import json

import click
import pytest
from click.testing import CliRunner

import cmjax
from cmjax.cli import command as cli
from cmjax.cli import main
from cmjax.cli.command import COMMANDS, Commands
from cmjax.cli.info import info
from cmjax.errors import UserError
from cmjax.mesh import Supernode
from cmjax.mesh.topology import PRESETS
from tests.conftest import ROOT


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = main(args)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_version_and_help(capsys):
    assert run(capsys, "--version") == (0, f"cmjax {cmjax.__version__}\n", "")
    for args in ((), ("--help",)):
        status, out, err = run(capsys, *args)
        assert (status, err) == (0, "")
        assert all(f"\n  {name} " in out for name in COMMANDS)


def test_the_list_of_commands_says_what_their_own_help_says():
    context = click.Context(cli.command_group)
    for name, (*_, summary) in COMMANDS.items():
        help = cli.command_group.get_command(context, name).help
        assert " ".join(help.split("\n\n")[0].split()) == summary


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command, capsys):
    status, out, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    assert f"Usage: cmjax {command}" in out
    assert f"cmjax {command}" in out.split("Examples:")[1]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("nonsense",), "cmjax: error: No such command 'nonsense'."),
        (("info", "--nonsense"), "cmjax info: error: No such option"),
        (("info", "--ep", "many"), "cmjax info: error: Invalid value for '--ep'"),
        (("info", "--ep", "400"), "cmjax info: error: decode at EP 400 needs 400 devices, there are 384"),
        (("info", "--ep", "0"), "cmjax info: error: the EP size is 0; it must be at least 1"),
        (("info", "--supernode", "x"), "cmjax info: error: Invalid value for '--supernode'"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(args, line, capsys):
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_an_error_names_the_innermost_command():
    @click.group(cls=Commands)
    def outer() -> None: ...

    @outer.group(cls=Commands)
    def middle() -> None: ...

    @middle.command()
    def inner() -> None:
        raise UserError("two\nlines")

    with pytest.raises(cli.CommandError) as raised:
        outer.main(["middle", "inner"], prog_name="outer", standalone_mode=False)
    assert raised.value.command_path == "outer middle inner"
    # On its own, as click runs a group, it still ends without a traceback.
    result = CliRunner().invoke(outer, ["middle", "inner"])
    assert isinstance(result.exception, SystemExit)


def test_interrupt_and_defects(monkeypatch, capsys):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.command_group, "main", interrupted)
    assert run(capsys, "info") == (130, "", "cmjax: interrupted\n")

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("a defect")

    # What is not the user's mistake keeps its traceback: it is ours to mend.
    monkeypatch.setattr(cli.command_group, "main", broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["info"])


def test_no_command_imports_another():
    modules = {module for module, *_ in COMMANDS.values()}
    for module in modules:
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not named & (modules - {module})


def test_supernodes_offered_are_the_presets():
    (option,) = (one for one in info.params if "--supernode" in one.opts)
    assert set(option.type.choices) == set(PRESETS)


@pytest.mark.smoke
def test_info_json(capsys):
    status, out, err = run(capsys, "info", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["versions"]["cmjax"] == cmjax.__version__
    assert report["devices"] == {"platform": "cpu", "kind": "cpu", "num_devices": 384, "is_virtual": True}
    assert (report["supernode"]["num_nodes"], report["supernode"]["num_l2_chips"]) == (48, 112)
    assert [(one["name"], one["ep_size"], one["nodes"]) for one in report["instances"]] == [
        ("prefill0", 32, [0, 3]),
        ("prefill1", 32, [4, 7]),
        ("decode0", 320, [8, 47]),
    ]
    assert not report["prefill_shares_decode_devices"]
    assert [plane["name"] for plane in report["planes"]] == ["ub", "rdma", "vpc"]
    assert report["planes"][0]["figures"][0]["bytes_per_s"] == 164e9
    assert {"all_to_all", "ragged_all_to_all", "psum"} <= set(report["collectives"])
    assert all(one["form"] and one["reason"] for one in report["collectives"].values())


def test_info_json_of_other_sizes(capsys):
    report = json.loads(run(capsys, "info", "--json", "--ep", "6", "--prefill-ep", "2", "--prefill-instances", "3")[1])
    assert [one["ranks"] for one in report["instances"]] == [[0, 1], [2, 3], [4, 5], [6, 11]]
    assert report["devices"]["num_devices"] == 12
    report = json.loads(run(capsys, "info", "--json", "--ep", "4", "--decode-instances", "2")[1])
    assert [one["name"] for one in report["instances"]] == ["prefill0", "prefill1", "decode0", "decode1"]
    report = json.loads(run(capsys, "info", "--json", "--ep", "6", "--prefill-instances", "0")[1])
    assert report["prefill_shares_decode_devices"]
    assert [one["ranks"] for one in report["instances"]] == [[0, 5], [0, 5]]
    report = json.loads(run(capsys, "info", "--json", "--ep", "320", "--supernode", "cloudmatrix384-dies")[1])
    assert report["instances"][-1]["nodes"] == [4, 23]
    assert report["supernode"]["num_ranks"] == Supernode.preset("cloudmatrix384-dies").num_ranks == 768


@pytest.mark.parametrize("columns", ["20", "60", None])
def test_info_cuts_no_name(columns, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    out = run(capsys, "info", "--ep", "8")[1]
    report = json.loads(run(capsys, "info", "--ep", "8", "--json")[1])
    names = [one["name"] for one in report["instances"]] + [plane["name"] for plane in report["planes"]]
    reasons = [form["reason"] for form in report["collectives"].values()]
    for word in (*names, *report["collectives"], *" ".join(reasons).split(), "NPU-NPU", "prefill"):
        assert word in out.split()
    assert all(line == line.rstrip() for line in out.splitlines())


def test_info_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    status, out, err = run(capsys, "info", "--ep", "8")
    assert (status, err) == (0, "")
    assert "24 virtual devices on the CPU" in out
    assert "Supernode cloudmatrix384" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["decode0", "decode", "8", "16-23", "16-23", "2"] in rows
    assert ["ub", "NPU-NPU", "write", "135", "137", "2.1", "1.3"] in rows
    assert ["rdma", "any", "25", "25", "5", "5"] in rows
    assert "rdma: nominal rate of arXiv:2506.12708v2; latency assumed" in out
    assert any(row[:1] == ["ragged_all_to_all"] for row in rows)

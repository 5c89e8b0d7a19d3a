"""How far a command is, in lines: one when something begins, then one now and then."""

from cmjax.cli.progress import EVERY_S, Lines, shown_progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_when_something_begins_and_then_now_and_then():
    clock, lines = Clock(), []
    report = Lines("tokens", lines.append, clock)
    report("compiling", 0, None)
    clock.now += 3
    report("evaluating", 0, 40_000)
    for done in range(100, 20_100, 100):  # a hundred a second
        clock.now += 1
        report("evaluating", done, 40_000)
    assert lines[:2] == ["compiling", "evaluating: 0 of 40,000 tokens"]
    assert len(lines) == 2 + 200 / EVERY_S
    assert lines[2] == "evaluating: 1,000 of 40,000 tokens, 10 s so far, about 6 min 30 s left"
    assert lines[-1] == "evaluating: 20,000 of 40,000 tokens, 3 min 20 s so far, about 3 min 20 s left"


def test_what_was_done_before_says_nothing_of_the_speed():
    """As `cmjax quantize` that goes on after the last finished layer."""
    clock, lines = Clock(), []
    report = Lines("layers", lines.append, clock)
    report("quantizing", 50, 61)
    clock.now += EVERY_S
    report("quantizing", 50, 61)
    clock.now += EVERY_S
    report("quantizing", 52, 61)
    assert lines == [
        "quantizing: 50 of 61 layers",
        "quantizing: 50 of 61 layers, 10 s so far",
        "quantizing: 52 of 61 layers, 20 s so far, about 1 min 30 s left",
    ]


def test_without_a_terminal_they_go_to_standard_error(capsys):
    with shown_progress("layers") as report:
        report("quantizing", 0, 7)
    assert capsys.readouterr() == ("", "quantizing: 0 of 7 layers\n")


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with shown_progress("layers") as report:
        report("quantizing", 2, 7)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/7" in err
    assert "quantizing: " not in err

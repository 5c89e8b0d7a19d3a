"""Compile a step in a process of its own: what a crash of the compiler says of itself is one line."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from cmjax.errors import UserError
from cmjax.targets.step import ENVIRONMENT, StepReport, StepRequest, compile_step

_CRASH = re.compile(r"^F\d{4} [\d:.]+\s+\d+ (?P<where>\S+?)\] (?P<what>.*)$", re.MULTILINE)
_EXIT_USER_ERROR = 2


def compile_apart(request: StepRequest) -> StepReport:
    """As `compile_step`; a process that dies is a report with status "crashed".

    Raises:
        UserError: as `compile_step` does.
    """
    environment = dict(os.environ)
    if request.target != "here":
        environment |= ENVIRONMENT
    with tempfile.TemporaryDirectory(prefix="cmjax-compile-") as folder:
        result = Path(folder, "report.json")
        process = subprocess.run(
            [sys.executable, "-m", __name__, str(result)],
            input=json.dumps(dataclasses.asdict(request)),
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
        if process.returncode == _EXIT_USER_ERROR:
            raise UserError((process.stderr.strip().splitlines() or ["it gave no reason"])[-1])
        if process.returncode == 0 and result.exists():
            return StepReport(**json.loads(result.read_text(encoding="utf-8")))
        return StepReport(status="crashed", reason=crash_reason(process.returncode, process.stderr))


def crash_reason(status: int, errors: str) -> str:
    """One line about a process that has died: its last words, and how it ended."""
    name = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    if found := _CRASH.search(errors):
        return f"the compiler crashed in {found['where'].rpartition('/')[2]} ({name}): {found['what']}"
    words = [line for line in errors.splitlines() if line.strip()]
    if status == -signal.SIGKILL:
        return f"the compiler was killed ({name}): this machine has too little memory for it"
    return f"the compiler ended with {name}: {words[-1].strip() if words else 'it gave no reason'}"


def _main(result: str) -> int:
    request = StepRequest(**json.load(sys.stdin))
    try:
        report = compile_step(request)
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return _EXIT_USER_ERROR
    Path(result).write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))

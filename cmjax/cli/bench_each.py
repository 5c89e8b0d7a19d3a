"""Several benchmarks, each in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

import click


def run_each(context: click.Context, commands: Mapping[str, Sequence[str]], as_json: bool) -> None:
    """Run `cmjax bench` with the words of each command: in processes of their own, as they need different numbers of
    devices. With `as_json` their reports become one object, by name. Ends with the worst of their statuses."""
    reports, worst = {}, 0
    for name, words in commands.items():
        command = [sys.executable, "-m", "cmjax", "bench", *words]
        if as_json:
            done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=False)
            reports[name] = json.loads(done.stdout) if done.stdout else None
        else:
            done = subprocess.run(command, check=False)
        worst = max(worst, abs(done.returncode))
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    if worst:
        context.exit(worst)

"""The `cmjax` command: parses, calls one function, prints.

Each command lives in a module of this package that is imported only when it is asked for. Mistakes of the user (click's
own errors and `UserError`) end as one line on standard error and exit status 2.
"""

import importlib
import sys
from collections.abc import Sequence

import click

import cmjax
from cmjax.errors import UserError

# name -> (module, attribute, what it does: here too, so that the list of commands needs no JAX)
COMMANDS = {
    "bench": ("cmjax.cli.bench", "bench", "Measure; every figure comes with its machine, its versions and its commit."),
    "compile": (
        "cmjax.cli.compile",
        "compile_command",
        "Compile an engine's steps for accelerators that need not be there: TPUs, GPUs.",
    ),
    "demo": (
        "cmjax.cli.demo",
        "demo",
        "Let a small DeepSeek-V3 write Python on a virtual supernode, and compare its tokens with a reference.",
    ),
    "eval": ("cmjax.cli.eval", "evaluate_command", "Measure a model on held-out text, teacher-forced."),
    "generate": (
        "cmjax.cli.generate",
        "generate",
        "Continue prompts, through prefill instances and an expert-parallel decode instance.",
    ),
    "info": (
        "cmjax.cli.info",
        "info",
        "Show devices, instances, planes, and which collectives and kernels are in use, and why.",
    ),
    "quantize": (
        "cmjax.cli.quantize",
        "quantize",
        "Quantize the checkpoint in folder IN (bfloat16, float32, float16 or FP8 blocks) into the new folder OUT.",
    ),
    "simulate": (
        "cmjax.cli.simulate",
        "simulate",
        "Price the engine's own steps, traced, on named hardware; only `host` measures and runs.",
    ),
    "serve": (
        "cmjax.cli.serve",
        "serve",
        "Serve a model over HTTP, with OpenAI's API; the status page is at /, metrics at /metrics.",
    ),
}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class CommandError(click.ClickException):
    """A user's mistake, and the command it was made in."""

    def __init__(self, message: str, command_path: str) -> None:
        super().__init__(message)
        self.command_path = command_path


class Commands(click.Group):
    """A group that knows which of its commands a UserError came from. Nested groups name the innermost."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UserError as error:
            command = f" {ctx.invoked_subcommand}" if ctx.invoked_subcommand else ""
            raise CommandError(str(error), f"{ctx.command_path}{command}") from error


class LazyCommands(Commands):
    """The top-level group: imports a command's module on first use, so that `cmjax --version` needs no JAX."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.command(
    cls=LazyCommands,
    name="cmjax",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
    Examples:
      cmjax demo                 EP320 generation with a bundled model, compared with its reference
      cmjax info                 the machine, its instances and planes, and the collectives and kernels in use
      cmjax info --ep 8 --json   the same for a small machine, as one JSON object
      cmjax COMMAND --help       what a command does, with examples""",
)
@click.version_option(cmjax.__version__, prog_name="cmjax", message="%(prog)s %(version)s")
def command_group() -> None:
    """Run a CloudMatrix384-class serving system in JAX: 384 virtual devices on a CPU, or real ones."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. A user's mistake is one line on standard error."""
    try:
        status = command_group.main(args=None if args is None else list(args), prog_name="cmjax", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        click.echo(f"{_command_path(error)}: error: {_one_line(error.format_message())}", err=True)
        return EXIT_USER_ERROR
    except (click.Abort, KeyboardInterrupt):
        click.echo("cmjax: interrupted", err=True)
        return EXIT_INTERRUPTED
    # Outside its standalone mode click returns the code of `ctx.exit(code)`, which --help and --version call.
    return status if isinstance(status, int) else 0


def _command_path(error: click.ClickException) -> str:
    if isinstance(error, CommandError):
        return error.command_path
    context = getattr(error, "ctx", None)
    return context.command_path if context else "cmjax"


def _one_line(message: str) -> str:
    return " ".join(message.split())


if __name__ == "__main__":
    sys.exit(main())

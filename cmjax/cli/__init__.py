"""The `cmjax` command: a file a command."""

from cmjax.cli.command import main

__all__ = ["main"]

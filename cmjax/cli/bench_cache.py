"""`cmjax bench cache`: what the prefix cache gains, and what its memory pool does."""

from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.table import Table

from cmjax.bench import cache_agents, cache_reuse, cache_trace, pool
from cmjax.bench.cache_agents import AgentSettings
from cmjax.bench.cache_reuse import ReuseSettings
from cmjax.bench.cache_trace import TraceCacheSettings
from cmjax.cli.bench_each import run_each
from cmjax.cli.command import Commands
from cmjax.cli.flags import options_for
from cmjax.cli.options import count_option, json_option, plot_option
from cmjax.cli.progress import shown_progress
from cmjax.cli.running import use_compilation_cache
from cmjax.cli.tables import print_report
from cmjax.text import JsonObject

EXIT_NOT_AS_MEANT = 1


@click.group(
    cls=Commands,
    epilog="""\b
    Examples:
      cmjax bench cache reuse --plot reuse.png           beside no cache, and the instance's own blocks
      cmjax bench cache trace --trace mooncake.jsonl     hit rates predicted, delivered, and possible
      cmjax bench cache agents --users 8                 conversations that grow
      cmjax bench cache pool                             the memory pool beside plain copies
      cmjax bench cache all --plots docs                 each in a process of its own""",
)
def cache() -> None:
    """What the prefix cache gains, and how near it comes to what it could."""


@cache.command(
    "reuse",
    epilog="""\b
    Examples:
      cmjax bench cache reuse --plot reuse.png
      cmjax bench cache reuse --reuse 0,90 --input-len 2048 --rounds 3 --json""",
)
@options_for("settings", ReuseSettings)
@plot_option
@json_option
@click.pass_context
def reuse(context: click.Context, settings: ReuseSettings, plot: Path | None, as_json: bool) -> None:
    """Time to first token and prefill throughput against the share of a prompt that was computed before.

    Ends with status 1 where prompts did not find their beginnings where the variant has them.
    """
    use_compilation_cache()
    with shown_progress("turns") as tell:
        report = cache_reuse.run(settings, tell=tell)
    _show(report, cache_reuse.tables(report), cache_reuse.plot, plot, as_json)
    if not report["as_meant"]:
        context.exit(EXIT_NOT_AS_MEANT)


@cache.command(
    "trace",
    epilog="""\b
    Examples:
      cmjax bench cache trace --trace mooncake.jsonl --num-requests 2000
      cmjax bench cache trace --trace qwen.jsonl --hash-tokens 16 --scale 2 --cache-blocks 10000 --plot hits.png""",
)
@click.option(
    "--trace",
    "file",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="JSON lines with timestamp, input_length and hash_ids.",
)
@options_for("settings", TraceCacheSettings)
@plot_option
@json_option
def trace(file: Path, settings: TraceCacheSettings, plot: Path | None, as_json: bool) -> None:
    """Hit rates on a trace in Mooncake's format: predicted from its hashes, delivered by an engine that gets prompts of
    the same structure, and the most that a cache of the size can have."""
    use_compilation_cache()
    with shown_progress("requests") as tell:
        report = cache_trace.run(file, settings, tell=tell)
    _show(report, cache_trace.tables(report), cache_trace.plot, plot, as_json)


@cache.command(
    "agents",
    epilog="""\b
    Examples:
      cmjax bench cache agents --plot agents.png
      cmjax bench cache agents --users 8 --turns 10 --prefix-len 2048 --json""",
)
@options_for("settings", AgentSettings)
@plot_option
@json_option
def agents(settings: AgentSettings, plot: Path | None, as_json: bool) -> None:
    """Hit rate and time to first token by turn of agents that send all they have said so far."""
    use_compilation_cache()
    with shown_progress("turns") as tell:
        report = cache_agents.run(settings, tell=tell)
    _show(report, cache_agents.tables(report), cache_agents.plot, plot, as_json)


@cache.command(
    "pool",
    epilog="""\b
    Examples:
      cmjax bench cache pool
      cmjax bench cache pool --index-keys 0 --server redis://localhost:6379 --json""",
)
@count_option("--rounds", 5, "Timed runs of each contender.")
@click.option(
    "--index-keys", type=click.IntRange(min=0), default=pool.INDEX_KEYS, show_default=True, help="0: no index."
)
@click.option(
    "--server", metavar="URL", help="Of a Redis or Valkey server.  [default: one is started, if there is one]"
)
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where the persistent tier is made.")
@json_option
def memory_pool(rounds: int, index_keys: int, server: str | None, folder: Path | None, as_json: bool) -> None:
    """The memory pool beside plain copies of memory; small values; an index of many keys."""
    result = pool.run(
        rounds=rounds, num_index_keys=index_keys, server=server, folder=None if folder is None else str(folder)
    )
    print_report(pool.report(result), pool.tables(result), as_json)


@cache.command(
    "all", epilog="\b\nExamples:\n  cmjax bench cache all\n  cmjax bench cache all --trace mooncake.jsonl --json"
)
@click.option("--trace", "file", metavar="FILE", help="For the benchmark of that name, which is left out without it.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Folder for the pictures.")
@count_option("--rounds", 5, "Of the benchmark that has them.")
@json_option
@click.pass_context
def run_all(context: click.Context, file: str | None, plots: Path | None, rounds: int, as_json: bool) -> None:
    """Every benchmark of the cache, each in a process of its own."""
    commands = {"reuse": ["--rounds", str(rounds)], "agents": []} | ({"trace": ["--trace", file]} if file else {})
    if plots is not None:
        for name, options in commands.items():
            options += ["--plot", str(plots / f"cache-{name}.png")]
    commands["pool"] = []
    run_each(context, {name: ["cache", name, *options] for name, options in commands.items()}, as_json)


def _show(
    report: JsonObject,
    tables: Sequence[Table],
    draw: Callable[[JsonObject, str], None],
    picture: Path | None,
    as_json: bool,
) -> None:
    if picture is not None:
        draw(report, str(picture))
    print_report(report, tables, as_json)

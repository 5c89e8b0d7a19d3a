"""`cmjax bench cache agents`: agents that send all they have said so far at every turn, with the prefix cache and
without, in turn in one run: what each turn hits, and how soon its first token comes."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from cmjax.bench.cache import BLOCK_SIZE, Tell, random_model, send, silent, started, ttft_s
from cmjax.bench.cache_bound import count_distinct, lru_hits, make_lookups
from cmjax.bench.report import machine
from cmjax.bench.tables import define, new_table
from cmjax.model import Model, num_params
from cmjax.options import check_bounds, option
from cmjax.serve import Engine, EngineSettings
from cmjax.serve.caching import CacheSettings
from cmjax.text import JsonObject

VARIANTS = ("off", "on")
_ROWS_SHOWN = 10
DEFINITIONS = {
    "turn": "the agents take it one after another, each when the answer to the one before is there",
    "hit rate": "prompt tokens that need not be computed, over all prompt tokens of the turn",
    "possible": "of these, in whole blocks of prompts before; with answers: also in blocks that their answers filled",
    "in place": "of the hits, what lay in the instance's own blocks; the rest came from the memory pool",
    "TTFT": "from the arrival of a request to its first token; median of the agents",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Conversations that grow by a message and its answer each turn, and begin alike."""

    users: int = option(4, "Agents.", flag="--users", minimum=1)
    turns: int = option(30, "Of each.", flag="--turns", minimum=1)
    prefix_len: int = option(512, "Tokens that all prompts begin with.", flag="--prefix-len", minimum=1)
    message_len: int = option(32, "Tokens that a turn adds before it is answered.", flag="--message-len", minimum=1)
    answer_len: int = option(32, "Tokens of an answer.", flag="--output-len", minimum=1)
    seed: int = option(0, "Of weights and messages.", flag="--seed")

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def longest(self) -> int:
        """Tokens of a whole conversation."""
        return self.prefix_len + self.turns * (self.message_len + self.answer_len)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A request of an agent.

    Attributes:
        num_cached: of its prompt's tokens, those that were not computed.
        num_own: of these, those in the instance's own blocks.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    ttft_s: float
    num_cached: int
    num_own: int


# (turn, user, variant), in the order they were sent
Turns = Mapping[tuple[int, int, str], Turn]


def run(
    settings: AgentSettings, model: Model | None = None, *, cache: CacheSettings | None = None, tell: Tell = silent
) -> JsonObject:
    """Have the same agents talk to an engine without a cache and to one with it.

    Args:
        model: None: a random one.
        cache: of the one with it.
    """
    tell("compiling", 0, None)
    model, cache = model or random_model(seed=settings.seed), cache or CacheSettings()
    sizes = EngineSettings(
        max_model_len=-(-settings.longest // BLOCK_SIZE) * BLOCK_SIZE, max_num_seqs_per_rank=1, block_size=BLOCK_SIZE
    )
    with started(model, sizes, None) as off, started(model, sizes, cache) as on:
        turns = _talk(settings, {"off": off, "on": on}, model.config.vocab_size, tell)
    return {
        "benchmark": "cache agents",
        "machine": machine(),
        "settings": dataclasses.asdict(settings)
        | {
            "cache_block": cache.cache_block_size,
            "decode_blocks": cache.decode_blocks,
            "num_parameters": num_params(model.params),
        },
        "results": summarize(settings, turns, cache.cache_block_size),
        "definitions": DEFINITIONS,
    }


def _talk(settings: AgentSettings, engines: Mapping[str, Engine], vocab_size: int, tell: Tell) -> Turns:
    """All turns of all agents; each engine's own answers are what its agents go on from."""
    rng = np.random.default_rng(settings.seed)

    def draw(count: int) -> list[int]:
        return rng.integers(0, vocab_size, count).tolist()

    for engine in engines.values():
        send(engine, [draw(settings.longest - settings.answer_len)])  # the first request of an engine is slower
    prefix = draw(settings.prefix_len)
    said = {(user, name): prefix for user in range(settings.users) for name in engines}
    turns: dict[tuple[int, int, str], Turn] = {}
    rounds = list(itertools.product(range(settings.turns), range(settings.users)))
    for done, (turn, user) in enumerate(rounds):
        tell("talking", done, len(rounds))
        message = draw(settings.message_len)
        for name, engine in engines.items():
            prompt, before = said[user, name] + message, engine.stats().cache.num_hits
            (handle,) = send(engine, [prompt], settings.answer_len)
            num_own = engine.stats().cache.num_hits - before
            answer = list(handle.token_ids)
            turns[turn, user, name] = Turn(prompt, answer, ttft_s(handle), handle.num_cached_tokens, num_own)
            said[user, name] = prompt + answer
    return turns


def summarize(settings: AgentSettings, turns: Turns, cache_block: int) -> list[JsonObject]:
    """A row for each turn."""
    possible = {name: _possible(turns, cache_block, with_answers) for name, with_answers in _POSSIBLE.items()}
    rows = []
    for turn in range(settings.turns):
        users = range(settings.users)
        off, on = ([turns[turn, user, name] for user in users] for name in VARIANTS)
        total = sum(len(one.prompt_ids) for one in on)
        seconds = {name: [one.ttft_s for one in many] for name, many in (("off", off), ("on", on))}
        rows.append(
            {
                "turn": turn + 1,
                "prompt_tokens": total / settings.users,
                "hit_rate": sum(one.num_cached for one in on) / total,
                "in_place": sum(one.num_own for one in on) / max(sum(one.num_cached for one in on), 1),
                **{name: sum(found[turn, user] for user in users) / total for name, found in possible.items()},
                **{f"ttft_{name}_s": float(np.median(some)) for name, some in seconds.items()},
                "ttft_ratio": float(np.median(np.divide(seconds["off"], seconds["on"]))),
            }
        )
    return rows


_POSSIBLE = {"possible": False, "possible_with_answers": True}


def _possible(turns: Turns, cache_block: int, with_answers: bool) -> dict[tuple[int, int], int]:
    """(turn, user) -> tokens of its prompt in whole blocks that were known before it; the last token of an answer is
    not computed before the next turn."""
    asked = [(key, one) for key, one in turns.items() if key[2] == "on"]
    texts = []
    for _, one in asked:
        texts += [one.prompt_ids, one.prompt_ids + (one.answer_ids[:-1] if with_answers else [])]
    lookups = make_lookups(((_contents(text, cache_block), len(text)) for text in texts), cache_block)
    hits = lru_hits(lookups, count_distinct(lookups))[::2]
    return {key[:2]: found * cache_block for (key, _), found in zip(asked, hits, strict=True)}


def _contents(token_ids: Sequence[int], cache_block: int) -> list[tuple[int, ...]]:
    return [tuple(token_ids[start : start + cache_block]) for start in range(0, len(token_ids), cache_block)]


def tables(report: JsonObject) -> list[Table]:
    """Some of the turns, from the first to the last."""
    settings, rows = report["settings"], report["results"]
    title = (
        f"{settings['num_parameters'] / 1e6:.0f} M parameters on one device, {settings['users']} agents, "
        f"{settings['prefix_len']} tokens in common, {settings['message_len']} a message, {settings['answer_len']} an "
        f"answer, blocks of {settings['cache_block']}"
    )
    columns = ("turn", "prompt", "hit rate", "possible", "with answers", "in place", "TTFT off, ms", "on, ms", "off/on")
    table = new_table(title, *columns, numbers_from=0)
    for index in np.unique(np.linspace(0, len(rows) - 1, _ROWS_SHOWN).round().astype(int)).tolist():
        row = rows[index]
        rates = (f"{row[name]:.1%}" for name in ("hit_rate", *_POSSIBLE, "in_place"))
        times = (f"{row[f'ttft_{name}_s'] * 1e3:,.0f}" for name in VARIANTS)
        table.add_row(str(row["turn"]), f"{row['prompt_tokens']:,.0f}", *rates, *times, f"{row['ttft_ratio']:.2f}")
    return [define(table, report["definitions"])]


def plot(report: JsonObject, path: str) -> None:
    """Hit rate and TTFT by turn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = report["results"]
    turns = [row["turn"] for row in rows]
    for name, label in (("hit_rate", "delivered"), ("possible", "possible")):
        left.plot(turns, [row[name] * 100 for row in rows], "o-" if name == "hit_rate" else "--", label=label)
    left.set(title="hit rate", xlabel="turn", ylabel="%", ylim=(0, 100))
    for name in VARIANTS:
        right.plot(turns, [row[f"ttft_{name}_s"] for row in rows], "o-", label=f"cache {name}")
    right.set(title="time to first token", xlabel="turn", ylabel="s")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=120)

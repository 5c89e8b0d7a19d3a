"""Make `reference.json` for `cmjax demo`: what an independent implementation writes after prompts of held-out Python.

    python scripts/make_demo_reference.py models/demo
    python scripts/make_demo_reference.py DIR --heldout texts.jsonl --count 320 --tokens 48

The independent implementation is Hugging Face transformers on torch, float32, eager attention and experts; neither is
a dependency of cmjax. Decoding is greedy, and goes on after the end of a file.

A prompt is a line that opens a function or a class, up to its colon, and as many lines before it as fit; where it can
be, lines that are Python by themselves. Subject areas take turns, within an area its files, within a file functions at
the top level and the rest; hashes decide the order, so that equal input gives equal prompts. A prompt is passed over
where the routing of any of its or its continuation's tokens comes close to a tie: there, two correct implementations
may choose different experts and go on with different text.

The first completions are for people to read: functions at the top level that the continuation completes within its
first tokens, in lines that Python compiles; one an area, those first that say no line twice, then those whose prompt
compiles too, and of those the ones with the longest function.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from tokenizers import Tokenizer

T = TypeVar("T")

HELDOUT = Path(__file__).resolve().parents[1] / "models" / "data" / "heldout.jsonl"
MAX_PROMPT_TOKENS = 64
MAX_BATCH = 48
# Scores of experts, between 0 and 1, have been seen to differ by 3e-6 between float32 and float64.
MIN_ROUTER_GAP = 1e-5
SHOWN = 3
SHOWN_TOKENS = 32  # what the demo generates unless told otherwise
HEADER = re.compile(r"\s*(async\s+def|def|class)\s+\w+.*:\s*")
FUNCTION = re.compile(r"(async\s+def|def)\s")


@dataclasses.dataclass
class Completion:
    """A prompt, and its greedy continuation once there is one.

    Attributes:
        area: subject of its file.
        header: the last line of the prompt.
        margins: top logit minus the second one, for each token.
        router_gap: how close the routing of its tokens came to another choice.
    """

    area: str
    prompt: str
    header: str
    prompt_ids: list[int]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    margins: list[float] = dataclasses.field(default_factory=list)
    router_gap: float = math.inf

    def stored(self) -> dict[str, Any]:
        """What the file holds. Margins are rounded down, so that none seems larger than it is."""
        margins = [math.floor(margin * 1e4) / 1e4 for margin in self.margins]
        return {"prompt": self.prompt, "prompt_ids": self.prompt_ids, "token_ids": self.token_ids, "margins": margins}


# -- prompts ----------------------------------------------------------------------------------------------------------


def hashed(text: str) -> str:
    """A key to order by that has nothing to do with the text's own order."""
    return hashlib.sha256(text.encode()).hexdigest()


def in_turn(sources: Iterable[Iterator[T]]) -> Iterator[T]:
    """One of each, again and again, until all have ended."""
    waiting = list(sources)
    while waiting:
        left = []
        for source in waiting:
            for one in islice(source, 1):
                yield one
                left.append(source)
        waiting = left


def is_header(line: str) -> bool:
    """Whether a line opens a function or a class, and is complete."""
    return HEADER.fullmatch(line) is not None and all(line.count(a) == line.count(b) for a, b in ("()", "[]", "{}"))


def compiles(text: str) -> bool:
    """Whether the text is a Python module."""
    try:
        compile(text, "text", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def file_prompts(file: dict[str, str], encode: Callable[[str], list[int]]) -> Iterator[Completion]:
    """The prompts of a file: in the order of their hashes, top-level functions and others taking turns."""
    lines = file["text"].split("\n")

    def prompt(last: int) -> Iterator[Completion]:
        fitting = []
        # Line by line upwards; a prompt does not begin with an empty line.
        for first in range(last, -1, -1):
            text = "\n".join(lines[first : last + 1]).rstrip()
            if lines[first].strip():
                if len(ids := encode(text)) > MAX_PROMPT_TOKENS:
                    break
                fitting.append(Completion(file["area"], text, lines[last].rstrip(), ids))
        # The longest one that would be a module if it had a body, else the longest one.
        fitting.sort(key=lambda one: (compiles(f"{one.prompt} pass"), len(one.prompt)))
        yield from fitting[-1:]

    order = sorted(range(len(lines)), key=lambda number: hashed(f"{file['path']}:{number}"))
    headers = [number for number in order if is_header(lines[number])]
    kinds = ([n for n in headers if bool(FUNCTION.match(lines[n])) == is_function] for is_function in (True, False))
    return in_turn(chain.from_iterable(map(prompt, kind)) for kind in kinds)


def all_prompts(heldout: Path, encode: Callable[[str], list[int]]) -> Iterator[Completion]:
    """The prompts of all files, areas and files taking turns, each prompt once."""
    files = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()]
    areas = defaultdict(list)
    for file in sorted(files, key=lambda file: hashed(file["path"])):
        areas[file["area"]].append(file_prompts(file, encode))
    seen: set[str] = set()
    for one in in_turn(in_turn(areas[area]) for area in sorted(areas)):
        if one.prompt not in seen:
            seen.add(one.prompt)
            yield one


# -- the model --------------------------------------------------------------------------------------------------------


def load_model(folder: Path) -> Any:
    """The model in float32; a ValueError where a weight is missing, or one is there that it has no place for."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    # The MTP module is one more layer at the end of the file, which transformers does not run.
    mtp_layer = f"model.layers.{model.config.num_hidden_layers}."
    unknown = [name for name in info["unexpected_keys"] if not name.startswith(mtp_layer)]
    for problem, names in (
        ("missing", info["missing_keys"]),
        ("mismatched", info["mismatched_keys"]),
        ("unknown", unknown),
    ):
        if names:
            raise ValueError(f"{folder}: {problem} weights: {', '.join(map(str, sorted(names)))}")
    return model.eval()


class RouterWatch:
    """Follows the routers of a model, and keeps how close each sequence came to another choice of experts."""

    def __init__(self, model: Any) -> None:
        self.gap = torch.empty(0)
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self._look)

    def start(self, batch: int) -> None:
        """Forget what was; `batch` sequences follow."""
        self.gap = torch.full((batch,), math.inf)

    def _look(self, router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        scores = output[0].sigmoid() + router.e_score_correction_bias
        by_group = scores.unflatten(-1, (router.num_group, -1))
        groups = by_group.topk(2, dim=-1).values.sum(-1)
        gap = torch.full(scores.shape[:1], math.inf)
        if router.topk_group < router.num_group:
            best = groups.topk(router.topk_group + 1, dim=-1)
            gap = best.values[:, -2] - best.values[:, -1]
            dropped = torch.ones_like(groups, dtype=torch.bool).scatter(1, best.indices[:, :-1], False)
            scores = by_group.masked_fill(dropped.unsqueeze(-1), -math.inf).flatten(-2)
        experts = scores.topk(router.top_k + 1, dim=-1).values
        gap = torch.minimum(gap, experts[:, -2] - experts[:, -1])
        self.gap = torch.minimum(self.gap, gap.view(len(self.gap), -1).amin(-1))


@torch.inference_mode()
def complete(model: Any, watch: RouterWatch, batch: Sequence[Completion], num_tokens: int) -> None:
    """Continue prompts of one length, which need no padding."""
    watch.start(len(batch))
    step = torch.tensor([one.prompt_ids for one in batch])
    tokens, margins, cache = [], [], transformers.DynamicCache(config=model.config)
    # transformers 5.24 has renamed the argument.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for _ in range(num_tokens):
        logits = model(step, use_cache=True, logits_to_keep=1, **{cache_name: cache}).logits[:, -1]
        best = logits.topk(2)
        tokens.append(best.indices[:, 0])
        margins.append(best.values[:, 0] - best.values[:, 1])
        step = best.indices[:, :1]
    for row, one in enumerate(batch):
        one.token_ids = [int(token[row]) for token in tokens]
        one.margins = [float(margin[row]) for margin in margins]
        one.router_gap = float(watch.gap[row])


def complete_all(model: Any, prompts: Iterator[Completion], count: int, num_tokens: int) -> list[Completion]:
    """The first `count` prompts whose routing is nowhere close to a tie, continued; fewer where there are no more."""
    watch = RouterWatch(model)
    kept: list[Completion] = []
    passed_over = 0
    while len(kept) < count:
        tried = list(islice(prompts, (count - len(kept)) * 3 // 2 + 1))
        if not tried:
            break
        by_length = defaultdict(list)
        for one in tried:
            by_length[len(one.prompt_ids)].append(one)
        for alike in by_length.values():
            for first in range(0, len(alike), MAX_BATCH):
                complete(model, watch, alike[first : first + MAX_BATCH], num_tokens)
        clear = [one for one in tried if one.router_gap >= MIN_ROUTER_GAP]
        passed_over += len(tried) - len(clear)
        kept += clear
    print(f"{passed_over} prompts passed over for routing close to a tie")
    return kept[:count]


# -- what people see --------------------------------------------------------------------------------------------------


def readability(one: Completion, tokenizer: Tokenizer) -> tuple[bool, bool, int]:
    """Whether no line comes twice, whether prompt and function compile together, tokens of the function's body.

    No tokens where the prompt opens no function at the top level, where the body does not end (a line starts at the
    left margin) within SHOWN_TOKENS, or where header and body do not compile.
    """
    text = tokenizer.decode(one.token_ids[:SHOWN_TOKENS])
    end = re.search(r"\n(?=\S)", text)
    body = text[: end.start()].rstrip() if end else ""
    if not FUNCTION.match(one.header) or not compiles(one.header + body):
        return False, False, 0
    lines = [line.strip() for line in (one.prompt + text).splitlines() if re.search(r"\w", line)]
    num_tokens = len(tokenizer.encode(body, add_special_tokens=False).ids)
    return len(set(lines)) == len(lines), compiles(one.prompt + body), num_tokens


def readable_first(completions: list[Completion], tokenizer: Tokenizer) -> list[Completion]:
    """The SHOWN most readable ones, of different areas, before the rest."""
    ranks = {id(one): readability(one, tokenizer) for one in completions}
    shown: list[Completion] = []
    for one in sorted(completions, key=lambda one: ranks[id(one)], reverse=True):
        if ranks[id(one)][-1] and len(shown) < SHOWN and one.area not in [other.area for other in shown]:
            shown.append(one)
    return shown + [one for one in completions if all(one is not other for other in shown)]


def write(path: Path, completions: Sequence[Completion]) -> None:
    """Write the file, a line for each completion."""
    source = (
        f"DeepseekV3ForCausalLM of transformers {transformers.__version__}, torch {torch.__version__}, float32, eager "
        "attention and experts, greedy (scripts/make_demo_reference.py)"
    )
    lines = (json.dumps(one.stored(), separators=(",", ":")) for one in completions)
    path.write_text(f'{{"source":{json.dumps(source)},"completions":[\n' + ",\n".join(lines) + "\n]}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the model's; reference.json goes there")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="JSON lines with path, area and text")
    parser.add_argument("--count", type=int, default=320, help="completions")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each")
    args = parser.parse_args()
    try:
        tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
        bos = tokenizer.token_to_id(json.loads((args.folder / "tokenizer_config.json").read_text())["bos_token"])
        prompts = all_prompts(args.heldout, lambda text: [bos, *tokenizer.encode(text, add_special_tokens=False).ids])
        completions = complete_all(load_model(args.folder), prompts, args.count, args.tokens)
    except (OSError, ValueError) as error:
        print(f"make_demo_reference.py: error: {error}", file=sys.stderr)
        return 2
    write(args.folder / "reference.json", readable_first(completions, tokenizer))
    print(f"{args.folder / 'reference.json'}: {len(completions)} completions of {args.tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

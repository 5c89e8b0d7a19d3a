"""Bodies larger than any model's context, sent beside a load: whether they hold up everybody else."""

import asyncio
import collections
import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.table import Table

from cmjax.bench.load import UrlTarget
from cmjax.bench.tables import new_table
from cmjax.text import JsonObject

PATIENCE_S = 600  # for one of them


@dataclasses.dataclass(frozen=True)
class LargeBody:
    """A request: what kind of body, where it goes, and its JSON."""

    kind: str
    path: str
    data: bytes


def _words(size: int, rng: np.random.Generator) -> str:
    """Random words, so that no tokenizer has seen them before: so many characters."""
    letters = rng.integers(ord("a"), ord("z") + 1, size, dtype=np.uint8)
    letters[rng.integers(0, 7, size, dtype=np.uint8) == 0] = ord(" ")
    return letters.tobytes().decode()


def _text(size: int, rng: np.random.Generator) -> JsonObject:
    return {"prompt": _words(size, rng)}


def _ids(size: int, rng: np.random.Generator) -> JsonObject:
    """Ids of two digits, which every vocabulary has: four bytes each."""
    return {"prompt": rng.integers(10, 100, size // 4).tolist()}


def _one_message(size: int, rng: np.random.Generator) -> JsonObject:
    return {"messages": [{"role": "user", "content": _words(size, rng)}]}


def _many_messages(size: int, rng: np.random.Generator) -> JsonObject:
    message = _one_message(20, rng)["messages"][0]
    return {"messages": [message] * (size // (len(json.dumps(message)) + 2))}


# Kind -> where it goes, and its fields for a number of bytes.
_KINDS: Mapping[str, tuple[str, Callable[[int, np.random.Generator], JsonObject]]] = {
    "text": ("/v1/completions", _text),
    "token ids": ("/v1/completions", _ids),
    "chat of one message": ("/v1/chat/completions", _one_message),
    "chat of many": ("/v1/chat/completions", _many_messages),
}


def make_bodies(count: int, num_bytes: int, model: str | None, rng: np.random.Generator) -> list[LargeBody]:
    """So many bodies of about `num_bytes`, each of a kind in turn; those of a kind share their bytes."""
    made = []
    for kind, (path, fields) in list(_KINDS.items())[:count]:
        body = {"model": model, "max_tokens": 1, **fields(num_bytes, rng)}
        made.append(LargeBody(kind, path, json.dumps(body).encode()))
    return [made[index % len(made)] for index in range(count)]


async def send_bodies(bodies: Sequence[LargeBody], target: UrlTarget) -> list[JsonObject]:
    """Send one after another, each when the last has been answered, from a thread, so that this loop goes on."""
    answers = []
    for body in bodies:
        begin = time.perf_counter()
        answer = await asyncio.to_thread(_post, target.url + body.path, body.data, target.headers)
        seconds = time.perf_counter() - begin
        answers.append({"kind": body.kind, "bytes": len(body.data), "answer": answer, "seconds": seconds})
    return answers


def _post(url: str, data: bytes, headers: Mapping[str, str]) -> str:
    """What comes back: the status, with the code of an error where it has one; or what went wrong."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as little in between as for the load
    request = urllib.request.Request(url, data, {**headers, "Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=PATIENCE_S) as answer:
            answer.read()
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return f"{error.code} {_code(error.read())}".strip()
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", None) or error) or type(error).__name__


def _code(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"]["code"] or "")
    except (ValueError, LookupError, TypeError):
        return ""


def bodies_table(answers: Sequence[JsonObject]) -> Table:
    """How those of each kind were answered, and how soon."""
    title = "Large bodies, one after another beside the load"
    table = new_table(title, "kind", "MB", "sent", "answered", "mean, s", "longest, s", numbers_from=1)
    groups = collections.defaultdict(list)
    for one in answers:
        groups[one["kind"], one["answer"]].append(one)
    for (kind, answer), ones in groups.items():
        seconds = [one["seconds"] for one in ones]
        size, times = f"{ones[0]['bytes'] / 1e6:,.1f}", (f"{np.mean(seconds):,.2f}", f"{max(seconds):,.2f}")
        table.add_row(kind, size, str(len(ones)), answer, *times)
    return table

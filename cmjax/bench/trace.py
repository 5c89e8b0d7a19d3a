"""What a load consists of: requests with their times of arrival, drawn or from a file."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.checkpoint import Tokenizer
from cmjax.errors import UserError
from cmjax.options import check_bounds, option, options_of
from cmjax.serve import SamplingParams
from cmjax.serve.settings import API_DEFAULTS
from cmjax.text import JsonObject

# What a request may say of its sampling; how many tokens it asks for is the trace's own.
SAMPLED = tuple(name for name, (one, _) in options_of(SamplingParams).items() if one.flag and name != "max_tokens")


@dataclasses.dataclass(frozen=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        arrival_s: seconds after the start.
        prompt_ids: token ids.
        max_tokens: to generate; the end of a text is ignored, so that there are as many.
        priority, tenant: as for `Engine.submit`; over HTTP a tenant is told by its key, so it is not sent.
        sampling: fields of `SamplingParams` that are sent, some of `SAMPLED`; for all others OpenAI's defaults hold.

    Raises:
        UserError: a field of `sampling` is out of bounds.
    """

    arrival_s: float
    prompt_ids: list[int]
    max_tokens: int
    priority: int = 0
    tenant: str = ""
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.params

    @property
    def params(self) -> SamplingParams:
        """For an engine: what a server would make of what is sent."""
        return SamplingParams(**{**API_DEFAULTS, **self.sampling, "max_tokens": self.max_tokens})

    @property
    def line(self) -> str:
        """The request as a line of a trace's file; see `read_trace`."""
        fields = {"arrival_s": self.arrival_s, "prompt": self.prompt_ids, "max_tokens": self.max_tokens}
        return json.dumps({**fields, "priority": self.priority, "tenant": self.tenant, **self.sampling})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """The requests of a load: from a file, or drawn."""

    file: Path | None = option(None, "JSON lines: see docs/load.md.", flag="--trace", metavar="FILE")
    speed: float = option(1.0, "Play it so many times as fast.", flag="--trace-speed", minimum=0, is_open=True)
    num_prompts: int = option(100, "Requests to draw.", flag="--num-prompts", minimum=1)
    request_rate: float = option(
        math.inf,
        "Requests a second; inf: all at once.",
        flag="--request-rate",
        minimum=0,
        is_open=True,
        maximum=math.inf,
    )
    burstiness: float = option(1.0, "1 is Poisson, less comes in bursts.", flag="--burstiness", minimum=0, is_open=True)
    input_len: str = option("16:96", "Tokens of a prompt: 128, 16:256 or lognormal:200,0.8.", flag="--input-len")
    output_len: str = option("32", "Tokens to generate, in the same words.", flag="--output-len")
    seed: int = option(0, "Of what is drawn.", flag="--seed")

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: one value, evenly from one to another, or log-normal with median and sigma."""

    kind: str
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """`128`, `16:256`, or `lognormal:200,0.8` (median, sigma of the logarithm).

        Raises:
            UserError: it is none of these.
        """
        try:
            if text.startswith("lognormal:"):
                median, sigma = map(float, text.removeprefix("lognormal:").split(","))
                found = cls("lognormal", median, sigma)
            elif ":" in text:
                found = cls("uniform", *map(int, text.split(":")))
            else:
                found = cls("fixed", int(text))
        except ValueError:
            raise UserError(f"{text!r} is no length: give 128, 16:256 or lognormal:200,0.8") from None
        if found.first < 1 or found.second < 0 or (found.kind == "uniform" and found.second < found.first):
            raise UserError(f"{text!r}: lengths must be positive, and a range ascend")
        return found

    def draw(self, rng: np.random.Generator, count: int, most: int) -> np.ndarray:
        """So many counts, 1 to `most`: `int64[count]`."""
        if self.kind == "fixed":
            drawn = np.full(count, self.first)
        elif self.kind == "uniform":
            drawn = rng.integers(int(self.first), int(self.second) + 1, count)
        else:
            drawn = np.exp(rng.normal(np.log(self.first), self.second, count))
        return np.clip(np.round(drawn), 1, most).astype(np.int64)


class Prompts:
    """Prompts of any length, cut from the held-out text, so that a trained model sees what it was trained for; random
    ids where there is no text."""

    def __init__(
        self, rng: np.random.Generator, vocab_size: int, tokenizer: Tokenizer | None, texts: Path | None
    ) -> None:
        self._rng, self._vocab_size, self._ids = rng, vocab_size, np.zeros(0, np.int64)
        if tokenizer is not None and texts is not None and texts.is_file():
            with texts.open(encoding="utf-8") as lines:
                some = [json.loads(line)["text"] for _, line in zip(range(64), lines, strict=False)]
            self._ids = np.concatenate([tokenizer.encode(text) for text in some])

    def cut(self, length: int) -> list[int]:
        """A prompt of so many tokens."""
        if len(self._ids) <= length:
            return [int(token) for token in self._rng.integers(0, self._vocab_size, length)]
        begin = int(self._rng.integers(0, len(self._ids) - length))
        return [int(token) for token in self._ids[begin : begin + length]]


def make_trace(
    settings: TraceSettings,
    tokenizer: Tokenizer | None,
    texts: Path,
    *,
    vocab_size: int,
    max_model_len: int,
    sampling: Mapping[str, Any] | None = None,
) -> list[TraceRequest]:
    """The trace that the settings say, of prompts cut from `texts` (see `Prompts`).

    Args:
        sampling: what each request sends, where it has no line that says otherwise.
    """
    rng = np.random.default_rng(settings.seed)
    prompts = Prompts(rng, vocab_size, tokenizer, texts)
    if settings.file is not None:
        trace = read_trace(settings.file, prompts, tokenizer, max_model_len=max_model_len, speed=settings.speed)
    else:
        trace = poisson_trace(
            settings.num_prompts,
            settings.request_rate,
            Lengths.parse(settings.input_len),
            Lengths.parse(settings.output_len),
            prompts,
            rng,
            max_model_len=max_model_len,
            burstiness=settings.burstiness,
        )
    return [dataclasses.replace(one, sampling={**(sampling or {}), **one.sampling}) for one in trace]


def poisson_trace(
    count: int,
    rate: float,
    input_len: Lengths,
    output_len: Lengths,
    prompts: Prompts,
    rng: np.random.Generator,
    *,
    max_model_len: int,
    burstiness: float = 1.0,
) -> list[TraceRequest]:
    """Requests that arrive independently, `rate` a second on the average; infinite: all at once.

    Args:
        burstiness: shape of the gamma distribution of the gaps; 1 is Poisson, less comes in bursts.
    """
    gaps = np.zeros(count) if np.isinf(rate) else rng.gamma(burstiness, 1 / (rate * burstiness), count)
    arrivals = np.cumsum(gaps)
    inputs = input_len.draw(rng, count, max_model_len - 1)
    outputs = np.minimum(output_len.draw(rng, count, max_model_len), max_model_len - inputs)
    return [
        TraceRequest(float(arrival), prompts.cut(int(length)), int(tokens))
        for arrival, length, tokens in zip(arrivals, inputs, outputs, strict=True)
    ]


def read_trace(
    path: Path, prompts: Prompts, tokenizer: Tokenizer | None, *, max_model_len: int, speed: float = 1.0
) -> list[TraceRequest]:
    """Requests from a file of JSON lines.

    A line has a time, `arrival_s` in seconds or `timestamp` in milliseconds; a prompt, `prompt` as text or token ids,
    or `input_length`; and `max_tokens` or `output_length`; perhaps `priority`, `tenant` and fields of `SAMPLED`.
    Requests longer than `max_model_len` are cut to it.

    Raises:
        UserError: a line that does not say so, by its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_parse(json.loads(line), prompts, tokenizer, max_model_len, speed))
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from error
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: no request of a trace: {error!r}") from error
    if not requests:
        raise UserError(f"{path}: no requests")
    first = min(request.arrival_s for request in requests)
    moved = [dataclasses.replace(request, arrival_s=request.arrival_s - first) for request in requests]
    return sorted(moved, key=lambda request: request.arrival_s)


def _parse(
    line: JsonObject, prompts: Prompts, tokenizer: Tokenizer | None, max_model_len: int, speed: float
) -> TraceRequest:
    arrival = float(line["arrival_s"]) if "arrival_s" in line else float(line["timestamp"]) / 1e3
    given = line.get("prompt")
    if isinstance(given, str):
        if tokenizer is None:
            raise ValueError("a prompt as text needs the model's tokenizer")
        ids: Sequence[int] = tokenizer.encode(given)
    elif given is not None:
        ids = [int(token) for token in given]
    else:
        ids = prompts.cut(min(int(line["input_length"]), max_model_len - 1))
    ids = list(ids[: max_model_len - 1])
    wanted = int(line["max_tokens"] if "max_tokens" in line else line["output_length"])
    if wanted < 1 or not ids or arrival < 0:
        raise ValueError("times, prompts and output lengths must be positive")
    tokens = min(wanted, max_model_len - len(ids))
    sampling = {name: line[name] for name in SAMPLED if line.get(name) is not None}
    priority, tenant = int(line.get("priority", 0)), str(line.get("tenant", ""))
    return TraceRequest(arrival / speed, ids, tokens, priority, tenant, sampling)

"""A list of prompts from the first to the last token, on an engine's threads."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cmjax.errors import UserError
from cmjax.serve.core import Core
from cmjax.serve.request import Request, RequestOutput
from cmjax.serve.workers import DecodeWorker, PrefillWorker, warm_up_handoff

# (what is under way, tokens so far, tokens in all)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class Timings:
    """Seconds and counts of a `generate` call; compilation is apart from the phases, which overlap.

    Attributes:
        compile_s: compiling and warming up the steps.
        prefill_s, prefill_tokens: prefill steps and the prompt tokens they computed.
        handoff_s: copying latents to the decode ranks.
        decode_s, decode_tokens, decode_steps: decode calls, the tokens taken from them, the steps they ran.
    """

    compile_s: float = 0.0
    prefill_s: float = 0.0
    prefill_tokens: int = 0
    handoff_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second of prefill."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second of decode."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What `Engine.generate` returns.

    Attributes:
        outputs: in the order of the prompts.
        timings: of the call.
        prefill_load, decode_load: `int64[moe layers, routed experts]`, rows by logical expert, the MTP layer's last.
        kept_drafts: `int64[k + 1]`, in how many of the requests' steps 0, 1, ... k drafts were kept.
    """

    outputs: list[RequestOutput]
    timings: Timings
    prefill_load: np.ndarray
    decode_load: np.ndarray
    kept_drafts: np.ndarray

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were kept; 0 without any."""
        num_drafts = len(self.kept_drafts) - 1
        offered = num_drafts * int(self.kept_drafts.sum())
        return float(self.kept_drafts @ np.arange(num_drafts + 1)) / offered if offered else 0.0


def run_to_end(
    core: Core,
    prefill: Mapping[str, PrefillWorker],
    decode: Mapping[str, DecodeWorker],
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> Timings:
    """Compile what the requests need, run them all, and say how long the phases took.

    Raises:
        UserError: a request ended with an error; the others are left as they are. What made an instance fail is raised
            as it is.
    """
    timings, notify = Timings(), progress or (lambda *_: None)
    num_output = sum(r.sampling.max_tokens for r in requests)
    notify("compile", 0, num_output)
    begin = time.perf_counter()
    _warm_up(core, prefill, decode, requests)
    timings.compile_s = time.perf_counter() - begin
    for worker in (*prefill.values(), *decode.values()):
        worker.instance.take_expert_load()
    core.take_error()
    for activity in (core.prefill, core.handoff, core.decode):
        activity.reset()
    notify("prefill", 0, num_output)  # compiled: what is counted from here on is the requests' own
    with core.changed:
        for request in requests:
            core.scheduler.submit(request)
        core.scheduler.admit()
        core.changed.notify_all()
    is_done = not requests
    while not is_done:
        with core.changed:
            core.changed.wait(0.2)
            errors = [r.error for r in requests if r.error is not None]
            is_done = all(r.stage == "done" for r in requests)
        if errors:
            raise core.take_error() or UserError(errors[0])
        num_done = sum(len(r.token_ids) for r in requests)
        notify("decode" if core.decode.tokens else "prefill", num_done, num_output)
    timings.prefill_s, timings.prefill_tokens = core.prefill.seconds, core.prefill.tokens
    timings.handoff_s = core.handoff.seconds
    timings.decode_s, timings.decode_tokens = core.decode.seconds, core.decode.tokens
    timings.decode_steps = core.decode.steps
    return timings


def _warm_up(
    core: Core, prefill: Mapping[str, PrefillWorker], decode: Mapping[str, DecodeWorker], requests: Sequence[Request]
) -> None:
    """Compile the steps these requests will need, so that the phases time only themselves."""
    if not requests:
        return
    lengths, samplings = [len(r.prompt_ids) for r in requests], [r.sampling for r in requests]
    share = min(sum(lengths), sum(lengths) // len(prefill) + max(lengths))
    for source in prefill.values():
        source.run_task(functools.partial(source.instance.warm_up, share, samplings)).result()
    if any(r.will_decode for r in requests):
        for target in decode.values():
            target.run_task(functools.partial(target.instance.warm_up, target.num_steps, samplings)).result()
        warm_up_handoff(prefill, decode)
    with core.changed:
        for source in prefill.values():
            source.rejoin()

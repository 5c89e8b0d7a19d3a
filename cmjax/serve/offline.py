"""A list of prompts from the first to the last token, on an engine's threads."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from cmjax.errors import UserError
from cmjax.schedule import CompilePlan, Request, RequestOutput
from cmjax.serve.core import Core
from cmjax.serve.fleet import Fleet

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


def run_to_end(core: Core, fleet: Fleet, requests: Sequence[Request], progress: Progress | None = None) -> Timings:
    """Compile what the requests need, run them all, and say how long the phases took; the instances' threads run.

    Raises:
        UserError: a request ended with an error; the others are left as they are. What made an instance fail is raised
            as it is.
    """
    timings, notify, scheduler = Timings(), progress or (lambda *_: None), core.scheduler
    prompt_tokens_before = scheduler.num_prompt_tokens
    num_output = sum(r.sampling.max_tokens for r in requests)
    notify("compile", 0, num_output)
    begin = time.perf_counter()
    _compile(fleet, requests)
    timings.compile_s = time.perf_counter() - begin
    for activity in core.activities.values():
        activity.reset()
    notify("prefill", 0, num_output)  # compiled: what is counted from here on is the requests' own
    with core.changed:
        for planner in scheduler.decode.values():
            planner.is_patient = True
        for request in requests:
            scheduler.submit(request)
        core.changed.notify_all()
    is_done = not requests
    while not is_done:
        with core.changed:
            core.changed.wait(0.2)
            errors = [r.error for r in requests if r.error is not None]
            is_done = all(r.finish_reason is not None for r in requests)
            num_done = sum(len(r.token_ids) for r in requests)
            has_decoded = any(one.num_calls for one in scheduler.decode.values())
        if errors:
            causes = [one.last_error for one in scheduler.planners if one.last_error is not None]
            raise next((cause for cause in causes if str(cause) in errors[0]), UserError(errors[0]))
        notify("decode" if has_decoded else "prefill", num_done, num_output)
    timings.prefill_s, timings.prefill_tokens = core.activities["prefill"].seconds, scheduler.num_prompt_tokens
    timings.prefill_tokens -= prompt_tokens_before
    timings.handoff_s = core.activities["handoff"].seconds
    timings.decode_s = core.activities["decode"].seconds
    timings.decode_tokens = sum(one.num_tokens for one in scheduler.decode.values())
    timings.decode_steps = sum(one.num_steps for one in scheduler.decode.values())
    return timings


def _compile(fleet: Fleet, requests: Sequence[Request]) -> None:
    """Compile the steps these requests will need, so that the phases time only themselves."""
    if not requests:
        return
    lengths, samplings = [len(r.prompt_ids) for r in requests], [r.sampling for r in requests]
    share = min(sum(lengths), sum(lengths) // len(fleet.prefill) + max(lengths))
    # A call takes no more steps than any of the requests can use, its first token coming from prefill.
    most = max(one.max_tokens - 1 for one in samplings)
    num_steps = max(1, min(fleet.settings.steps_per_call, most))
    targets = tuple(fleet.decode) if most else ()
    fleet.compile(
        {name: CompilePlan(one.variants_for(share, samplings), targets) for name, one in fleet.prefill.items()}
        | {name: CompilePlan(one.variants_for(num_steps, samplings)) for name, one in fleet.decode.items() if most}
    )
    fleet.open()

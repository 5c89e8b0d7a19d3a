"""`cmjax bench pipeline`: a decode step of two microbatches beside the plain one, with exchanges that take time."""

import dataclasses
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from cmjax.bench.decode import Filled, prefilled_prompts
from cmjax.bench.report import in_turn, machine
from cmjax.bench.tables import define, new_table
from cmjax.errors import UserError
from cmjax.mesh import bring_up, fabric
from cmjax.model import Model, ModelConfig, init_params, params_digest
from cmjax.serve import StepSpec, decode
from cmjax.text import JsonObject

# As in the paper's figures, a long cache: core attention is most of a step, and half of the rows take half of its time.
# Where reading weights is most of it, as in a small model with a short cache, each microbatch reads them again.
CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=16,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    moe_intermediate_size=64,
    num_routed_experts=64,
    num_shared_experts=1,
    num_topk=4,
    num_expert_groups=1,
    num_topk_groups=1,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    max_position_embeddings=8192,
)
CACHE_TOKENS = 8000
_NUM_PROMPTS = 2  # distinct ones, which all sequences go on from
BOUNDS = {"with_delay": 0.75, "without_delay": 1.1}
DEFINITIONS = {
    "delay": "the fabric completes an exchange no earlier than its bytes x delay after its start; the delay is such "
    "that the exchanges of the plain step take as long as the whole step without delay",
    "ratio": "two microbatches over one, medians of the rounds, in which all four take turns",
    "exposed": "of the time that exchanges take, what was still to come when the last device had done the work that it "
    "hides behind",
    "equal": "tokens that are those of the plain step",
}
# Scopes of a step's operations -> the lane of the timeline that shows them.
_LANES = {
    "attention": "attention",
    "oproj": "attention",
    "gate": "attention",
    "shared_expert": "attention",
    "moe": "experts",
}


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that ran on one device: microbatch "a" or "b", what it was, and when, in seconds of the profile."""

    microbatch: str
    lane: str  # "attention", "experts" or "exchange"
    begin: float
    end: float


def run(
    model: Model | None = None,
    *,
    ep_size: int = 8,
    seqs_per_rank: int = 8,
    cache_tokens: int = CACHE_TOKENS,
    num_steps: int = 4,
    rounds: int = 7,
    seed: int = 0,
) -> tuple[JsonObject, list[Span]]:
    """Time the two forms with and without a modelled delay; also what one device did in a step of two microbatches.

    Args:
        model: None: a random one of `CONFIG`.
        seqs_per_rank: sequences of each rank, even.
        cache_tokens: tokens in the cache of each sequence when a call starts.
        num_steps: decode steps a call.
        rounds: calls timed of each form, in turn; figures are medians.
    """
    if model is None:
        params = init_params(CONFIG, seed)
        model = Model(CONFIG, params, params_digest(CONFIG, params))
    if seqs_per_rank % 2:
        raise UserError(f"microbatches 2 do not divide the {seqs_per_rank} sequences of a rank")
    if not model.config.moe_layer_ids or ep_size < 2:
        raise UserError("two microbatches hide exchanges: the model needs experts, and --ep at least 2 devices")
    devices = bring_up(ep_size)
    source = prefilled_prompts(model, devices[0], cache_tokens, seed, _NUM_PROMPTS)
    filled = Filled(model, devices[:ep_size], source, seqs_per_rank, num_steps, seed)
    plain = filled.instance.spec
    two = dataclasses.replace(plain, rank=dataclasses.replace(plain.rank, microbatches=2))
    waits: dict[str, list[np.ndarray]] = {}

    def call(name: str, spec: StepSpec, delay: float) -> Callable[[], None]:
        def timed() -> None:
            _set_delay(delay)
            before = _waits()
            filled.tokens(spec, num_steps)
            waits.setdefault(name, []).append(_waits() - before)

        return timed

    try:
        delay = _calibrate(lambda: filled.tokens(plain, num_steps), rounds)
        forms = {"plain": (plain, 0.0), "two": (two, 0.0), "plain delayed": (plain, delay), "two delayed": (two, delay)}
        seconds = in_turn({name: call(name, *form) for name, form in forms.items()}, rounds)
        _set_delay(delay)
        spans = _profile(filled, two)
    finally:
        fabric.configure(delay=None)
    step_s = {name: float(np.median(taken)) / num_steps for name, taken in seconds.items()}
    same = filled.tokens(two, num_steps) == filled.tokens(plain, num_steps)
    return {
        "benchmark": "pipeline",
        "machine": machine(),
        "settings": {
            "ep_size": ep_size,
            "seqs_per_rank": seqs_per_rank,
            "cache_tokens": cache_tokens,
            "num_steps": num_steps,
            "rounds": rounds,
        },
        "delay_s_per_byte": delay,
        "step_s": step_s,
        "results": {
            "with_delay": step_s["two delayed"] / step_s["plain delayed"],
            "without_delay": step_s["two"] / step_s["plain"],
            "plain_delayed_over_plain": step_s["plain delayed"] / step_s["plain"],
        },
        "exposed": {name: _exposed(waits[f"{name} delayed"]) for name in ("plain", "two")},
        "equal": float(same.mean()),
        "bounds": BOUNDS,
        "definitions": DEFINITIONS,
    }, spans


def _set_delay(seconds_per_byte: float) -> None:
    model = fabric.DelayModel({"ub": 0.0}, {"ub": 1.0}, seconds_per_byte) if seconds_per_byte else None
    fabric.configure(delay=model)


def _calibrate(call: Callable[[], object], rounds: int) -> float:
    """The delay, in seconds a byte, with which the exchanges of a call take as long as a call without delay.

    The exchanges of the plain step come one after the other, and the counters say what the delay makes of each.
    """
    unit = 1e-9
    _set_delay(unit)
    call()
    before = _waits()
    call()
    bytes_in_turn = (_waits() - before)[0] / unit
    _set_delay(0.0)
    return float(np.median(in_turn({"call": call}, rounds)["call"])) / bytes_in_turn


def _waits() -> np.ndarray:
    """Seconds that all exchanges so far were made to take, and how much of it was still to come after all work."""
    entries = fabric.traffic.snapshot().entries
    return np.array([sum(entry.modelled_s for entry in entries), sum(entry.exposed_s for entry in entries)])


def _exposed(waits: list[np.ndarray]) -> float:
    modelled, exposed = np.median(waits[1:], axis=0)  # the first call compiles
    return float(exposed / modelled)


def _profile(filled: Filled, spec: StepSpec) -> list[Span]:
    """What device 0 did in one step, by XLA's profiler: the operations' scopes say whose they are."""
    inst = filled.instance
    arguments = (inst.params, inst.expert_to_slot, inst.cache, filled.state)
    text = decode.lower(*arguments, spec=spec, num_steps=1).compile().as_text()
    scopes = dict(re.findall(r"%?([\w.-]+) = [^\n]*op_name=\"([^\"]*)\"", text or ""))
    with tempfile.TemporaryDirectory(prefix="cmjax-profile-") as folder:
        filled.tokens(spec, 1)
        with jax.profiler.trace(folder):
            filled.tokens(spec, 1)
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    operations = [
        (event["args"]["hlo_op"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event.get("ph") == "X" and event.get("args", {}).keys() >= {"hlo_op", "device_ordinal"}
        if event["args"]["device_ordinal"] == "0"
    ]
    return spans_of(operations, scopes)


def spans_of(events: list[tuple[str, float, float]], scopes: dict[str, str]) -> list[Span]:
    """Operations of one device, `(name, begin, end)`, as spans; `scopes` says where in the program each name belongs.

    An exchange lasts from its start to the first operation that uses what it brought.
    """
    spans: list[Span] = []
    under_way: dict[tuple[str, str], float] = {}  # (microbatch, exchange) -> since when
    is_over: set[tuple[str, str]] = set()
    for name, begin, end in sorted(events, key=lambda event: event[1]):
        parts = scopes.get(name, "").split("/")
        microbatch = next((part for part in parts if part in ("a", "b")), None)
        if microbatch is None:
            continue
        scope = next((part for part in parts if part in (*_LANES, "dispatch", "combine")), "")
        for key in [key for key in is_over if key[0] == microbatch]:
            if not name.startswith("fabric_"):
                spans.append(Span(microbatch, "exchange", under_way.pop(key), begin))
                is_over.discard(key)
        if name.startswith("fabric_ragged_all_to_all_start"):
            under_way[microbatch, scope] = begin
        elif name.startswith("fabric_ragged_all_to_all_done") and (microbatch, scope) in under_way:
            is_over.add((microbatch, scope))
        elif scope in _LANES:
            spans.append(Span(microbatch, _LANES[scope], begin, end))
    return spans


def draw(path: Path, spans: list[Span], title: str) -> None:
    """Save the timeline as a picture: a lane for each microbatch's attention, exchanges and experts."""
    from matplotlib.figure import Figure

    lanes = [(microbatch, lane) for microbatch in "ab" for lane in ("attention", "exchange", "experts")]
    colors = {"attention": "tab:blue", "exchange": "tab:red", "experts": "tab:green"}
    first = min((span.begin for span in spans), default=0.0)
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots()
    for row, (microbatch, lane) in enumerate(lanes):
        bars = [s for s in spans if (s.microbatch, s.lane) == (microbatch, lane)]
        axes.broken_barh(
            [((s.begin - first) * 1e3, (s.end - s.begin) * 1e3) for s in bars],
            (row - 0.4, 0.8),
            facecolor=colors[lane],
            # A line between a dispatch and the combine that follows at once; other bars are made of many operations.
            edgecolor="white" if lane == "exchange" else colors[lane],
        )
    axes.set_yticks(range(len(lanes)), [f"{microbatch.upper()} {lane}" for microbatch, lane in lanes])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def tables(report: JsonObject) -> list[Table]:
    """Step times of `cmjax bench pipeline`."""
    settings, step_s = report["settings"], report["step_s"]
    title = (
        f"A decode step, {settings['ep_size']} devices, {settings['seqs_per_rank']} sequences a rank, "
        f"{settings['cache_tokens']:,} tokens cached of each; median of {settings['rounds']} calls of "
        f"{settings['num_steps']} steps"
    )
    table = new_table(title, "exchanges", "one, ms", "two, ms", "ratio", "bound", numbers_from=1)
    for name, suffix, key in (("as they are", "", "without_delay"), ("delayed", " delayed", "with_delay")):
        times = (f"{step_s[form + suffix] * 1e3:.1f}" for form in ("plain", "two"))
        table.add_row(name, *times, f"{report['results'][key]:.2f}", f"{report['bounds'][key]:g}")
    exposed = f"{report['exposed']['plain']:.0%} with one, {report['exposed']['two']:.0%} with two"
    notes = {"equal": f"{report['definitions']['equal']}: {report['equal']:.2%}"}
    notes["exposed"] = f"{report['definitions']['exposed']}: {exposed}"
    return [define(table, report["definitions"] | notes)]

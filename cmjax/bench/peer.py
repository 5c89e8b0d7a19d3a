"""`cmjax bench peer`: one device against Hugging Face transformers and llama.cpp, on the same weights, in turn."""

import contextlib
import dataclasses
import datetime
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from cmjax.bench.peer_process import Peer, start_peers
from cmjax.bench.report import in_turn, machine
from cmjax.bench.tables import define, new_table
from cmjax.checkpoint import load, save_hf
from cmjax.mesh import Instance, bring_up
from cmjax.model import Model, ModelConfig, init_params, num_params
from cmjax.schedule import blocks_for
from cmjax.serve import DecodeExecutor, EngineSettings, PrefillExecutor, SamplingParams, decode, prefill
from cmjax.serve.instances.direct import fill, plan_prompts, prefill_prompts
from cmjax.text import JsonObject

# DeepSeek-V3's shape, scaled down to about 200 million parameters.
CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=16000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    moe_intermediate_size=256,
    num_routed_experts=64,
    num_shared_experts=1,
    num_topk=8,
    num_expert_groups=8,
    num_topk_groups=4,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    max_position_embeddings=1024,
)
FORMATS = ("bfloat16", "float32", "int8")
# What two sides may differ by: in float32 they only add up in different orders. In the others each rounds where it
# likes, and now and then that gives a token another expert, so that single logits differ by much: the root mean square
# counts, as a share of the logits' standard deviation. Each side is about as far from float32; unrelated logits: 1.4.
MAX_LOGIT_DIFF = 1e-3
MAX_RMS_SHARE = {"bfloat16": 0.3, "int8": 0.45}
DEFINITIONS = {
    "decode": "greedy steps from a cache of the given length; cmjax runs them in one call, a peer one forward each",
    "prefill": "one forward over the prompts that fills the cache, with the logits of each last token",
    "transformers": "without torch.compile, its attention as it comes, and of its expert implementations the fastest "
    "for the job",
    "llama.cpp": "a GGUF of the same weights as llama.cpp's own converter names them, a cache in float16 (float32: "
    "float32), all cores; with or without flash attention, one cache or one a sequence, as is fastest for the job",
    "int8": "cmjax's int8 (matrices of attention and FFN) beside llama.cpp's Q8_0 (every matrix)",
    "logits": f"over whole sequences, before anything is timed: in float32 no two differ by over {MAX_LOGIT_DIFF}, "
    "else the root mean square of the differences is at most "
    + ", ".join(f"{bound} ({name})" for name, bound in MAX_RMS_SHARE.items())
    + " of the logits' standard deviation",
    "speedup": "the peer's time by cmjax's, of medians",
}

_BLOCK_SIZE = 16
_SETTLE_S = 0.3  # OpenMP threads of the peers go on spinning for a while after their work


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed: decode at each batch over a cache of `length` tokens, and prefill of prompts of that length."""

    decode_batches: tuple[int, ...] = (1, 8, 32)
    prefill_batch: int = 8
    length: int = 128
    num_steps: int = 16


def run(
    config: ModelConfig = CONFIG,
    *,
    formats: Sequence[str] | None = None,
    sizes: Sizes | None = None,
    rounds: int = 5,
    seed: int = 0,
    peer_python: str | None = None,
    llama_python: str | None = None,
    on_result: Callable[[JsonObject], None] | None = None,
) -> JsonObject:
    """Time decode and prefill of a random model on one device, and of the peers that there are.

    Args:
        formats: of `FORMATS`; by default those of the peers.
        rounds: timed runs of each, in turn; figures are medians.
        peer_python: an interpreter that has torch and transformers. Without either one, this one is looked at.
        llama_python: an interpreter that has llama-cpp-python and gguf.
        on_result: called with each row as it is ready.
    """
    sizes = sizes or Sizes()
    results: list[JsonObject] = []
    logits: list[JsonObject] = []
    with contextlib.ExitStack() as ends:
        peers = start_peers(peer_python, llama_python, ends)
        bring_up(1)
        formats = formats or (FORMATS if llama_python else FORMATS[:2])
        path = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="cmjax-bench-"))) / "model"
        params = init_params(config, seed=seed)
        num_parameters = num_params(params)
        save_hf(path, config, params)
        del params
        for name in formats:
            quantized = name == "int8"
            model = load(path, dtype="bfloat16" if quantized else name, quant="int8" if quantized else None)
            able = [peer for peer in peers if name in peer.formats]
            rng = np.random.default_rng(seed)
            for peer in able:
                peer.load(path, name)
            found = _logit_diffs(model, name, able, rng)
            logits += found
            if not all(one["agrees"] for one in found):
                continue  # times of what computes something else say nothing
            jobs = [("decode", batch) for batch in sizes.decode_batches]
            for job, batch in [*jobs, ("prefill", sizes.prefill_batch)]:
                results.append(_measure(job, batch, model, able, sizes, rounds, rng) | {"format": name})
                if on_result:
                    on_result(results[-1])
    versions = {name: version for peer in peers for name, version in peer.versions.items()}
    return {
        "benchmark": "peer",
        "machine": machine() | versions | {"date": datetime.date.today().isoformat()},
        "settings": dataclasses.asdict(sizes) | {"rounds": rounds, "num_parameters": num_parameters},
        "results": results,
        "logits": logits,
        "logits_agree": all(one["agrees"] for one in logits) if logits else None,
        "peers": {peer.name: peer.versions for peer in peers},
        "peer_python": peer_python,
        "llama_python": llama_python,
        "definitions": DEFINITIONS,
    }


def _measure(
    job: str, batch: int, model: Model, peers: Sequence[Peer], sizes: Sizes, rounds: int, rng: np.random.Generator
) -> JsonObject:
    """One row: seconds a step (or a prefill), and tokens/s, of every side."""
    prompts = rng.integers(0, model.config.vocab_size, (batch, sizes.length))
    steps = sizes.num_steps if job == "decode" else 1
    ours = decode_call(model, prompts, steps) if job == "decode" else prefill_call(model, prompts)
    contenders: dict[str, Callable[[], object]] = {"cmjax": ours}
    ways = {}
    for peer in peers:
        ways[peer.name] = peer.prepare(job, prompts, steps)
        contenders[peer.name] = peer.run
    seconds = in_turn(contenders, rounds, pause_s=_SETTLE_S if peers else 0.0)
    tokens = batch * (1 if job == "decode" else sizes.length)
    sides: dict[str, JsonObject] = {}
    for name, taken in seconds.items():
        each = float(np.median(taken)) / steps
        sides[name] = {"seconds": each, "tokens_per_s": tokens / each}
        if name != "cmjax":
            sides[name] |= {"way": ways[name], "speedup": each / sides["cmjax"]["seconds"]}
    return {"job": job, "batch": batch, "tokens": tokens, "sides": sides}


def _logit_diffs(model: Model, number_format: str, peers: Sequence[Peer], rng: np.random.Generator) -> list[JsonObject]:
    """How far each peer's logits are from ours, and whether that is within the bound."""
    ids = rng.integers(0, model.config.vocab_size, (2, 64))
    ours = np.asarray(model.logits(ids)) if peers else np.zeros(0)
    found = []
    for peer in peers:
        diff = peer.logits(ids) - ours
        largest, rms = float(np.abs(diff).max()), float(np.sqrt((diff**2).mean((1, 2, 3)).max()) / ours.std())
        # Not a number is no agreement.
        agrees = largest <= MAX_LOGIT_DIFF if number_format == "float32" else rms <= MAX_RMS_SHARE[number_format]
        found.append(
            {"peer": peer.name, "format": number_format, "max_abs": largest, "rms_share": rms, "agrees": agrees}
        )
    return found


# -- cmjax ------------------------------------------------------------------------------------------------------------


def _prefill_executor(model: Model, prompts: np.ndarray) -> PrefillExecutor:
    batch, length = prompts.shape
    settings = EngineSettings(
        max_model_len=length,
        max_num_seqs_per_rank=batch,
        block_size=_BLOCK_SIZE,
        max_num_batched_tokens=batch * length,
    )
    instance = Instance("prefill0", "prefill", tuple(jax.devices()[:1]))
    return PrefillExecutor(model, instance, settings, batch * blocks_for(length, _BLOCK_SIZE))


def prefill_call(model: Model, prompts: np.ndarray) -> Callable[[], object]:
    """A call that prefills `prompts int[batch, length]` in one step on the first device; it is compiled here."""
    source = _prefill_executor(model, prompts)
    packed = source.pack(plan_prompts(source, prompts.tolist()))
    arguments = (packed, None, None)
    step = prefill.lower(source.params, source.expert_to_slot, source.cache, *arguments, spec=source.spec).compile()

    def call() -> np.ndarray:
        output = step(source.params, source.expert_to_slot, source.cache, *arguments)
        source.cache = output.cache
        return np.asarray(output.token_ids)

    return call


def decode_call(model: Model, prompts: np.ndarray, num_steps: int) -> Callable[[], object]:
    """A call of `num_steps` steps from the end of the prompts, each time from the same state; it is compiled here."""
    source = _prefill_executor(model, prompts)
    batch, length = prompts.shape
    settings = EngineSettings(max_model_len=length + num_steps, max_num_seqs_per_rank=batch, block_size=_BLOCK_SIZE)
    instance = Instance("decode0", "decode", tuple(jax.devices()[:1]))
    target = DecodeExecutor(model, instance, settings, batch * settings.max_blocks)
    prefilled = prefill_prompts(source, prompts.tolist())
    params = SamplingParams(max_tokens=num_steps + 1)
    state = target.enter(fill(source, target, prefilled, [one.token_id for one in prefilled], params, num_steps))
    arguments = (target.params, target.expert_to_slot)
    step = decode.lower(*arguments, target.cache, state, spec=target.spec, num_steps=num_steps).compile()

    def call() -> np.ndarray:
        output = step(*arguments, target.cache, state)
        target.cache = output.cache
        return np.asarray(output.token_ids)

    return call


def tables(report: JsonObject) -> list[Table]:
    """All sides of `cmjax bench peer`, or ours alone."""
    settings = report["settings"]
    title = (
        f"{settings['num_parameters'] / 1e6:.0f} M parameters on one device, {settings['length']} tokens; "
        f"median of {settings['rounds']}"
    )
    columns = ["job", "batch", "format", "cmjax ms", "tokens/s"]
    for name in report["peers"]:
        columns += [f"{name} ms", "tokens/s", "its way", "speedup"]
    table = new_table(title, *columns, numbers_from=3)
    for row in report["results"]:
        ours = row["sides"]["cmjax"]
        cells = [row["job"], str(row["batch"]), row["format"]]
        cells += [f"{ours['seconds'] * 1e3:.1f}", f"{ours['tokens_per_s']:,.0f}"]
        for name in report["peers"]:
            side = row["sides"].get(name)
            if side is None:
                cells += ["-"] * 4
            else:
                cells += [f"{side['seconds'] * 1e3:.1f}", f"{side['tokens_per_s']:,.0f}", side["way"]]
                cells.append(f"{side['speedup']:.2f}")
        table.add_row(*cells)
    notes = {}
    if not report["peers"]:
        notes["no peer"] = "install torch and transformers in this environment, or give --peer-python or --llama-python"
    for one in report["logits"]:
        notes[f"logits, {one['format']}, {one['peer']}"] = describe(one)
    return [define(table, report["definitions"] | notes)]


def describe(one: JsonObject) -> str:
    """How far the logits of a peer are from ours, in words."""
    return f"differ by at most {one['max_abs']:.2g}, {one['rms_share']:.2g} of their standard deviation (r.m.s.)"

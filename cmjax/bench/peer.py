"""`cmjax bench peer`: one device against Hugging Face transformers, the same weights in the same process."""

import dataclasses
import importlib.util
import inspect
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cmjax.bench.report import in_turn, machine
from cmjax.mesh import Instance, bring_up
from cmjax.model import Model, ModelConfig, init_params, load, num_params, save_hf
from cmjax.serve import DecodeInstance, EngineSettings, PrefillInstance, SamplingParams, decode, hand_off
from cmjax.serve.block_pool import blocks_for
from cmjax.serve.request import Request, plan_chunks

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
DTYPES = ("bfloat16", "float32")
MAX_LOGIT_DIFF = 1e-3  # float32; the two add up in different orders
# The ways transformers has to run experts; the one that is fastest for a job stands for it. "batched_mm" copies an
# expert's weights for every row, which is out of the question for a prefill.
PEER_EXPERTS = {"decode": ("grouped_mm", "batched_mm", "eager"), "prefill": ("grouped_mm", "eager")}
DEFINITIONS = {
    "decode": "greedy steps from a cache of the given length; cmjax runs them in one call, transformers one forward "
    "each, with its DynamicCache",
    "prefill": "one forward over the prompts that fills the cache, with the logits of each last token",
    "peer": "transformers without torch.compile, its attention as it comes, and of its expert implementations the "
    "fastest for the job",
    "logits": f"largest difference of any logit over whole sequences; at most {MAX_LOGIT_DIFF} in float32",
}

_BLOCK_SIZE = 16
_SETTLE_S = 0.3  # OpenMP threads of torch go on spinning for a while after their work


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
    dtypes: Sequence[str] = DTYPES,
    sizes: Sizes | None = None,
    rounds: int = 5,
    seed: int = 0,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Time decode and prefill of a random model on one device, and of transformers where it is installed.

    Args:
        rounds: timed runs of each, in turn; figures are medians.
        on_result: called with each row as it is ready.
    """
    sizes = sizes or Sizes()
    bring_up(1)
    peer_versions = find_peer()
    results, logits = [], {}
    with tempfile.TemporaryDirectory(prefix="cmjax-bench-") as folder:
        path = Path(folder) / "model"
        save_hf(path, config, init_params(config, seed=seed))
        for dtype in dtypes:
            model = load(path, dtype=dtype)
            peer = _Peer(path, dtype) if peer_versions else None
            rng = np.random.default_rng(seed)
            if peer is not None:
                logits[dtype] = _logit_diff(model, peer, rng)
            for job, batch in (
                *(("decode", batch) for batch in sizes.decode_batches),
                ("prefill", sizes.prefill_batch),
            ):
                results.append(_measure(job, batch, model, peer, sizes, rounds, rng) | {"dtype": dtype})
                if on_result:
                    on_result(results[-1])
        num_parameters = num_params(model.params)
    return {
        "benchmark": "peer",
        "machine": machine() | (peer_versions or {}),
        "settings": dataclasses.asdict(sizes) | {"rounds": rounds, "num_parameters": num_parameters},
        "results": results,
        "logits_max_abs_diff": logits,
        "logits_agree": logits["float32"] <= MAX_LOGIT_DIFF if "float32" in logits else None,
        "peer": peer_versions,
        "definitions": DEFINITIONS,
    }


def find_peer() -> dict[str, str] | None:
    """Versions of torch and transformers, or None where one of them is missing."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return None
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _measure(
    job: str, batch: int, model: Model, peer: "_Peer | None", sizes: Sizes, rounds: int, rng: np.random.Generator
) -> dict[str, Any]:
    """One row: seconds a step (or a prefill), and tokens/s, of both."""
    prompts = rng.integers(0, model.config.vocab_size, (batch, sizes.length))
    steps = sizes.num_steps if job == "decode" else 1
    ours = _decode_call(model, prompts, steps) if job == "decode" else _prefill_call(model, prompts)
    contenders: dict[str, Callable[[], object]] = {"cmjax": ours}
    experts = None
    if peer is not None:
        experts, contenders["transformers"] = peer.fastest(job, prompts, steps)
    seconds = in_turn(contenders, rounds, pause_s=_SETTLE_S if peer is not None else 0.0)
    tokens = batch * (1 if job == "decode" else sizes.length)
    row: dict[str, Any] = {"job": job, "batch": batch, "tokens": tokens, "peer_experts": experts}
    for name, taken in seconds.items():
        row[f"{name}_s"] = float(np.median(taken)) / steps
        row[f"{name}_tokens_per_s"] = tokens / row[f"{name}_s"]
    if peer is not None:
        row["speedup"] = row["transformers_s"] / row["cmjax_s"]
    return row


# -- cmjax ------------------------------------------------------------------------------------------------------------


def _prefill_instance(model: Model, prompts: np.ndarray) -> tuple[PrefillInstance, list[Request]]:
    batch, length = prompts.shape
    settings = EngineSettings(
        max_model_len=length,
        max_num_seqs_per_rank=batch,
        block_size=_BLOCK_SIZE,
        max_num_batched_tokens=batch * length,
    )
    instance = Instance("prefill0", "prefill", tuple(jax.devices()[:1]))
    source = PrefillInstance(model, instance, settings, batch * blocks_for(length, _BLOCK_SIZE))
    params = SamplingParams(max_tokens=1)
    return source, [Request(index, prompt.tolist(), params) for index, prompt in enumerate(prompts)]


def _prefill_call(model: Model, prompts: np.ndarray) -> Callable[[], object]:
    source, requests = _prefill_instance(model, prompts)
    lengths = [len(request.prompt_ids) for request in requests]
    tables = [source.pool.take(blocks_for(length, _BLOCK_SIZE)) for length in lengths]
    (chunks,) = plan_chunks(lengths, source.num_step_tokens, source.max_sequences)
    packed = source.pack(requests, tables, chunks)
    return lambda: np.asarray(source.step(packed).token_ids)


def _decode_call(model: Model, prompts: np.ndarray, num_steps: int) -> Callable[[], object]:
    """A call of `num_steps` steps from the end of the prompts, each time from the same state."""
    source, requests = _prefill_instance(model, prompts)
    batch, length = prompts.shape
    settings = EngineSettings(max_model_len=length + num_steps, max_num_seqs_per_rank=batch, block_size=_BLOCK_SIZE)
    instance = Instance("decode0", "decode", tuple(jax.devices()[:1]))
    target = DecodeInstance(model, instance, settings, batch * settings.max_blocks)
    params = SamplingParams(max_tokens=num_steps + 1)
    requests = [dataclasses.replace(request, sampling=params) for request in requests]
    for request in requests:
        target.reserve(request)
    for ended in source.run(requests):
        hand_off(source, target, ended)
        for one in ended:
            one.request.append([one.token_id])
    state = jax.device_put(target.host_batch(), target.spec.by_rank())

    def call() -> np.ndarray:
        output = decode(
            target.params, target.expert_to_slot, target.cache, state, spec=target.spec, num_steps=num_steps
        )
        target.cache = output.cache
        return np.asarray(output.token_ids)

    return call


# -- the peer ---------------------------------------------------------------------------------------------------------


class _Peer:
    """The model in transformers."""

    def __init__(self, path: Path, dtype: str) -> None:
        import torch
        import transformers

        with _quiet(transformers):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.model = loaded.eval()
        # Renamed in transformers 5.24.
        is_new = "cache" in inspect.signature(loaded.forward).parameters
        self.cache_name = "cache" if is_new else "past_key_values"

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """`float32[B, S, V]`."""
        import torch

        with torch.inference_mode():
            return self.model(torch.from_numpy(input_ids)).logits.float().numpy()

    def fastest(self, job: str, prompts: np.ndarray, num_steps: int) -> tuple[str, Callable[[], object]]:
        """The job with the expert implementation that does it in the least time, and that implementation's name."""
        seconds = {}
        for experts in PEER_EXPERTS[job]:
            call = self._call(job, prompts, num_steps, experts)
            call()
            begin = time.perf_counter()
            call()
            seconds[experts] = time.perf_counter() - begin
        best = min(seconds, key=lambda name: seconds[name])
        return best, self._call(job, prompts, num_steps, best)

    def _call(self, job: str, prompts: np.ndarray, num_steps: int, experts: str) -> Callable[[], object]:
        import torch
        from transformers import DynamicCache

        def forward(ids: Any, cache: Any) -> Any:
            return self.model(ids, use_cache=True, logits_to_keep=1, **{self.cache_name: cache}).logits.argmax(-1)

        def prefill(cache: Any) -> Any:
            self.model.set_experts_implementation(experts if job == "prefill" else PEER_EXPERTS["prefill"][0])
            return forward(torch.from_numpy(prompts), cache)

        def prefill_call() -> object:
            with torch.inference_mode():
                return prefill(DynamicCache(config=self.model.config))

        if job == "prefill":
            return prefill_call
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            first = prefill(cache)

        def decode_call() -> object:
            self.model.set_experts_implementation(experts)
            token = first
            with torch.inference_mode():
                for _ in range(num_steps):
                    token = forward(token, cache)
                cache.crop(-num_steps)
            return token

        return decode_call


def _logit_diff(model: Model, peer: _Peer, rng: np.random.Generator) -> float:
    ids = rng.integers(0, model.config.vocab_size, (2, 64))
    return float(np.abs(np.asarray(model.logits(ids)) - peer.logits(ids)).max())


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and remarks while transformers loads."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)

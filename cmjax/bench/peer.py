"""`cmjax bench peer`: one device against Hugging Face transformers, on the same weights, in turn."""

import dataclasses
import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from cmjax.bench.report import in_turn, machine
from cmjax.bench.tables import define, new_table
from cmjax.checkpoint import load, save_hf
from cmjax.errors import UserError
from cmjax.mesh import Instance, bring_up
from cmjax.model import Model, ModelConfig, init_params, num_params
from cmjax.schedule import blocks_for
from cmjax.serve import DecodeExecutor, EngineSettings, PrefillExecutor, SamplingParams, decode, prefill
from cmjax.serve.instances.direct import fill, plan_prompts, prefill_prompts

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
    peer_python: str | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Time decode and prefill of a random model on one device, and of transformers where it is installed.

    Args:
        rounds: timed runs of each, in turn; figures are medians.
        peer_python: an interpreter that has torch and transformers, where this one is not to run them.
        on_result: called with each row as it is ready.
    """
    sizes = sizes or Sizes()
    bring_up(1)
    results, logits = [], {}
    peer = Peer(peer_python)
    try:
        with tempfile.TemporaryDirectory(prefix="cmjax-bench-") as folder:
            path = Path(folder) / "model"
            save_hf(path, config, init_params(config, seed=seed))
            for dtype in dtypes:
                model, other = load(path, dtype=dtype), peer.load(path, dtype)
                rng = np.random.default_rng(seed)
                if other is not None:
                    logits[dtype] = _logit_diff(model, other, rng)
                jobs = [("decode", batch) for batch in sizes.decode_batches]
                for job, batch in [*jobs, ("prefill", sizes.prefill_batch)]:
                    results.append(_measure(job, batch, model, other, sizes, rounds, rng) | {"dtype": dtype})
                    if on_result:
                        on_result(results[-1])
            num_parameters = num_params(model.params)
    finally:
        peer.close()
    return {
        "benchmark": "peer",
        "machine": machine() | (peer.versions or {}),
        "settings": dataclasses.asdict(sizes) | {"rounds": rounds, "num_parameters": num_parameters},
        "results": results,
        "logits_max_abs_diff": logits,
        "logits_agree": logits["float32"] <= MAX_LOGIT_DIFF if "float32" in logits else None,
        "peer": peer.versions,
        "peer_python": peer_python,
        "definitions": DEFINITIONS,
    }


def _measure(
    job: str, batch: int, model: Model, peer: Any, sizes: Sizes, rounds: int, rng: np.random.Generator
) -> dict[str, Any]:
    """One row: seconds a step (or a prefill), and tokens/s, of both."""
    prompts = rng.integers(0, model.config.vocab_size, (batch, sizes.length))
    steps = sizes.num_steps if job == "decode" else 1
    ours = decode_call(model, prompts, steps) if job == "decode" else prefill_call(model, prompts)
    contenders: dict[str, Callable[[], object]] = {"cmjax": ours}
    experts = None
    if peer is not None:
        experts = peer.prepare(job, prompts, steps)
        contenders["transformers"] = peer.run
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


# -- the peer ---------------------------------------------------------------------------------------------------------


class _RemoteModel:
    """A `transformers_side.TransformersModel` in a process of another interpreter. Both wait while the other works."""

    def __init__(self, python: str) -> None:
        command = [python, str(Path(__file__).with_name("transformers_side.py"))]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise UserError(f"--peer-python {python}: {error.strerror}") from error

    def ask(self, **request: Any) -> Any:
        """The reply to one request."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise UserError(f"the transformers side ended with status {status}; does its interpreter have torch?")
        return json.loads(line)

    def load(self, path: str, dtype: str) -> None:
        """See `TransformersModel.load`."""
        self.ask(do="load", path=path, dtype=dtype)

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """See `TransformersModel.logits`."""
        with tempfile.TemporaryDirectory(prefix="cmjax-bench-") as folder:
            file = Path(folder) / "logits.npy"
            self.ask(do="logits", input_ids=input_ids.tolist(), into=str(file))
            return np.load(file)

    def prepare(self, job: str, prompts: np.ndarray, num_steps: int) -> str:
        """See `TransformersModel.prepare`."""
        return self.ask(do="prepare", job=job, prompts=prompts.tolist(), num_steps=num_steps)

    def run(self) -> object:
        """See `TransformersModel.run`."""
        return self.ask(do="run")

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


class Peer:
    """Transformers, in this process or in one of `python`; `versions` is None where it is not installed."""

    def __init__(self, python: str | None) -> None:
        self._remote = _RemoteModel(python) if python else None
        self._model: Any = self._remote
        self.versions: dict[str, str] | None = None
        if self._remote is not None:
            self.versions = self._remote.ask(do="versions")
        elif all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            from cmjax.bench import transformers_side

            self.versions = transformers_side.versions()

    def load(self, path: Path, dtype: str) -> Any:
        """The model to ask, None where transformers is not installed."""
        if self._remote is not None:
            self._remote.load(str(path), dtype)
        elif self.versions is not None:
            from cmjax.bench.transformers_side import TransformersModel

            self._model = TransformersModel.load(str(path), dtype)
        return self._model

    def close(self) -> None:
        """End the other process, if there is one."""
        if self._remote is not None:
            self._remote.close()


def _logit_diff(model: Model, peer: Any, rng: np.random.Generator) -> float:
    ids = rng.integers(0, model.config.vocab_size, (2, 64))
    return float(np.abs(np.asarray(model.logits(ids)) - peer.logits(ids)).max())


def tables(report: dict[str, Any]) -> list[Table]:
    """Both sides of `cmjax bench peer`, or ours alone."""
    settings = report["settings"]
    title = (
        f"{settings['num_parameters'] / 1e6:.0f} M parameters on one device, {settings['length']} tokens; "
        f"median of {settings['rounds']}"
    )
    columns = ("job", "batch", "dtype", "cmjax ms", "tokens/s", "transformers ms", "tokens/s", "its experts", "speedup")
    table = new_table(title, *columns, numbers_from=3)
    for row in report["results"]:
        cells = [row["job"], str(row["batch"]), row["dtype"]]
        for side in ("cmjax", "transformers"):
            has_side = f"{side}_s" in row
            cells += (
                [f"{row[f'{side}_s'] * 1e3:.1f}", f"{row[f'{side}_tokens_per_s']:,.0f}"] if has_side else ["-", "-"]
            )
        speedup = f"{row['speedup']:.2f}" if "speedup" in row else "-"
        table.add_row(*cells, row["peer_experts"] or "-", speedup)
    notes = {}
    if report["peer"] is None:
        notes["the peer is absent"] = "install torch and transformers in this environment, or give --peer-python"
    for dtype, diff in report["logits_max_abs_diff"].items():
        notes[f"logits, {dtype}"] = f"the two differ by at most {diff:.2g}"
    return [define(table, report["definitions"] | notes)]

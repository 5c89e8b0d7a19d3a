#!/usr/bin/env python3
"""Train the demonstration model on one device: a DeepSeek-V3 of about 10 million parameters that writes Python.

    python scripts/train_demo.py                      train, or go on from the last checkpoint, into models/demo
    python scripts/train_demo.py --out DIR --recipe recipe.json      another model, size or length

The text is the standard library of the interpreter that runs this (see scripts/demo_data.py). Killed at any time, the
same command goes on from the last checkpoint in --work. Equal recipes give equal weights on equal machines.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

if "hugetlb" not in os.environ.get("GLIBC_TUNABLES", "") and sys.platform == "linux":
    # A step touches gigabytes of fresh memory; with huge pages it spends a quarter less time in page faults. The C
    # library reads this once, when the process starts.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.argv])

import demo_data
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from cmjax.model import ModelConfig, Params, init_params, named_leaves, num_params, save_hf
from cmjax.model.training import cross_entropy, training_pass

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the weights depend on, beside the text.

    Attributes:
        model: fields of `ModelConfig` to change.
        seed: of the initial weights and of the order of the files.
        steps: optimizer steps.
        phases: `[first step as a fraction of steps, sequence length]`: short sequences are cheaper, long ones teach
            the model to look far back.
        tokens_per_step: of all sequences of a step.
        learning_rate: the peak, for matrices (Muon) and, times `adam_ratio`, for the rest (Adam).
        warmup: steps of the linear rise; after them the rate falls linearly, to zero at the end.
        weight_decay: of the matrices, times the learning rate.
        clip: largest norm of the gradient.
        mtp_weight: of the MTP module's loss (DeepSeek-V3 report, equation 25).
        bias_rate: how far a step moves the router's bias of an expert with too many or too few tokens, times the
            learning rate over its peak.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    steps: int = 4200
    phases: tuple[tuple[float, int], ...] = ((0.0, 512), (0.4, 1024), (0.8, 2048))
    tokens_per_step: int = 4096
    learning_rate: float = 0.01
    adam_ratio: float = 0.5
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.3
    bias_rate: float = 0.01

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        sizes: dict[str, Any] = {
            "model_type": "deepseek_v3",
            "vocab_size": demo_data.VOCAB_SIZE,
            "hidden_size": 160,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "q_lora_rank": 96,
            "kv_lora_rank": 48,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 8,
            "v_head_dim": 32,
            "moe_intermediate_size": 12,
            "num_routed_experts": 256,
            "num_shared_experts": 1,
            "num_topk": 8,
            "num_expert_groups": 8,
            "num_topk_groups": 4,
            "routed_scaling_factor": 2.5,
            "num_mtp_layers": 1,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        return ModelConfig(**sizes | self.model)

    def phase(self, step: int) -> tuple[int, int]:
        """The phase that `step` is in, and its first step."""
        firsts = [math.ceil(begin * self.steps) for begin, _ in self.phases]
        phase = max(index for index, first in enumerate(firsts) if first <= step)
        return phase, firsts[phase]

    def schedule(self) -> optax.Schedule:
        """The learning rate by step."""
        rise = optax.linear_schedule(0.0, self.learning_rate, self.warmup)
        fall = optax.linear_schedule(self.learning_rate, 0.0, max(1, self.steps - self.warmup))
        return optax.join_schedules([rise, fall], [self.warmup])


@flax.struct.dataclass
class State:
    """What a checkpoint holds."""

    params: Params
    opt_state: Any
    step: jax.Array


class TokenStream:
    """The training text as sequences in random order, epoch after epoch."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, recipe: Recipe) -> None:
        bos, eos = (tokenizer.token_to_id(token) for token in (demo_data.BOS, demo_data.EOS))
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        self.files = [np.array([bos, *e.ids, eos], np.int32) for e in encoded]
        self.epoch_tokens = sum(map(len, self.files))
        self.recipe = recipe
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._cut_epoch)

    def _cut_epoch(self, phase: int, epoch: int) -> np.ndarray:
        """`int32[sequences, length]`: the files in one random order, end to end, the pieces in another."""
        rng = np.random.default_rng((self.recipe.seed, phase, epoch))
        length = self.recipe.phases[phase][1]
        stream = np.concatenate([self.files[i] for i in rng.permutation(len(self.files))])
        # What does not fill a sequence is left out, a different piece in every epoch.
        rows = stream[len(stream) % length :].reshape(-1, length)
        return rows[rng.permutation(len(rows))]

    def batch(self, step: int) -> np.ndarray:
        """`int32[sequences, length]`, the tokens of one step."""
        recipe = self.recipe
        phase, first_step = recipe.phase(step)
        length = recipe.phases[phase][1]
        count = recipe.tokens_per_step // length
        per_epoch = self.epoch_tokens // length
        index = np.arange(count) + (step - first_step) * count
        return np.stack([self._epoch_rows(phase, int(i // per_epoch))[i % per_epoch] for i in index])


def initial_params(config: ModelConfig, seed: int) -> Params:
    """Random weights for training: every layer starts as the identity, and predictions start even."""
    params = init_params(config, seed)
    for name, leaf in named_leaves(params).items():
        last = name.rsplit(".", 1)[-1]
        if last.endswith("norm"):
            leaf[...] = 1.0
        elif last in ("o", "w2", "router_bias"):
            leaf[...] = 0.0
        elif last == "embed":
            leaf *= 0.5
        elif last in ("head", "router"):
            leaf *= 0.3
    # The MTP module shares the model's embedding and head, as published ones do.
    params = dataclasses.replace(params, mtp=dataclasses.replace(params.mtp, embed=None, head=None))
    return jax.tree.map(jnp.asarray, params)


def matrix_axes(params: Params) -> Params:
    """Which axes of a leaf make a matrix (Muon orthogonalizes its updates), None for leaves that Adam moves."""
    by_name = {}
    for name, leaf in named_leaves(params).items():
        last = name.rsplit(".", 1)[-1]
        axes = None
        if last in ("q_b", "kv_b"):  # [layers, heads, width, in]: all heads make one matrix
            axes = optax.contrib.MuonDimensionNumbers(3, (1, 2))
        elif last in ("q_a", "kv_a", "o", "w13", "w2", "eh_proj"):
            axes = optax.contrib.MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2)
        by_name[name] = axes
    return jax.tree.unflatten(jax.tree.structure(params), list(by_name.values()))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Clipping, then Muon for the matrices and Adam for embedding, head, router and norms, one schedule for both."""
    schedule = recipe.schedule()
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.contrib.muon(
            schedule,
            weight_decay=recipe.weight_decay,
            adam_b1=0.9,
            adam_b2=0.95,
            adam_learning_rate=lambda step: schedule(step) * recipe.adam_ratio,
            muon_weight_dimension_numbers=matrix_axes,
            consistent_rms=0.2,
        ),
    )


def balance(bias: jax.Array, load: jax.Array, rate: jax.Array) -> jax.Array:
    """Loss-free balancing (DeepSeek-V3 report, section 2.1.2): raise the bias of experts below the mean load."""
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


@functools.partial(jax.jit, static_argnames=("recipe_key", "config"), donate_argnums=0)
def train_step(
    state: State, token_ids: jax.Array, *, recipe_key: "RecipeKey", config: ModelConfig
) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer step on `token_ids int32[sequences, length]`: the new state, and what to report."""
    recipe = recipe_key.recipe

    def loss_of(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        output = training_pass(params, token_ids, config, rows_per_block=32)
        loss = cross_entropy(output.logits, token_ids, 1)
        mtp_loss = cross_entropy(output.mtp_logits, token_ids, 2)
        return loss + recipe.mtp_weight * mtp_loss, (loss, mtp_loss, output.expert_load)

    gradient, (loss, mtp_loss, load) = jax.grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = make_optimizer(recipe).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    load = load.astype(jnp.float32)
    rate = recipe.bias_rate * recipe.schedule()(state.step) / recipe.learning_rate
    moe, mtp = params.moe, params.mtp
    num_moe = moe.mlp.router_bias.shape[0]
    moe_bias = balance(moe.mlp.router_bias, load[:num_moe], rate)
    mtp_bias = balance(mtp.layer.mlp.router_bias, load[num_moe:], rate)
    params = dataclasses.replace(
        params,
        moe=dataclasses.replace(moe, mlp=dataclasses.replace(moe.mlp, router_bias=moe_bias)),
        mtp=dataclasses.replace(
            mtp,
            layer=dataclasses.replace(mtp.layer, mlp=dataclasses.replace(mtp.layer.mlp, router_bias=mtp_bias)),
        ),
    )
    report = {
        "loss": loss,
        "mtp_loss": mtp_loss,
        "gradient_norm": optax.global_norm(gradient),
        "busiest": (load.max(-1) / load.mean(-1)).max(),
    }
    return State(params, opt_state, state.step + 1), report


@dataclasses.dataclass(frozen=True)
class RecipeKey:
    """A recipe as a static argument: hashed by its JSON."""

    json: str

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return read_recipe(json.loads(self.json))


def read_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from its JSON object; a ValueError names a field that there is not."""
    unknown = set(values) - {field.name for field in dataclasses.fields(Recipe)}
    if unknown:
        raise ValueError(f"recipe: unknown field {sorted(unknown)[0]!r}")
    phases = values.get("phases", Recipe.phases)
    return Recipe(**values | {"phases": tuple((float(begin), int(length)) for begin, length in phases)})


def bytes_per_token(tokenizer: Tokenizer, stream: TokenStream, texts: list[str]) -> float:
    """Mean bytes of a token of the training text, for bits per byte."""
    return sum(len(text.encode()) for text in texts) / (stream.epoch_tokens - 2 * len(texts))


class Log:
    """The curve: one JSON object a line, and the same for people on standard output."""

    def __init__(self, path: Path, recipe: Recipe, bytes_per_token: float, first_step: int) -> None:
        self.path, self.recipe, self.bytes_per_token = path, recipe, bytes_per_token
        kept = [row for row in self.rows() if row["step"] <= first_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.begin = self.window = time.perf_counter()
        self.window_step = first_step
        self.reports: list[dict[str, jax.Array]] = []

    def rows(self) -> list[dict[str, float]]:
        """Every row so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def add(self, step: int, report: dict[str, jax.Array]) -> None:
        """Take in what step number `step` reported."""
        self.step = step
        self.reports.append(report)

    def write(self) -> None:
        """Report the means since the last time."""
        values = {name: float(np.mean([float(r[name]) for r in self.reports])) for name in self.reports[0]}
        self.reports, step = [], self.step
        now = time.perf_counter()
        rate = (step - self.window_step) * self.recipe.tokens_per_step / (now - self.window)
        self.window, self.window_step = now, step
        values["bits_per_byte"] = values["loss"] / math.log(2) / self.bytes_per_token
        row = {"step": step, **values, "tokens_per_s": rate, "seconds": self.seconds_before + now - self.begin}
        with self.path.open("a") as out:
            out.write(json.dumps({name: round(value, 5) for name, value in row.items()}) + "\n")
        left = (self.recipe.steps - step) * self.recipe.tokens_per_step / rate
        print(
            f"step {step}/{self.recipe.steps}  loss {values['loss']:.3f}  {values['bits_per_byte']:.3f} bits/byte  "
            f"mtp {values['mtp_loss']:.3f}  busiest expert {values['busiest']:.1f}x  {rate:.0f} tokens/s  "
            f"{left / 60:.0f} min left",
            flush=True,
        )


def draw_curve(rows: list[dict[str, float]], path: Path) -> None:
    """Loss and balance over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = [row["step"] for row in rows]
    top.plot(steps, [row["bits_per_byte"] for row in rows], label="next token, bits per byte of training text")
    top.plot(steps, [row["mtp_loss"] / row["loss"] for row in rows], label="MTP module's loss over the model's")
    top.set_ylim(0.5, 3.0)
    top.legend()
    bottom.plot(steps, [row["busiest"] for row in rows], color="tab:red", label="busiest expert over the mean, a step")
    bottom.set_ylim(0, 10)
    bottom.legend()
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def export(state: State, config: ModelConfig, recipe: Recipe, log: Log, out: Path) -> None:
    """Write the checkpoint (bfloat16, Hugging Face layout), the recipe and the curve beside the tokenizer in `out`."""

    def to_bfloat16(name: str, leaf: jax.Array) -> np.ndarray:
        return np.asarray(leaf if name.endswith("router_bias") else leaf.astype(jnp.bfloat16))

    leaves = [to_bfloat16(name, leaf) for name, leaf in named_leaves(state.params).items()]
    params = jax.tree.unflatten(jax.tree.structure(state.params), leaves)
    fresh = out / ".new"
    save_hf(fresh, config, params)
    for name in ("config.json", "model.safetensors"):
        os.replace(fresh / name, out / name)
    fresh.rmdir()
    rows = log.rows()
    training = {"recipe": dataclasses.asdict(recipe), "parameters": num_params(state.params), "curve": rows}
    (out / "training.json").write_text(json.dumps(training) + "\n")
    draw_curve(rows, out / "curve.png")


def train(recipe: Recipe, out: Path, work: Path, *, save_every: int, log_every: int) -> None:
    """Train from the last checkpoint in `work`, or from the start, and export to `out`."""
    tokenizer = Tokenizer.from_file(str(demo_data.MODEL / "tokenizer.json"))
    texts = demo_data.read_training_texts()
    stream = TokenStream(texts, tokenizer, recipe)
    config = recipe.config
    params = initial_params(config, recipe.seed)
    state = State(params, make_optimizer(recipe).init(params), jnp.zeros((), jnp.int32))
    tokens = recipe.steps * recipe.tokens_per_step
    print(
        f"{num_params(params) / 1e6:.2f} M parameters, {stream.epoch_tokens / 1e6:.2f} M tokens of text, "
        f"{tokens / 1e6:.1f} M to train on ({tokens / stream.epoch_tokens:.1f} epochs)"
    )
    work.mkdir(parents=True, exist_ok=True)
    key = RecipeKey(json.dumps(dataclasses.asdict(recipe), sort_keys=True))
    owner = work / "recipe.json"
    if owner.exists() and owner.read_text() != key.json:
        raise ValueError(f"{work} holds checkpoints of another recipe; give another --work, or remove it")
    owner.write_text(key.json)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(work.absolute() / "checkpoints", options=options) as manager:
        latest = manager.latest_step()
        if latest is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            print(f"going on from step {latest}")
        first = int(state.step)
        log = Log(work / "log.jsonl", recipe, bytes_per_token(tokenizer, stream, texts), first)
        for step in range(first, recipe.steps):
            state, report = train_step(state, jnp.asarray(stream.batch(step)), recipe_key=key, config=config)
            done = step + 1
            log.add(done, report)
            if done % log_every == 0 or done == recipe.steps:
                log.write()
            if done % save_every == 0 or done == recipe.steps:
                manager.save(done, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    out.mkdir(parents=True, exist_ok=True)
    export(state, config, recipe, log, out)
    print(f"wrote {out}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=demo_data.MODEL, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "train_demo", help="folder of checkpoints and log")
    parser.add_argument("--recipe", type=Path, help="JSON object with the fields of Recipe to change")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--log-every", type=int, default=10, help="steps between reports")
    arguments = parser.parse_args()
    try:
        recipe = read_recipe(json.loads(arguments.recipe.read_text()) if arguments.recipe else {})
        train(
            recipe,
            arguments.out,
            arguments.work,
            save_every=arguments.save_every,
            log_every=arguments.log_every,
        )
    except (ValueError, OSError) as error:
        print(f"train_demo.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

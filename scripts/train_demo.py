#!/usr/bin/env python3
"""Train the demonstration model on one device: a DeepSeek-V3 of about 10 million parameters that writes Python.

    python scripts/train_demo.py                      train, or go on from the last checkpoint, into models/demo
    python scripts/train_demo.py --out DIR --recipe recipe.json      another model, size or length

The text is the standard library of the interpreter that runs this (see scripts/demo_data.py). Killed at any time, the
same command goes on from the last checkpoint in --work. Equal recipes give equal weights on equal machines. Needs
matplotlib, for the curve.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and sys.platform == "linux" and "hugetlb" not in os.environ.get("GLIBC_TUNABLES", ""):
    # A step touches gigabytes of fresh memory; with huge pages it spends a quarter less time in page faults. The C
    # library reads this once, when the process starts.
    os.environ["GLIBC_TUNABLES"] = f"{os.environ.get('GLIBC_TUNABLES', '')}:glibc.malloc.hugetlb=1".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import demo_data
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from cmjax.checkpoint import save_hf
from cmjax.errors import UserError
from cmjax.model import ModelConfig, Params, init_params, named_leaves, num_params
from cmjax.training import cross_entropy, training_pass

try:
    import demo_log
except ModuleNotFoundError as error:
    sys.exit(f"train_demo.py: error: {error}; pip install matplotlib")

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "model.safetensors"


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

    def check(self) -> None:
        """Raise UserError where this is not a model, or not a schedule, that the script can train."""
        config = self.config
        is_whole = config.moe_layer_ids and config.num_mtp_layers and config.is_moe_layer(config.num_hidden_layers)
        if not is_whole or config.topk_method != "noaux_tc" or config.vocab_size < demo_data.VOCAB_SIZE:
            raise UserError(f"model must be deepseek_v3, with experts, MTP module and {demo_data.VOCAB_SIZE} tokens")
        if self.steps < 1:
            raise UserError("steps must be at least 1")
        begins = [begin for begin, _ in self.phases]
        if not begins or begins[0] != 0 or begins != sorted(begins):
            raise UserError("the first of the phases must begin at 0, and each after the one before it")
        for _, length in self.phases:
            if not 3 <= length <= config.max_position_embeddings or self.tokens_per_step % length:
                raise UserError(
                    f"length {length} of a phase must be 3 to {config.max_position_embeddings} and divide "
                    f"tokens_per_step ({self.tokens_per_step})"
                )

    def sequences(self, step: int) -> tuple[int, int, range]:
        """What a step learns from: the phase, the length of its sequences, and which of them."""
        firsts = [math.ceil(begin * self.steps) for begin, _ in self.phases]
        phase = max(index for index, first in enumerate(firsts) if first <= step)
        length = self.phases[phase][1]
        count = self.tokens_per_step // length
        return phase, length, range((step - firsts[phase]) * count, (step + 1 - firsts[phase]) * count)

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


def balance(params: Params, load: jax.Array, rate: jax.Array) -> Params:
    """Loss-free balancing (DeepSeek-V3 report, section 2.1.2): raise the router's bias of experts below the mean load.

    `load` is `float32[MoE layers, experts]`, the MTP layer's last.
    """
    moves = rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    leaves = named_leaves(params)
    leaves["moe.mlp.router_bias"] += moves[:-1]
    leaves["mtp.layer.mlp.router_bias"] += moves[-1:]
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def make_train_step(recipe: Recipe) -> Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """One optimizer step on `token_ids int32[sequences, length]`: the new state, and what to report."""
    config, optimizer, schedule = recipe.config, make_optimizer(recipe), recipe.schedule()

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: State, token_ids: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        def loss_of(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
            output = training_pass(params, token_ids, config, rows_per_block=32)
            loss = cross_entropy(output.logits, token_ids, 1)
            mtp_loss = cross_entropy(output.mtp_logits, token_ids, 2)
            return loss + recipe.mtp_weight * mtp_loss, (loss, mtp_loss, output.expert_load)

        gradient, (loss, mtp_loss, load) = jax.grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        load = load.astype(jnp.float32)
        params = balance(params, load, recipe.bias_rate * schedule(state.step) / recipe.learning_rate)
        report = {
            "loss": loss,
            "mtp_loss": mtp_loss,
            "gradient_norm": optax.global_norm(gradient),
            "busiest": (load.max(-1) / load.mean(-1)).max(),
        }
        return State(params, opt_state, state.step + 1), report

    return train_step


def read_recipe(text: str) -> Recipe:
    """A recipe from a JSON object with the fields to change; a UserError says what is wrong with it."""
    try:
        values = json.loads(text)
        phases = tuple((float(begin), int(length)) for begin, length in values.get("phases", Recipe.phases))
        for what, given, known in (("", values, Recipe), ("model: ", values.get("model", {}), ModelConfig)):
            unknown = set(given) - {field.name for field in dataclasses.fields(known)}
            if unknown:
                raise UserError(f"{what}unknown field {min(unknown)!r}")
        for name in set(values) - {"model", "phases"}:
            if not isinstance(values[name], int | float):
                raise UserError(f"{name} must be a number")
        recipe = Recipe(**values | {"phases": phases})
        recipe.check()
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"recipe: {error}") from error
    return recipe


def export(state: State, recipe: Recipe, rows: list[dict[str, float]], out: Path) -> None:
    """Write checkpoint (bfloat16, Hugging Face layout), tokenizer, recipe and curve to `out`, over what is there.

    The weights are taken away first and come last: a folder that has them is whole.
    """
    leaves = {
        name: np.asarray(leaf if name.endswith("router_bias") else leaf.astype(jnp.bfloat16))
        for name, leaf in named_leaves(state.params).items()
    }
    unfinished = out / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed here
    fresh = unfinished / "model"
    save_hf(fresh, recipe.config, jax.tree.unflatten(jax.tree.structure(state.params), list(leaves.values())))
    training = {"recipe": dataclasses.asdict(recipe), "parameters": num_params(state.params), "curve": rows}
    (fresh / "training.json").write_text(json.dumps(training) + "\n")
    demo_log.draw_curve(rows, fresh / "curve.png")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_data.MODEL / name, fresh / name)
    (out / WEIGHTS).unlink(missing_ok=True)
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == WEIGHTS):
        os.replace(path, out / path.name)
    shutil.rmtree(unfinished)


def claim(path: Path, text: str, what: str) -> None:
    """Write down what the checkpoints beside `path` come from; a UserError where they come from something else."""
    if path.exists() and path.read_text() != text:
        raise UserError(f"{path.parent} holds checkpoints of another {what}; give another --work, or remove it")
    demo_log.write_whole(path, text)


def train(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Train from the last checkpoint in `--work`, or from the start, and export to `--out`."""
    work, out = arguments.work, arguments.out
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    texts = demo_data.read_training_texts(arguments.list, arguments.stdlib)
    claim(work / "recipe.json", json.dumps(dataclasses.asdict(recipe), sort_keys=True), "recipe")
    claim(work / "files.tsv", arguments.list.read_text(), "list of files")
    tokenizer = Tokenizer.from_file(str(demo_data.MODEL / "tokenizer.json"))
    stream = demo_data.TokenStream(texts, tokenizer, recipe.seed)
    if stream.num_tokens < max(length for _, length in recipe.phases):
        raise UserError(f"the text has {stream.num_tokens} tokens, fewer than the longest sequence")
    params = initial_params(recipe.config, recipe.seed)
    state = State(params, make_optimizer(recipe).init(params), jnp.zeros((), jnp.int32))
    tokens = recipe.steps * recipe.tokens_per_step
    print(
        f"{num_params(params) / 1e6:.2f} M parameters, {stream.num_tokens / 1e6:.2f} M tokens of text, "
        f"{tokens / 1e6:.1f} M to train on ({tokens / stream.num_tokens:.1f} epochs)",
        flush=True,
    )
    train_step = make_train_step(recipe)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(work.absolute() / "checkpoints", options=options) as manager:
        latest = manager.latest_step()
        if latest is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            print(f"going on from step {latest}", flush=True)
        first = int(state.step)
        log = demo_log.Log(work / "log.jsonl", recipe.steps, recipe.tokens_per_step, stream.bytes_per_token, first)
        for step in range(first, recipe.steps):
            state, report = train_step(state, jnp.asarray(stream.batch(*recipe.sequences(step))))
            log.add(report)
            done = step + 1
            is_saved = done % arguments.save_every == 0 or done == recipe.steps
            # Whoever goes on from a checkpoint finds the steps before it in the log.
            if is_saved or done % arguments.log_every == 0:
                log.write()
            if is_saved:
                manager.save(done, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    export(state, recipe, log.rows(), out)
    print(f"wrote {out}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=demo_data.MODEL, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "train_demo", help="folder of checkpoints and log")
    parser.add_argument("--recipe", type=Path, help="JSON object with the fields of Recipe to change")
    parser.add_argument("--list", type=Path, default=demo_data.LIST, help="the files to learn from, see demo_data.py")
    parser.add_argument("--stdlib", type=Path, default=demo_data.stdlib(), help="folder that they are in")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--log-every", type=int, default=10, help="steps between reports")
    arguments = parser.parse_args()
    if min(arguments.save_every, arguments.log_every) < 1:
        parser.error("--save-every and --log-every must be at least 1")
    try:
        train(read_recipe(arguments.recipe.read_text() if arguments.recipe else "{}"), arguments)
    except (UserError, OSError) as error:
        print(f"train_demo.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

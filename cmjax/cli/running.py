"""What every command that runs an engine does the same way: devices, model, settings, progress."""

import gc
import hashlib
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmjax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from cmjax.checkpoint import Tokenizer
    from cmjax.mesh import Pools
    from cmjax.model import Model, ModelConfig
    from cmjax.serve import EngineSettings
    from cmjax.serve.engine import Progress

MAX_DEFAULT_SEQS = 8
PHASES = {"compile": "compiling", "prefill": "prefill", "decode": "decode"}


def find_tokenizer(folder: Path, must_exist: bool = False) -> "Tokenizer | None":
    """The tokenizer of a model folder; None where there is none, or a UserError if it `must_exist`."""
    from cmjax.checkpoint import Tokenizer

    if not must_exist and not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_folder(folder)


def carve_from(options: dict[str, Any]) -> "Pools":
    """The instances that `instance_options` ask for; brings up the devices."""
    from cmjax.mesh import Supernode, carve

    use_compilation_cache()
    return carve(
        Supernode.preset(options["supernode"]),
        ep_size=options["ep"],
        prefill_ep_size=options["prefill_ep"],
        num_prefill_instances=options["prefill_instances"],
        num_decode_instances=options["decode_instances"],
    )


def ease_collector() -> None:
    """Have Python's collector pass over what is there now, model and compiled steps, and look less often at what comes:
    a server makes many small objects, each of which would bring the next look at everything nearer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def use_compilation_cache() -> None:
    """Keep compiled steps on disk, so that a command's second start is quick; JAX's own settings and variables
    (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE`) come first."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    # Programs are compiled for the very instructions that a processor has.
    cpu_info = Path("/proc/cpuinfo")
    features = re.search(r"^(flags|Features)\s*:.*$", cpu_info.read_text(), re.M) if cpu_info.exists() else None
    processor = hashlib.sha256((features[0] if features else platform.processor()).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cmjax"
    jax.config.update("jax_compilation_cache_dir", str(folder / f"jax-{jax.__version__}-{processor}"))


def seqs_per_rank(options: dict[str, Any], num_prompts: int, pools: "Pools") -> int:
    """Requests that a decode rank runs together: what `--max-num-seqs` says, or what so many prompts need."""
    share = -(-num_prompts // sum(one.ep_size for one in pools.decode))
    share += share % 2 * (options["microbatches"] == "2")
    return options["max_num_seqs"] or min(share, MAX_DEFAULT_SEQS)


def load_from(path: Path, options: dict[str, Any], rows: int) -> "Model":
    """The model in the formats that `format_options` say; what `--quant auto` chose for `rows` rows is told."""
    from cmjax.checkpoint import load

    model = load(path, dtype=options["dtype"], quant=options["quant"], rows=rows)
    if options["quant"] == "auto":
        kinds = sorted({name.rsplit(".", 1)[-1] for name in model.quantized})
        click.echo(f"--quant auto: {', '.join(kinds) or 'nothing'} in int8, the rest in {options['dtype']}", err=True)
    return model


def settings_from(
    options: dict[str, Any],
    config: "ModelConfig",
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    pools: "Pools",
) -> "EngineSettings":
    """What `engine_options` say, and for sizes left open what the prompts need."""
    from cmjax.serve import EngineSettings

    block_size, longest = options["block_size"], config.max_position_embeddings
    needed = max(len(prompt) for prompt in prompts) + max_tokens
    if options["max_model_len"] is None and needed > longest:
        raise UserError(
            f"a prompt of {needed - max_tokens} tokens and --max-tokens {max_tokens} exceed the model's "
            f"max_position_embeddings {longest}"
        )
    rounded = min(-(-needed // block_size) * block_size, longest)
    return EngineSettings(
        max_model_len=options["max_model_len"] or rounded,
        max_num_seqs_per_rank=seqs_per_rank(options, len(prompts), pools),
        block_size=block_size,
        max_num_batched_tokens=options["max_num_batched_tokens"],
        steps_per_call=options["steps_per_call"],
        num_speculative_tokens=options["mtp"],
        microbatches="auto" if options["microbatches"] == "auto" else int(options["microbatches"]),
        dispatch_dtype=options["dispatch_dtype"],
        combine_dtype=options["combine_dtype"],
        num_redundant_experts=options["redundant_experts"],
        num_shared_replicas=options["shared_replicas"],
    )


@contextmanager
def memory_errors(settings: "EngineSettings") -> Iterator[None]:
    """Turn XLA's out-of-memory error into one that names the settings."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                "buffers do not fit in memory: lower --max-num-seqs "
                f"({settings.max_num_seqs_per_rank}), --max-model-len ({settings.max_model_len}) or "
                f"--max-num-batched-tokens ({settings.max_num_batched_tokens})"
            ) from error
        raise


@contextmanager
def progress_bar(console: "Console") -> Iterator["Progress"]:
    """A callback for `Engine.generate` that draws a bar on a terminal, and starts counting traffic anew once the
    steps are compiled: compiling runs each of them once, on padding."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cmjax.mesh import fabric

    columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
    task = bars.add_task("loading", total=None)
    phases_seen: list[str] = []

    def notify(phase: str, num_tokens: int, num_total: int) -> None:
        if phase == "prefill" and "prefill" not in phases_seen:
            fabric.traffic.reset()
        phases_seen.append(phase)
        bars.update(task, description=PHASES[phase], completed=num_tokens, total=num_total)

    with bars:
        yield notify

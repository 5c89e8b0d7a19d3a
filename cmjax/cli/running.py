"""What every command that runs an engine does the same way: devices, model, settings, progress."""

import gc
import hashlib
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import jax

from cmjax.checkpoint import ModelFormats, Tokenizer, load
from cmjax.cli.flags import Given, given_options_for
from cmjax.cli.progress import shown_progress
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout, Pools, fabric, share_compiled_programs
from cmjax.model import Model, ModelConfig
from cmjax.serve import Engine, EngineSettings, StartProgress
from cmjax.serve.caching import CacheSettings
from cmjax.serve.engine import Progress

MAX_DEFAULT_SEQS = 8
DEFAULT_MODEL_LEN = 2048

# Engines whose sizes follow from the prompts, and those that wait for requests.
prompt_sized_options = given_options_for(
    "engine",
    EngineSettings,
    {
        "max_model_len": "what the prompts need",
        "max_num_seqs_per_rank": f"what the prompts need, at most {MAX_DEFAULT_SEQS}",
    },
)
serving_options = given_options_for(
    "engine", EngineSettings, {"max_model_len": f"the model's own, at most {DEFAULT_MODEL_LEN}"}
)
PHASES = {"compile": "compiling", "prefill": "prefill", "decode": "decode"}


def find_tokenizer(folder: Path, must_exist: bool = False) -> Tokenizer | None:
    """The tokenizer of a model folder; None where there is none, or a UserError if it `must_exist`."""
    if not must_exist and not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_folder(folder)


def carve(layout: InstanceLayout) -> Pools:
    """The instances asked for, on devices that are brought up; what is compiled for them is kept on disk."""
    use_compilation_cache()
    return layout.carve()


def ease_collector() -> None:
    """Have Python's collector pass over what is there now, model and compiled steps, and look less often at what comes:
    a server makes many small objects, each of which would bring the next look at everything nearer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def use_compilation_cache() -> None:
    """Keep compiled steps on disk, so that a command's second start is quick, and one of several instances compiles for
    all; JAX's own settings and variables (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE`) come first."""
    share_compiled_programs()
    if jax.config.jax_compilation_cache_dir is not None:
        return
    # Programs are compiled for the very instructions that a processor has.
    cpu_info = Path("/proc/cpuinfo")
    features = re.search(r"^(flags|Features)\s*:.*$", cpu_info.read_text(), re.M) if cpu_info.exists() else None
    processor = hashlib.sha256((features[0] if features else platform.processor()).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cmjax"
    jax.config.update("jax_compilation_cache_dir", str(folder / f"jax-{jax.__version__}-{processor}"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # a step is a second, what it needs less


def seqs_per_rank(engine: Given[EngineSettings], num_prompts: int, pools: Pools) -> int:
    """Requests that a decode rank runs together: what `--max-num-seqs` says, or what so many prompts need."""
    share = -(-num_prompts // sum(one.ep_size for one in pools.decode))
    share += share % 2 * (engine.get("microbatches") == 2)
    return engine.get("max_num_seqs_per_rank") or min(share, MAX_DEFAULT_SEQS)


def load_in(path: Path, formats: ModelFormats, rows: int) -> Model:
    """The model in these formats; what "auto" chose for `rows` rows is told."""
    model = load(path, dtype=formats.dtype, quant=formats.quant, rows=rows)
    if formats.quant == "auto":
        kinds = sorted({name.rsplit(".", 1)[-1] for name in model.quantized})
        click.echo(f"--quant auto: {', '.join(kinds) or 'nothing'} in int8, the rest in {formats.dtype}", err=True)
    return model


def prompt_sized(
    engine: Given[EngineSettings],
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    pools: Pools,
) -> EngineSettings:
    """The settings given, and for sizes left open what the prompts need."""
    block_size, longest = engine.get("block_size"), config.max_position_embeddings
    needed = max(len(prompt) for prompt in prompts) + max_tokens
    if engine.get("max_model_len") is None and needed > longest:
        raise UserError(
            f"a prompt of {needed - max_tokens} tokens and --max-tokens {max_tokens} exceed the model's "
            f"max_position_embeddings {longest}"
        )
    return engine.make(
        max_model_len=min(-(-needed // block_size) * block_size, longest),
        max_num_seqs_per_rank=seqs_per_rank(engine, len(prompts), pools),
    )


def tell_start(progress: StartProgress) -> None:
    """Say how far an engine is that comes up."""
    click.echo(str(progress), err=True)


def start_engine(
    path: Path,
    layout: InstanceLayout,
    formats: ModelFormats,
    engine: Given[EngineSettings],
    tell: Callable[[StartProgress], None] = tell_start,
    *,
    wait: bool = True,
    cache: CacheSettings | None = None,
) -> Engine:
    """An engine for the model in a folder, started; its sizes do not follow from prompts. `tell`, `wait`: see
    `Engine.start`; `cache`: its prefix cache, by default none."""
    pools = carve(layout)
    model = load_in(path, formats, engine.get("max_num_seqs_per_rank"))
    settings = engine.make(max_model_len=min(DEFAULT_MODEL_LEN, model.config.max_position_embeddings))
    with memory_errors(settings):
        started = Engine(model, pools, settings=settings, cache=cache)
        started.start(tell, wait=wait)
    ease_collector()
    return started


@contextmanager
def memory_errors(settings: EngineSettings) -> Iterator[None]:
    """Turn XLA's out-of-memory error into one that names the settings."""
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
def generation_progress() -> Iterator[Progress]:
    """A callback for `Engine.generate` that shows how far it is, and starts counting traffic anew once the steps are
    compiled: compiling runs each of them once, on padding."""
    phases_seen: set[str] = set()
    with shown_progress("tokens") as show:

        def notify(phase: str, num_tokens: int, num_total: int) -> None:
            if phase == "prefill" and phase not in phases_seen:
                fabric.traffic.reset()
            phases_seen.add(phase)
            show(PHASES[phase], num_tokens, None if phase == "compile" else num_total)

        yield notify

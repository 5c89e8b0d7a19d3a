"""Set up once for every test: 384 virtual devices, a compilation cache on disk, a fixed seed."""

import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

# The suite needs its own number of devices whatever the shell was set up for; JAX reads this when it starts. Compiling
# is most of the suite's time, and takes 0.6 of it without LLVM's optimizations; the arithmetic stays the same.
os.environ["XLA_FLAGS"] = (
    re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    + " --xla_backend_optimization_level=0"
).strip()

import jax
import numpy as np
import pytest
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from cmjax.mesh import EP_AXIS, share_compiled_programs, virtual_devices
from cmjax.schedule import SERVING_SHAPES
from cmjax.serve.instances import JaxExecutor

NUM_DEVICES = 384
ROOT = Path(__file__).parents[1]

# Compiled programs over hundreds of devices are most of the suite's time; a second run finds them here. Small ones
# would take longer to write down than they save.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / f"jax-{jax.__version__}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
share_compiled_programs()

DEVICES = virtual_devices(NUM_DEVICES)

# Tracing makes millions of short-lived objects, and at Python's own thresholds the collector takes a tenth of the time.
gc.freeze()
gc.set_threshold(200_000, 20, 100)

# Of a process, before its compiled programs are dropped; a module of tests makes some more.
MOST_MAPPINGS = 20_000

# A test that fails must fail again in the same way, on a slow machine too.
settings.register_profile("cmjax", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("cmjax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=20250615, help="seed of the `rng` fixture")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, those that run commands, servers and engines among them: where a long one comes last, a
    process waits for it."""
    first = ("targets/test_compile", "serve/test_prefix_cache", "perf/", "test_", "http/", "serve/")

    def turn(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT / "tests").as_posix()
        return next((index for index, start in enumerate(first) if path.startswith(start)), len(first))

    items.sort(key=turn)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Drop compiled programs between two modules where they have become many: each is mapped into memory in many
    pieces, and at the kernel's limit of mappings (vm.max_map_count, 65,530) XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    num_maps = maps.read_bytes().count(b"\n") if maps.exists() else MOST_MAPPINGS
    if num_maps >= MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def one_shape_of_sampling() -> Iterator[None]:
    """Engines that are started have the steps for whatever may be asked for, without those for greedy requests alone:
    half as many to compile. What goes on with both is in `tests/serve/test_startup.py`, and behind HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JaxExecutor, "serving_shapes", SERVING_SHAPES[-1:])
        yield


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--seed")


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def jax_events() -> Counter[str]:
    """What JAX does, by its own count: events, and what it says the duration of."""
    events: Counter[str] = Counter()
    # For good: older versions cannot take a listener out.
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **_: events.update([event]))
    return events


@pytest.fixture
def empty_compile_cache(tmp_path: Path) -> Iterator[None]:
    """A compilation cache of its own, in which every program is kept."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path / "compiled"), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """All the virtual devices of the test process."""
    return DEVICES


@pytest.fixture(scope="session")
def make_mesh() -> Callable[..., Mesh]:
    """`make_mesh(8)`: eight devices along "ep". `make_mesh(2, 4, axes=("dp", "ep"))`: a grid. `first` skips devices."""

    def make(*shape: int, axes: tuple[str, ...] = (EP_AXIS,), first: int = 0) -> Mesh:
        chosen = DEVICES[first : first + int(np.prod(shape))]
        return Mesh(np.array(chosen, dtype=object).reshape(shape), axes)

    return make

"""The scripts run as users run them: bringing up the devices themselves, and with XLA_FLAGS set."""

import os
import subprocess
import sys

import jax
import pytest

from tests.conftest import ROOT

FLAGS = "--xla_force_host_platform_device_count=384"
RUNS = {
    "generate.py at EP8": (("generate.py", "--ep", "8"), "", "'import os' -> "),
    "generate.py with XLA_FLAGS": (("generate.py",), FLAGS, "decode0: EP320, ranks 64 to 383"),
    "custom_dispatch.py": (("custom_dispatch.py",), "", "the tokens are equal"),
    "custom_dispatch.py with XLA_FLAGS": (("custom_dispatch.py",), FLAGS, "the tokens are equal"),
    "quantize.py": (("quantize.py",), "", "int8, "),
    "speculative.py": (("speculative.py", "--temperature", "0.7"), "", "3 of 3 are those without drafts"),
    "serve.py": (("serve.py",), "", "the same texts: True"),
    "prefix_cache.py": (("prefix_cache.py",), "", "the same texts: True"),
    "compile_for_tpu.py": (["compile_for_tpu.py", "deepseek-v2-lite", "v5e", "16"], "", "all-to-all: "),
    "microbatches.py": (("microbatches.py",), "", "the tokens are equal"),
    "price_a_step.py": (("price_a_step.py",), "", "us a layer on ascend-910"),
    "fabric_tour.py at 8 ranks": (("fabric_tour.py", "8"), "", "8 ranks"),
    "fabric_tour.py with XLA_FLAGS": (("fabric_tour.py",), FLAGS, "320 ranks"),
}
# These have tests of their own (tests/test_train_demo.py).
TRAINING = {"train_demo.py", "demo_data.py", "demo_log.py"}


LONG = {
    "speculative.py",
    "custom_dispatch.py",
    "serve.py",
    "quantize.py",
    "microbatches.py",
    "prefix_cache.py",
    "generate.py at EP8",
    "custom_dispatch.py with XLA_FLAGS",
    "fabric_tour.py at 8 ranks",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.soak if name in LONG else ()) for name in RUNS])
def test_script_runs(name):
    if name == "compile_for_tpu.py":
        pytest.importorskip("libtpu", reason="needs pip install 'cmjax[tpu]'")
    (script, *args), flags, expected = RUNS[name]
    env = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",  # as the suite itself compiles
        "PYTHONPATH": str(ROOT),
        # As for the suite itself: what one run compiled, the next one finds.
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    words = [sys.executable, str(ROOT / "scripts" / script), *args]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_every_example_is_run():
    """Except those that need transformers (make_*)."""
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py") if not path.name.startswith("make_")}
    assert scripts == {words[0] for words, _, _ in RUNS.values()} | TRAINING

"""Scheduling needs neither JAX nor a device."""

import subprocess
import sys


def test_scheduling_brings_in_no_jax():
    code = (
        "import sys, cmjax.schedule, cmjax.schedule.virtual\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "assert 'cmjax' in names and 'numpy' in names\n"
        "assert not names & {'jax', 'jaxlib', 'flax', 'optax', 'ml_dtypes'}, names\n"
        "assert 'cmjax.mesh' not in sys.modules and 'cmjax.serve' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

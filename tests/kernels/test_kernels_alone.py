"""The kernels without JAX, at the bounds of their buffers; under sanitizers in `make soak`."""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from cmjax.kernels.native.build import FOLDER, units
from cmjax.native import find_compiler

PROGRAM = os.path.join(os.path.dirname(__file__), "kernels_alone.cc")
CHECKS = ("-D_GLIBCXX_ASSERTIONS", "-D_LIBCPP_HARDENING_MODE=_LIBCPP_HARDENING_MODE_FAST")


def run_alone(folder, *flags):
    """Build the program with every form of the library but no XLA, run it, and return what it prints."""
    common = [find_compiler(), "-std=c++17", "-pthread", "-ffp-contract=off", f"-I{FOLDER}", *CHECKS, *flags]
    sources = [(str(FOLDER / unit.name), unit.flags) for unit in units() if not unit.name.startswith("ffi")]
    sources.append((PROGRAM, ()))

    def compile_source(index):
        source, own = sources[index]
        target = folder / f"{index}.o"
        subprocess.run([*common, *own, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, range(len(sources))))
    subprocess.run([*common, *objects, "-o", folder / "alone"], check=True)
    result = subprocess.run([folder / "alone"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_every_form_at_its_bounds(tmp_path):
    *forms, last = run_alone(tmp_path, "-O1")
    assert last == "ok"
    assert forms[0] == "Portable"


@pytest.mark.soak
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitized(tmp_path, sanitizer):
    if platform.system() != "Linux":
        pytest.skip("the sanitizers' libraries are found on Linux")
    flags = ["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    assert run_alone(tmp_path, *flags)[-1] == "ok"

"""One engine and one server for all tests of the API: the demonstration model on two devices; and a browser."""

import shutil
from collections.abc import Iterator

import pytest

import cmjax
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.serve import Engine
from tests.http.serving import served, wait_until_idle
from tests.serve.driving import make_engine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="package")
def engine() -> Iterator[Engine]:
    engine = make_engine(
        cmjax.load(BUNDLED_MODEL),
        2,
        prefill_ep_size=1,
        max_num_seqs_per_rank=8,
        max_model_len=256,
        max_num_batched_tokens=256,
    )
    engine.start()
    yield engine
    engine.shutdown(timeout=0)


@pytest.fixture(scope="package")
def address(engine) -> Iterator[str]:
    with served(engine, max_body_bytes=100_000, max_concurrent_requests=40) as address:
        yield address


@pytest.fixture(scope="module")  # while it is there, no test of the module can run an event loop of its own
def browser():
    """Chromium, where it and playwright are installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on PATH: apt-get install chromium")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def nothing_is_left(request) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        wait_until_idle(request.getfixturevalue("engine"))

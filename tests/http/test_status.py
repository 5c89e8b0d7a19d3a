"""The status page in a real browser: it shows what the engine does, live, and says so when nobody answers.

Needs `pip install playwright` and a Chromium on PATH (`apt-get install chromium`), or one of playwright's own.
"""

import re
import shutil

import httpx
import pytest

from tests.http.serving import served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on PATH: apt-get install chromium")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_follows_the_engine(browser, engine, width, scheme):
    with served(engine) as address:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.get_by_role("status").filter(has_text="live").wait_for(timeout=10_000)
        assert page.locator("#model").inner_text() == "demo"
        rows = page.locator("#instances tr")
        assert [rows.nth(i).locator("td").first.inner_text() for i in range(rows.count())] == ["prefill0", "decode0"]
        before = engine.stats().num_generation_tokens
        httpx.post(f"{address}/v1/completions", json={"prompt": "import os", "max_tokens": 7, "ignore_eos": True})
        expected = f"{before + 7:,}"
        page.locator("#figure-tokens-out", has_text=re.compile(rf"^{expected}$")).wait_for(timeout=10_000)
        assert page.locator("#planes tr").count() >= 1
        # Nothing is wider than the screen, but for tables that scroll by themselves.
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert problems == []
    page.locator("#state", has_text="does not answer").wait_for(timeout=15_000)
    page.close()

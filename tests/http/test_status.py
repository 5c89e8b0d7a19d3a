"""The status page in a real browser: it shows what the engine does, live, and says so when nobody answers.

Needs `pip install playwright` and a Chromium on PATH (`apt-get install chromium`), or one of playwright's own.
"""

import re
import shutil

import httpx
import pytest

from tests.http.serving import PATIENCE, served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Of the line that says how things are, by the formula of the web's accessibility guidelines.
CONTRAST = """() => {
  const light = (name) => {
    const context = document.createElement("canvas").getContext("2d");
    context.fillStyle = name; context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const probe = document.body.appendChild(document.createElement("div"));
  probe.style.background = "Canvas";
  const state = document.getElementById("state");
  const both = [light(getComputedStyle(state).color), light(getComputedStyle(probe).backgroundColor)];
  probe.remove();
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""


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
        page.get_by_role("status").filter(has_text="live").wait_for(timeout=1000 * PATIENCE)
        assert page.locator("#model").inner_text() == "demo"
        rows = page.locator("#instances tr")
        assert rows.locator("th").all_inner_texts() == ["prefill0", "decode0"]
        assert rows.locator("td:nth-child(2)").all_inner_texts() == ["prefill, ready", "decode, ready"]
        used = rows.nth(1).locator("td:nth-child(6)").inner_text()
        assert used == f"0 of {engine.stats().instances[1].num_blocks}"
        before = engine.stats().num_generation_tokens
        httpx.post(
            f"{address}/v1/completions",
            json={"prompt": "import os", "max_tokens": 7, "ignore_eos": True},
            timeout=PATIENCE,
        )
        expected = f"{before + 7:,}"
        page.locator("#figure-tokens-out", has_text=re.compile(rf"^{expected}$")).wait_for(timeout=1000 * PATIENCE)
        planes = page.locator("#planes tr")
        assert planes.locator("th").all_inner_texts() == list(engine.stats().plane_bytes)
        assert page.locator("#figure-tokens-s + svg, #figure-running + svg").count() == 2
        # Its words stand out from what is behind them, in both schemes.
        assert page.evaluate(CONTRAST) >= 4.5
        # Nothing is wider than the screen, but for tables that scroll by themselves.
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert problems == []
    page.locator("#state", has_text="does not answer").wait_for(timeout=1000 * PATIENCE)
    assert page.locator("#content.stale #figure-tokens-out").inner_text() == expected
    assert page.evaluate(CONTRAST) >= 4.5
    page.close()

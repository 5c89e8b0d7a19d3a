"""The status page in a real browser: it shows what the engine does, live, and says so when nobody answers.

Needs `pip install playwright` and a Chromium on PATH (`apt-get install chromium`), or one of playwright's own.
"""

import re

import httpx
import pytest

import cmjax
from cmjax.model import placed_layer_names
from cmjax.serve.http import history
from tests.http.serving import PATIENCE, served, wait_until

CACHED = "prompt tokens cached"
# The least of all words of the page, by the formula of the web's accessibility guidelines.
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
  const behind = light(getComputedStyle(probe).backgroundColor);
  probe.remove();
  const words = [...document.querySelectorAll("body *")].filter((one) => one.textContent && one.checkVisibility()
    && ![...one.children].some((child) => child.textContent === one.textContent) && one.tagName !== "SCRIPT");
  return Math.min(...words.map((one) => {
    const both = [light(getComputedStyle(one).color), behind];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  }));
}"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_follows_the_engine(browser, engine, width, scheme, monkeypatch):
    monkeypatch.setattr(history, "PERIOD_S", 0.1)
    with served(engine) as address, httpx.Client(base_url=address, timeout=PATIENCE) as http:
        ask = {"prompt": "import os", "max_tokens": 7, "ignore_eos": True}
        http.post("/v1/completions", json=ask)
        made = engine.stats().num_generation_tokens
        wait_until(lambda: http.get("/status/history.json").json()["samples"][-1]["num_generation_tokens"] == made)
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.set_default_timeout(1000 * PATIENCE)
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.get_by_role("status").filter(has_text="renewed every second").wait_for()
        assert page.locator("#model").inner_text() == "demo"
        machine = page.locator("#machine").inner_text()
        assert f"version {cmjax.__version__} · prefill EP1, decode EP2 · up " in machine
        # The charts show what came before the page was opened.
        charts = page.locator("#charts svg")
        said = dict(one.get_attribute("aria-label").split(": at most ") for one in charts.all())
        assert float(re.match(r"([\d,.]+) tokens/s", said["output tokens/s"])[1].replace(",", "")) > 0
        assert page.locator("#charts figure", has_text="TTFT").locator("polyline").count() > 0
        for name in ("TTFT", "TPOT"):
            assert re.fullmatch(r"[\d,.]+ m?s", page.locator(f"#figure-{name}-median").inner_text())
            assert re.match(r"[\d,.]+ m?s", said[f"{name}, median of those that ended"])
        rows = page.locator("#instances tr")
        assert rows.locator("th").all_inner_texts() == ["prefill0", "decode0"]
        assert rows.locator("td:nth-child(2)").all_inner_texts() == ["prefill, ready", "decode, ready"]
        used = rows.nth(1).locator("td:nth-child(6)").inner_text()
        assert used == f"0 of {engine.stats().instances[1].num_blocks:,}"
        assert rows.locator("td:nth-child(7)").all_inner_texts() == ["-", "8 of 8"]
        for role in ("decode", "prefill"):
            layers = zip(placed_layer_names(engine.model.config), engine.expert_load()[role], strict=True)
            used = [name.upper() for name, rows in layers if rows.any()]
            assert page.locator(f"#{role}-experts tr th").all_inner_texts() == used
            assert len(used) >= len(engine.model.config.moe_layer_ids)
            assert all(
                text.endswith(" × mean") for text in page.locator(f"#{role}-experts td:nth-child(4)").all_inner_texts()
            )
        http.post("/v1/completions", json=ask)
        http.post("/v1/completions", json={**ask, "max_tokens": 9999})  # too long: refused
        page.locator("#figure-tokens-out", has_text=re.compile(rf"^{made + 7:,}$")).wait_for()
        page.locator("#figure-errors", has_text=re.compile("^1$")).wait_for()
        assert not page.locator("#pool").is_visible()  # there is no prefix cache
        assert CACHED not in said
        assert not page.locator("dt", has_text=CACHED).count()
        planes = page.locator("#planes tr")
        assert planes.locator("th").all_inner_texts() == list(engine.stats().plane_bytes)
        # Its words stand out from what is behind them, in both schemes.
        assert page.evaluate(CONTRAST) >= 4.5
        # Nothing is wider than the screen, but for tables that scroll by themselves.
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert problems == []
    page.locator("#state", has_text="does not answer").wait_for()
    assert page.locator("#content.stale #figure-tokens-out").inner_text() == f"{made + 7:,}"
    assert page.evaluate(CONTRAST) >= 4.5
    page.close()

"""The page in a real browser, at the widths of a phone and of a desktop."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from caco_fast.report.write import ReportConfig, write_report
from tests.report.made_up import line, run_folder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]

# What the browser has made of the page, as JSON. A window can't be as narrow as a phone, so the page is in a frame.
SCRIPT = """
<script>
const all = selector => [...document.querySelectorAll(selector)].filter(one => one.getClientRects().length > 0);
const box = element => element.getBoundingClientRect();
const cut = element => box(element).left < -1 || box(element).right > innerWidth + 1;
const named = "[role=img][aria-label]:not([aria-label=''])";
const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
parent.postMessage(JSON.stringify({
  width: innerWidth,
  scroll: document.documentElement.scrollWidth,
  sizes: all("svg, img").map(element => [box(element).width, box(element).height]),
  cut: all("body *").filter(one => !one.closest(".scroll, svg") && cut(one)).map(one => one.outerHTML.slice(0, 80)),
  unnamed: all("svg, img").filter(element => !element.closest(named) && !element.alt).length,
  loaded: loaded.filter(name => !name.startsWith("data:")),
  smallest: Math.min(...all("svg text").map(text => box(text).height)),
  paper: getComputedStyle(document.body).backgroundColor,
}), "*");
</script>
"""
FRAME = """
<script>onmessage = event => {{ document.title = event.data; }};</script>
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("pages")
    lines = [line(step, new_metric_of_a_long_name=step / 7.0) for step in range(10, 101, 10)]
    lines.append({"step": 100, "epoch": 0, "knn_200": 70.0, "knn_20": 75.0})
    one = run_folder(place / "a_run_whose_name_is_as_long_as_names_of_runs_are_lr0.3_bank65536", lines=lines)
    two = run_folder(place / "b", config="small_moco")
    device = torch.device("cpu")
    return [write_report([one], ReportConfig(), device)[0], write_report([one, two], ReportConfig(), device)[0]]


def look(page: Path, width: int, *options: str) -> dict:
    # The policy of the page forbids scripts, also this one.
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    copy, frame = page.with_name("copy.html"), page.with_name("frame.html")
    copy.write_text(text.replace("</body>", f"{SCRIPT}</body>"))
    frame.write_text(FRAME.format(page=copy.as_uri(), width=width))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    command += ["--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert found, done.stderr[-1000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("which", [0, 1], ids=["one run", "two runs"])
def test_nothing_overflows_is_empty_or_loaded(which: int, width: int, pages: list[Path]) -> None:
    seen = look(pages[which], width)
    assert seen["width"] == width and seen["scroll"] <= width and seen["cut"] == []
    assert len(seen["sizes"]) >= 1 and all(min(size) > 40 for size in seen["sizes"])
    assert seen["unnamed"] == 0 and seen["loaded"] == []
    # Text of figures can be read on a phone too.
    assert seen["smallest"] > 8


def test_the_dark_scheme_is_dark(pages: list[Path]) -> None:
    colours = [look(pages[0], 800, *options)["paper"] for options in ([], ["--blink-settings=preferredColorScheme=0"])]
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert bright[0] > 700 and bright[1] < 150

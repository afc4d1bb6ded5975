"""README and docs: named files and links exist, all configurations are listed, and tables match the results."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 190


def test_every_named_file_exists():
    named = re.findall(r"`((?:caco_fast/|tools/|docs/|examples/|benchmarks/)[\w./-]+\.(?:py|yaml|json|md))`", README)
    named += [link for link in re.findall(r"\]\(([\w./-]+)\)", README) if not link.startswith("#")]
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page: Path):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([\w./-]*)#?([\w-]*)\)", text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {target}#{anchor}"


def test_the_listed_configurations_are_those_in_the_package():
    shipped = sorted(path.stem for path in (ROOT / "caco_fast" / "configs").glob("*.yaml"))
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (ROOT / "docs" / "recipes.md").read_text(), re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == shipped
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.M)) <= set(shipped)


def test_the_tables_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench/tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_list_of_results_names_the_gpu_that_checked_the_kernels(tmp_path: Path, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "tools" / "bench/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert "On a GPU" in tables.results() or "`csrc/` with the content hash" in tables.results()
    record = {
        "script": "tools/check/gpu.py",
        "machine": {"gpus": ["NVIDIA H200"], "cpu": "some CPU"},
        "commit": "0123456789abcdef",
        "dirty": True,
        "time": "2030-01-02T03:04:05+00:00",
        "settings": {"csrc_hash": "feedbeef", "gpu": "NVIDIA H200", "capability": "90"},
        "results": {
            "stages": {"build": {"status": "passed"}, "primitives sm80": {"status": "passed"}},
            "files": ["b.json"],
        },
    }
    (tmp_path / "gpu_check_nvidia_h200.json").write_text(json.dumps(record))
    (tmp_path / "b.json").write_text("what it measured")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    listed = tables.results()
    assert "| [gpu_check_nvidia_h200](benchmarks/results/gpu_check_nvidia_h200.json), [b](benchmarks/" in listed
    assert "| Proves the kernels on the GPU of this machine" in listed
    assert "| NVIDIA H200 | 2030-01-02 | 0123456 with changes |" in listed
    assert "\n`csrc/` with the content hash feedbeef on NVIDIA H200: sm90 lacks primitives sm90 (not run), " in listed
    assert listed.endswith("; sm80 lacks tests sm80 (not run).")

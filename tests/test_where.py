"""Names of files that are listed elsewhere: the table "Where is ...?" of CONTRIBUTING.md, and the slow tests."""

import re
from pathlib import Path

import pytest

from tests.conftest import SLOW, TESTS

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("computed in", "tested in", "timed by")


def rows() -> list[dict[str, str]]:
    """The rows of the table by the names of its columns."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Where is ...?")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, line, strict=True)) for line in body]


ROWS = rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["what"].strip("`").replace(" ", "_"))
def test_every_path_exists(row: dict[str, str]) -> None:
    named = [path for cell in row.values() for path in re.findall(r"`([\w.-]+/[\w./-]*)`", cell)]
    assert all(re.search(r"`[\w.-]+/", row[column]) for column in COLUMNS)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_table_has_a_row_for_each_operation_and_method() -> None:
    what = " ".join(row["what"] for row in ROWS)
    for name in ("bank_attend", "bank_select", "bank_step", "ema_update", "lars_step", "CaCo", "MoCo", "DALI"):
        assert name in what


def test_every_name_of_a_slow_test_is_a_file_or_a_folder() -> None:
    files = list(TESTS.rglob("test_*.py"))
    assert set(SLOW) <= {file.stem for file in files} | {file.parent.name for file in files}

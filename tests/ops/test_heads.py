"""The lines at the head of every operation name paths that exist, and what holds and what is free."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("Kernels", "Tests", "Time", "Keep", "Free")
ON_KERNELS = ("bank_attend", "bank_select", "bank_step")
OPERATIONS = (*ON_KERNELS, "ema_update", "lars_step")


def head_of(operation: str) -> dict[str, str]:
    source = (ROOT / "caco_fast" / "ops" / f"{operation}.py").read_text()
    lines = re.findall(rf"^({'|'.join(KEYS)}) +(\S.*)$", ast.get_docstring(ast.parse(source)) or "", re.M)
    assert [key for key, _ in lines] == list(KEYS)
    return dict(lines)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_head_of_an_operation_names_what_is_there(operation: str) -> None:
    head = head_of(operation)
    assert head["Tests"] == f"tests/ops/test_{operation}.py" and (ROOT / head["Tests"]).is_file()
    assert head["Time"] == f"python tools/bench/ops.py {operation}" and (ROOT / head["Time"].split()[1]).is_file()
    if operation in ON_KERNELS:
        assert head["Kernels"] == f"csrc/{operation}/" and (ROOT / head["Kernels"]).is_dir()
    else:
        assert head["Kernels"].startswith("none")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_paths_in_a_head_exist(operation: str) -> None:
    for path in re.findall(r"tests/[\w/.]+\.py", " ".join(head_of(operation).values())):
        assert (ROOT / path).is_file(), path

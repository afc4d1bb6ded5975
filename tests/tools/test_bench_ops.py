"""tools/bench/ops.py: its figures are of the work that it names, and it prints none on a red gate or for wrong work."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from caco_fast import benchmarking
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, ProjectorConfig, build_encoder_pair
from tests.tool import load_tool

ops = load_tool("bench/ops")
ops_worker, ops_work, ops_report = (sys.modules[name] for name in ("ops_worker", "ops_work", "ops_report"))

ROOT = Path(__file__).resolve().parents[2]
TASK = ops_worker.Task(("bank",), ((16, 64, 16),), "cpu", ("float32", "bfloat16"), rounds=2, seconds=60, threads=1)
LISTS = replace(TASK, operations=("ema_update", "lars_step"), sizes=None)


@pytest.fixture
def few_tensors(monkeypatch: pytest.MonkeyPatch) -> int:
    """One tensor of each kind in place of an encoder's: its number of elements."""
    shapes = [torch.Size(shape) for shape in ((8, 3, 3, 3), (16, 8), (16,))]
    monkeypatch.setattr(ops_work, "encoder_shapes", lambda: shapes)
    return sum(shape.numel() for shape in shapes)


@pytest.fixture(autouse=True)
def keep_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "bench" / "ops.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)


def measured(task: Any, limits: dict[str, float] | None = None) -> list[dict[str, Any]]:
    return [ops_report.figures(row, limits or {}) for row in ops_worker.rows(task)]


def record_of(rows: list[dict[str, Any]], limits: dict[str, float], gpu: str | None = None) -> dict[str, Any]:
    settings = {"gpu": gpu, "device": "cpu", "threads": 1, "base": None}
    results = {"ceilings": limits, "rows": rows}
    return {"settings": settings, "machine": {"cpu": "some CPU"}, "versions": {"torch": "2"}, "results": results}


# The whole script


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_it_writes_times_and_memory_of_every_variant(tmp_path, monkeypatch, capsys):
    output = tmp_path / "bench.json"
    rows, bank_rows = 256, 16384
    monkeypatch.setattr(ops, "gate", lambda operations, device: "1 passed")
    sizes = ["--sizes", f"{rows},{bank_rows},32", "--rounds", "2", "--threads", "1"]
    assert ops.main(["bank", *sizes, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    found = {row["variant"]: row for row in record["results"]["rows"]}
    assert list(found) == ["dense eager", "tiled float32", "tiled bfloat16"]
    for row in found.values():
        assert set(row["parts"]) == {"bank_attend", "bank_select", "bank_step"}
        for times in (row["ms"], row["processor_ms"], *(part["ms"] for part in row["parts"].values())):
            assert 0 < times["p20"] <= times["median"] <= times["p80"]
    # The dense step holds the similarities and their softmax at the same time; the tiled one neither, and at this size
    # its extra memory is mostly what the allocator keeps.
    extra = {variant: row["extra_bytes"] for variant, row in found.items()}
    assert extra["dense eager"] > 2 * 4 * rows * bank_rows
    assert 0 < extra["tiled float32"] < extra["dense eager"] / 2
    assert {"machine", "versions", "commit", "dirty", "content_sha256", "settings", "time"} <= set(record)
    printed = capsys.readouterr().out
    assert "| tiled bfloat16 |" in printed
    with pytest.raises(SystemExit) as ended:
        ops.main(["--table", str(output)])
    assert ended.value.code == 0 and capsys.readouterr().out.strip() in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--table", "none.json"), "--table none.json: no such file"),
        (("bank", "--sizes", "3,4"), "--sizes: found '3,4', expected R,K,C"),
        pytest.param(
            ("bank", "--device", "cuda"),
            "--device cuda: torch finds no CUDA GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_run_is_one_clear_line(arguments, words):
    answer = run(*arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"error: {words}") and answer.stderr.count("\n") == 1


def test_an_unknown_operation_is_named(capsys):
    with pytest.raises(SystemExit):
        ops.main(["bank_stop"])
    assert "operations: found bank_stop, expected some of all, bank" in capsys.readouterr().err


# The gate


def in_a_tree(monkeypatch: pytest.MonkeyPatch, tree: Path, test: str) -> None:
    (tree / "tests" / "ops").mkdir(parents=True)
    (tree / "tests" / "ops" / "test_bank_step.py").write_text(f"def test_step():\n    assert {test}\n")
    monkeypatch.setattr(ops, "ROOT", tree)


def test_no_speed_is_printed_while_a_test_fails(monkeypatch, tmp_path, capsys):
    in_a_tree(monkeypatch, tmp_path, "1 + 1 == 3")
    monkeypatch.setattr(ops, "measure", lambda task: pytest.fail("it measures"))
    assert ops.main(["bank_step", "--output", str(tmp_path / "bench.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(
        "error: tests/ops/test_bank_step.py: found FAILED tests/ops/test_bank_step.py::test_step"
    )
    assert printed.err.endswith("expected passing tests; no speed is printed\n")


def test_an_open_gate_says_what_was_tested(monkeypatch, tmp_path, capsys):
    in_a_tree(monkeypatch, tmp_path, "1 + 1 == 2")
    assert ops.main(["bank_step", "--gate-only"]) == 0
    assert capsys.readouterr().out.startswith("tests: 1 passed in ")


def test_an_operation_without_tests_is_not_timed(monkeypatch, tmp_path, capsys):
    in_a_tree(monkeypatch, tmp_path, "1 + 1 == 2")
    assert ops.main(["bank"]) == 1
    assert "tests/ops/test_bank_attend.py: no such file, so no speed is printed" in capsys.readouterr().err


@pytest.mark.parametrize("device, selected", [("cpu", {"reference", "tiled"}), ("cuda", {"gpu"})], ids=["cpu", "cuda"])
def test_the_gate_selects_the_backends_that_are_timed(device, selected):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-k",
        ops.TESTS[device],
        "tests/ops/test_bank_step.py",
    ]
    # Options of the tests that run now, such as -v, would change what is printed.
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    ids = [word.strip("]") for line in found.splitlines() if "::" in line for word in line.partition("[")[2].split("-")]
    assert {
        word for word in ids if word in {"reference", "tiled", "sm70", "sm80", "sm90", "gpu", "gpu sm80"}
    } == selected


# The worker, as far as the CPU allows


def test_every_size_and_variant_has_rates_and_shares_of_the_ceilings(monkeypatch):
    monkeypatch.setattr(ops_worker.Task, "variants", lambda *_: ["dense eager", "dense eager TF32", "tiled bfloat16"])
    limits = ops_worker.ceilings(ops_worker.Timer("cpu"), "cpu")
    sizes = ((64, 512, 32), (8, 100, 16))
    rows = measured(replace(TASK, sizes=sizes), limits)
    assert [tuple(row["size"].values()) for row in rows] == [size for size in sizes for _ in range(3)]
    for row in rows:
        r, k, c = row["size"].values()
        median = row["ms"]["median"]
        assert row["gflop_per_s"] == pytest.approx(10 * r * k * c / median / 1e6, abs=0.06)
        traffic = (22 * k + 10 * r) * c / median / 1e6
        assert row["gb_per_s"] == pytest.approx(traffic, abs=0.06)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / limits["copy_gb_per_s"], rel=1e-3, abs=1e-4)
        assert set(row["parts"]["bank_step"]) == set(row) & set(row["parts"]["bank_step"])
        if row["variant"] == "dense eager TF32":
            assert row["difference"] == 0
        if row["variant"] == "tiled bfloat16":
            assert 0 < row["difference"] < 0.05
    table = ops.table(record_of(rows, limits, "some GPU"))
    assert len(table.splitlines()) == 4 + 6
    assert "of cuBLAS" in table and "of cuBLAS" not in ops.table(record_of(rows, {}))


@pytest.mark.parametrize("operation", ["bank_attend", "bank_select", "bank_step"])
def test_a_part_is_timed_alone_and_compared_with_the_dense_one(operation):
    dense, *others = measured(replace(TASK, operations=(operation,)))
    assert "parts" not in dense and "difference" not in dense
    assert others[0]["difference"] < 1e-5 and others[1]["difference"] < 0.05
    # Rows in bf16 give other numbers, but at this size they select the same positives.
    assert (others[1]["difference"] == 0) == (operation == "bank_select")


def test_a_wrong_bank_variant_is_not_timed(monkeypatch):
    right = ops_worker.make_work

    def wrong(operation, variant, *arguments):
        work = right(operation, variant, *arguments)
        if variant == "tiled float32":
            step = work.parts["bank_step"]
            work.parts["bank_step"] = lambda: (step(), work.outcome().tensors[0].mul_(1.2))
        return work

    monkeypatch.setattr(ops_worker, "make_work", wrong)
    dense, first, second = measured(TASK)
    assert "ms" in dense and "ms" in second
    assert first["error"] == "wrong: its result differs by 0.2 of the norm of the expected one" and "ms" not in first
    assert f"| {first['error']} |" in ops.table(record_of([dense, first, second], {}))


def test_a_wrong_list_variant_is_not_timed(few_tensors, monkeypatch):
    right = ops_work.lars_step_

    def wrong(params, grads, velocities, **settings):
        right(params, grads, velocities, **settings)
        velocities[1][3] += 0.1

    monkeypatch.setattr(ops_work, "lars_step_", wrong)
    loop, foreach, flag = measured(replace(LISTS, operations=("lars_step",)))
    assert "ms" in loop
    assert foreach["error"].startswith("wrong: its result differs by ") and flag["error"].startswith("wrong: ")


def test_an_exception_is_the_result_of_its_variant(monkeypatch):
    """Where memory lacks for the dense form, the tiled one in f32 is what others are compared with."""
    right = ops_worker.make_work

    def failing(row, variant, *arguments):
        if variant == "dense eager":
            raise torch.OutOfMemoryError("of memory")
        if variant == "tiled bfloat16":
            raise RuntimeError("backend is not there\nmore")
        return right(row, variant, *arguments)

    monkeypatch.setattr(ops_worker, "make_work", failing)
    dense, first, second = measured(TASK)
    assert dense["error"] == "out of memory" and second["error"] == "RuntimeError: backend is not there"
    assert "ms" in first and first["difference"] == 0


def test_a_process_that_ends_early_is_an_error_of_its_rows_and_the_next_case_is_measured(monkeypatch, tmp_path):
    """The stand-in for a worker ends in its first case, breaks the GPU in its second, and is well in its third."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys\n"
        "first = json.loads(sys.argv[1])['first']\n"
        "if first == 0: sys.exit('it has ended')\n"
        "for name in ('dense eager', 'tiled float32', 'tiled bfloat16'):\n"
        "    print(json.dumps({'variant': name, 'first': first}), flush=True)\n"
        f"sys.exit({ops_worker.BROKEN} * (first == 1))\n"
    )
    monkeypatch.setattr(ops, "WORKER", worker)
    found = list(ops.run_worker(replace(TASK, sizes=((1, 2, 3), (4, 5, 6), (7, 8, 9)))))
    assert [row.get("error") for row in found] == ["the measuring process ended with status 1: it has ended"] * 3 + [
        None
    ] * 6
    assert [row["size"] for row in found[:3]] == [{"R": 1, "K": 2, "C": 3}] * 3
    assert [row["first"] for row in found[3:]] == [1] * 3 + [2] * 3


def test_a_kernel_that_hangs_is_an_error_of_its_row(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys, time\n"
        "first = json.loads(sys.argv[1])['first']\n"
        "for number in range(first, 5):\n"
        "    if number == 1: time.sleep(60)\n"
        "    print(json.dumps({'number': number}), flush=True)\n"
    )
    monkeypatch.setattr(ops, "WORKER", worker)
    monkeypatch.setattr(ops, "LONGEST_SECONDS", 1)
    task = replace(TASK, operations=("bank_step",), device="cuda")
    found = list(ops.run_worker(task))
    assert [row.get("number", row.get("error")) for row in found] == [
        0,
        "the measuring process ended with status -9: no output",
        2,
        3,
        4,
    ]


def test_out_of_time_names_the_sizes_that_did_not_run():
    rows = measured(replace(TASK, seconds=-1))
    assert {row["error"] for row in rows} == {"not begun within -1 s"}
    assert [row["size"] for row in rows] == [{"R": 16, "K": 64, "C": 16}] * 3


def test_a_gpu_covers_these_sizes_and_variants():
    task = replace(TASK, device="cuda", sizes=None)
    sizes = [size for _, size in task.cases()]
    assert len(sizes) == len(set(sizes)) == 5 * 3 * 2
    assert sizes[0] == (2048, 65536, 256)
    kernels = ["cuda float32 1 t", "cuda float32 2 t", "cuda bfloat16 1 t", "cuda bfloat16 2 t"]
    peers = ["tiled bfloat16", "dense eager", "dense eager TF32"]
    assert task.variants("bank", sizes[0]) == [*kernels, *peers, "dense compiled TF32"]
    assert task.variants("bank", (1024, 65536, 256)) == [*kernels, *peers]
    assert task.variants("bank", sizes[-1]) == kernels
    assert task.variants("bank_step", sizes[-1]) == ["cuda float32", "cuda bfloat16"]
    assert [len(group) for group in task.groups()] == [1] * len(task.groups())
    only = replace(task, sizes=sizes[:1], only=("cuda bfloat16", "dense compiled"))
    assert [row["variant"] for (row,) in only.groups()] == [*kernels[2:], "dense compiled TF32"]
    # Sizes that a user names are compared whatever they are.
    assert replace(task, sizes=((7, 8, 9),)).variants("bank", (7, 8, 9))[-3:] == peers


def test_a_process_measures_the_task_that_it_was_given():
    task = replace(TASK, device="cuda", sizes=((2048, 65536, 256),), only=("cuda", "dense"))
    again = ops_worker.Task(**json.loads(json.dumps(ops.asdict(task))))
    assert again == task and again.groups() == task.groups()


class StandInEvent:
    """torch.cuda.Event over the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "StandInEvent") -> float:
        return 1000 * (end.time - self.time)


def test_on_a_gpu_every_variant_is_measured_alone_and_a_broken_one_ends_the_process(monkeypatch):
    """The tensors are on the CPU, and the functions of torch.cuda are stand-ins; the kernels are the tiled form."""
    broken = []
    for name in ("set_device", "_sleep", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    # As the real one, it takes no device without an index.
    monkeypatch.setattr(torch.cuda, "set_device", torch.cuda._utils._get_device_index)
    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10)

    def synchronize(*device: object) -> None:
        if broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    for name in ("start_peak", "peak_bytes"):
        of_gpu = getattr(ops_worker, name)
        monkeypatch.setattr(ops_worker, name, lambda device, of_gpu=of_gpu: of_gpu(torch.device("cuda")))

    def make_work(row, variant, device):
        if variant.startswith("cuda float16"):
            broken.append(variant)
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        inputs = ops_work.BankInputs(*row["size"].values(), "cpu")
        return ops_work.bank_work(row["operation"], variant.replace("cuda", "tiled"), inputs)

    class StandInTimer(ops_worker.Timer):
        def __init__(self, device: str) -> None:
            super().__init__("cpu")
            self.on_gpu = True

    monkeypatch.setattr(ops_worker, "make_work", make_work)
    monkeypatch.setattr(ops_worker, "Timer", StandInTimer)
    monkeypatch.setattr(ops_worker, "ceilings", lambda *_: {"copy_gb_per_s": 100.0, "cublas_bf16_tflop_per_s": 1.0})
    task = replace(TASK, device="cuda", dtypes=("bfloat16", "float16"))
    found = []
    with pytest.raises(SystemExit) as ended:
        for row in ops_worker.rows(task):
            found.append(row)
    assert ended.value.code == ops_worker.BROKEN
    ceilings, one, two, failed = found
    assert [one["variant"], two["variant"]] == ["cuda bfloat16 1 t", "cuda bfloat16 2 t"]
    for row in (one, two):
        assert row["extra_bytes"] == 7 and row["difference"] < 0.02 and row["other_positives"] == 0
        assert len(row["samples"]["whole"]) == len(row["samples"]["host"]) == 2
    assert failed["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    broken.clear()
    rest = list(ops_worker.rows(replace(task, first=4)))
    rows = [ops_report.figures(row, ceilings["ceilings"]) for row in (one, two, failed, *rest)]
    assert [row["variant"] for row in rest] == ["tiled bfloat16", "dense eager", "dense eager TF32"]
    table = ops.table(record_of(rows, ceilings["ceilings"], "some GPU"))
    assert "| faster | than tiled |" in table and "| of cuBLAS |" in table and "| host ms |" in table


def test_the_time_of_a_bank_row_is_held_against_that_in_the_smallest_bank():
    row = {"operation": "bank", "variant": "cuda bfloat16 1 t", "samples": {"whole": [1.0]}}
    rows = [
        {**row, "size": {"R": 8, "K": k, "C": 16}, "samples": {"whole": [ms]}} for k, ms in ((64, 1.0), (640, 12.0))
    ]
    limits = {"copy_gb_per_s": 100.0, "cublas_bf16_tflop_per_s": 1.0}
    table = ops.table(record_of([ops_report.figures(row, limits) for row in rows], limits, "some GPU"))
    cells = [
        dict(zip(*(map(str.strip, line.split("|")) for line in (table.splitlines()[2], line))))
        for line in table.splitlines()[4:]
    ]
    assert [found["of linear in K"] for found in cells] == ["", "1.20"]


def test_lists_have_times_rates_and_aten_calls_of_every_variant(few_tensors):
    rows = measured(LISTS)
    assert [row["variant"] for row in rows] == ["loop", "foreach", "foreach, flag"] * 2
    for row in rows:
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        traffic = {"ema_update": 12, "lars_step": 28}[row["operation"]] * few_tensors
        assert row["gb_per_s"] == pytest.approx(traffic / row["ms"]["median"] / 1e6, abs=0.06)
        assert row["size"] == {"tensors": 3, "elements": few_tensors} and row["difference"] < 1e-5
    assert rows[0]["aten_calls"] == 2 * 3 and rows[1]["aten_calls"] == 1
    assert ops.table(record_of(rows, {})).count("\n") == 3 + 6


def test_lists_have_the_shapes_of_the_encoder():
    with torch.device("meta"):
        query = build_encoder_pair(BackboneConfig("resnet50"), ProjectorConfig(), 3).query
    assert sorted(ops_work.encoder_shapes()) == sorted(p.shape for p in query.parameters())
    inputs = ops_work.ListInputs([torch.Size((8, 3, 3, 3))], "cpu")
    assert not inputs.params[0].is_contiguous()


# The base


def test_base_is_measured_in_turns_and_reported_as_a_ratio(monkeypatch):
    base, trees = Path("base"), []
    row = {"operation": "bank_step", "size": {"R": 1, "K": 2, "C": 3}, "variant": "tiled float32"}

    def worker(task, tree):
        trees.append(tree)
        yield {**row, "samples": {"whole": [3.0 if tree == base else 1.5] * 3}}
        new = {**row, "variant": "new"}
        yield {**new, "error": "status 1"} if tree == base else {**new, "samples": {"whole": [1.0]}}

    monkeypatch.setattr(ops, "run_worker", worker)
    *_, (_, (found, new)) = ops.compare(TASK, base)
    assert trees[:4] == [ROOT, base, base, ROOT] and trees.count(base) == ops.TURNS
    assert found["ms"]["median"] == 1.5 and found["base_ms"]["median"] == 3
    assert found["times_base"] == {"median": 0.5, "p20": 0.5, "p80": 0.5}
    assert new["base_error"] == "status 1" and "times_base" not in new
    assert "| 0.5 (0.5-0.5) |" in ops.table(record_of([found, new], {}))


def test_base_is_checked_out_and_removed_again(monkeypatch, tmp_path):
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "file").write_text("old")
    git("add", "file")
    git("commit", "-qm", "old")
    (tmp_path / "file").write_text("new")
    monkeypatch.setattr(benchmarking, "ROOT", tmp_path)
    with benchmarking.checked_out("HEAD") as tree:
        assert (tree / "file").read_text() == "old"
    assert not tree.exists() and list((tmp_path / ".git" / "worktrees").glob("*")) == []
    with pytest.raises(UserError, match="^--base nowhere: .*nowhere"), benchmarking.checked_out("nowhere"):
        pass


def test_an_older_package_needs_no_more_than_its_public_operations():
    for name in ("ops_worker", "ops_work", "timing"):
        source = (ROOT / "tools" / "bench" / f"{name}.py").read_text()
        imported = [line for line in source.splitlines() if "caco_fast" in line and "import" in line.split()]
        assert all(
            line.startswith(("from caco_fast.ops import ", "from caco_fast.bank import ")) for line in imported
        ), name

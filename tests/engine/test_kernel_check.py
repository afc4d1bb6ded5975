"""The check at the start of a run, with the emulated kernels as those of a GPU: right ones pass, wrong ones stop it."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from caco_fast.bank import KeyQueue, LearnableBank
from caco_fast.distributed import rank
from caco_fast.engine import kernel_check
from caco_fast.engine.kernel_check import first_fault, require_backend, settle, settle_banks
from caco_fast.engine.precision import use_tf32
from caco_fast.errors import UserError
from caco_fast.methods import CaCo, CaCoConfig, Method, MoCo, MoCoConfig
from caco_fast.methods.nnclr import NNCLR, NNCLRConfig
from caco_fast.ops import dispatch
from caco_fast.ops.checks import BankUse
from caco_fast.training import train
from tests.engine.tiny_run import config
from tests.ops.backends import drop_kernels, emulated_module, kernels_over
from tests.ranks import run_ranks

CPU = torch.device("cpu")
USE = BankUse("caco.backend", "auto", 33, 130, 80, ((0.1, 0.07), (0.2,)), step_temperature=0.07)
PLANTED = ("attend_cuda", "select_cuda", "step_cuda_")
one_path = pytest.mark.parametrize("path", [90], indirect=True)


def plant(monkeypatch: pytest.MonkeyPatch, operation: str, output: int, kind: str = "row") -> None:
    """Make one row of a result of an operation wrong, be it returned or written in place; or let it raise."""
    module = sys.modules["caco_fast.ops.bank_" + operation.split("_")[0]]
    right = getattr(module, operation)

    def wrong(*arguments: Any) -> Any:
        if kind == "exception":
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
        results = right(*arguments)
        row = (arguments if results is None else results)[output][5:6]
        if not row.is_floating_point():
            row.add_(1)
        elif kind == "row":
            row.mul_(1.5)
        else:
            row.view(-1)[:1] = torch.nan
        return results

    monkeypatch.setattr(module, operation, wrong)


# What the check finds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "fp16"])
@pytest.mark.parametrize("norm, positives, decay", [("implicit", 1, 0), ("project", 2, 0.01), ("implicit", 0, 1e-4)])
def test_right_kernels_pass(cuda_ops, dtype, norm, positives, decay):
    use = USE._replace(dtype=dtype, norm=norm, positives=positives, weight_decay=decay)
    assert first_fault(use, cuda_ops, CPU, seed=3) is None


@pytest.mark.parametrize("path", [80], indirect=True)
@pytest.mark.parametrize("norm", ["implicit", "project"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 16), (8, 37, 16), (70, 300, 128)], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_right_kernels_pass_at_any_shape_and_temperature(cuda_ops, path, shape, temperature, norm):
    use = BankUse("", "auto", *shape, ((temperature,),), step_temperature=temperature, norm=norm)
    for seed in range(5):
        assert first_fault(use, cuda_ops, CPU, seed) is None


ALLOWED = r"differs by \d\.\de[+-]\d\d, where \d\.\de-\d\d is allowed \(R 33 K 130 C 80, f32 rows\)"
FAULTS = {
    ("attend_cuda", 0): "bank_attend: lse " + ALLOWED,
    ("attend_cuda", 1): "bank_attend: lse " + ALLOWED,
    ("attend_cuda", 2): "bank_attend: mean row " + ALLOWED,
    ("select_cuda", 0): "bank_select: select .*",
    ("select_cuda", 1): "bank_select: select's similarity " + ALLOWED,
    ("step_cuda_", 0): "bank_step: bank " + ALLOWED,
    ("step_cuda_", 1): "bank_step: velocity " + ALLOWED,
    ("step_cuda_", -1): "bank_step: unit rows " + ALLOWED,
}


@one_path
@pytest.mark.parametrize("operation, output", FAULTS)
def test_one_wrong_row_is_found(cuda_ops, monkeypatch, path, operation, output):
    plant(monkeypatch, operation, output)
    found = first_fault(USE, cuda_ops, CPU, seed=3)
    assert re.fullmatch(FAULTS[operation, output], found or ""), found


@one_path
@pytest.mark.parametrize("bank_rows, channels, decay", [(130, 80, 1e-4), (700, 128, 1e-4)])
def test_weight_decay_that_is_left_out_is_found(cuda_ops, monkeypatch, path, bank_rows, channels, decay):
    """With the temperature and the weight decay of AdCo."""
    module = sys.modules["caco_fast.ops.bank_step"]
    right = module.step_cuda_
    at = 7

    def wrong(*arguments: Any) -> None:
        assert arguments[at] == decay
        right(*arguments[:at], 0.0, *arguments[at + 1 :])

    use = USE._replace(bank_rows=bank_rows, channels=channels, step_temperature=0.02, positives=0, weight_decay=decay)
    assert first_fault(use, cuda_ops, CPU, seed=3) is None
    monkeypatch.setattr(module, "step_cuda_", wrong)
    found = first_fault(use, cuda_ops, CPU, seed=3)
    assert found is not None and found.startswith("bank_step: velocity differs")


@one_path
@pytest.mark.parametrize("operation, output", [fault for fault in FAULTS if fault != ("select_cuda", 0)])
def test_one_nan_is_found(cuda_ops, monkeypatch, path, operation, output):
    plant(monkeypatch, operation, output, "nan")
    found = first_fault(USE, cuda_ops, CPU, seed=3)
    assert found is not None and "differs by nan" in found


@one_path
@pytest.mark.parametrize("operation", PLANTED)
def test_an_exception_is_found_and_becomes_one_line(cuda_ops, monkeypatch, path, operation):
    plant(monkeypatch, operation, 0, "exception")
    found = first_fault(USE, cuda_ops, CPU, seed=3)
    name = "bank_" + operation.split("_")[0]
    line = f"{name}: RuntimeError: CUDA error: an illegal memory access was encountered (R 33 K 130 C 80, f32 rows)"
    assert found == line


@one_path
@pytest.mark.parametrize("change", [lambda index: index.fill_(130), lambda index: index.fill_(-1)], ids=["K", "-1"])
def test_an_index_outside_of_the_bank_is_found(cuda_ops, monkeypatch, path, change):
    module = sys.modules["caco_fast.ops.bank_select"]
    right = module.select_cuda

    def wrong(*arguments):
        index, similarity = right(*arguments)
        return change(index), similarity

    monkeypatch.setattr(module, "select_cuda", wrong)
    found = first_fault(USE, cuda_ops, CPU, seed=3)
    assert found is not None and re.match(r"bank_select: select gives row (130|-1) of 130", found)


@one_path
def test_a_tie_that_goes_to_a_later_row_is_found(cuda_ops, monkeypatch, path):
    module = sys.modules["caco_fast.ops.bank_select"]
    right = module.select_cuda

    def wrong(keys, bank, operand):
        index, similarity = right(keys, bank, operand)
        last = [int((bank == bank[at]).all(dim=1).nonzero().amax()) for at in index]
        return torch.tensor(last), similarity

    monkeypatch.setattr(module, "select_cuda", wrong)
    found = first_fault(USE, cuda_ops, CPU, seed=3)
    assert found is not None and re.match(r"bank_select: select takes row \d+ before the equal row \d+ ", found)


@one_path
def test_a_queue_that_only_selects_is_checked_with_select_alone(cuda_ops, monkeypatch, path):
    use = NNCLR(NNCLRConfig(queue_size=130), 80).bank_uses(33, 1)[0]
    for operation in ("attend_cuda", "step_cuda_"):
        plant(monkeypatch, operation, 0)
    assert first_fault(use, cuda_ops, CPU, seed=3) is None
    plant(monkeypatch, "select_cuda", 0)
    assert "bank_select: select " in (first_fault(use, cuda_ops, CPU, seed=3) or "")


@one_path
def test_a_queue_is_checked_without_select_and_step(cuda_ops, monkeypatch, path):
    for operation in PLANTED[1:]:
        plant(monkeypatch, operation, 0)
    (use,) = MoCo(MoCoConfig(queue_size=130), 80).bank_uses(16, 2)
    assert first_fault(use, cuda_ops, CPU, seed=3) is None


def test_a_large_bank_is_checked_in_part(monkeypatch):
    seen = []
    monkeypatch.setattr(kernel_check, "_checks", lambda use, shape, *rest: seen.append(shape) or [])
    for rows, bank_rows in ((512, 65536), (2048, 2**22), (2**20, 65536), (512, 100)):
        first_fault(USE._replace(rows=rows, bank_rows=bank_rows, channels=256), None, CPU, seed=3)
    assert seen == [(512, 65536, 256), (2048, 16384, 256), (2**20, 256, 256), (512, 100, 256)]


@one_path
def test_a_check_that_hangs_says_so(cuda_ops, monkeypatch, path, caplog):
    monkeypatch.setattr(kernel_check, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(kernel_check, "first_fault", lambda *arguments: time.sleep(0.3))
    settle(USE, CPU, seed=0)
    line = "the check of the kernels has not ended after 0 s; if one hangs, kill the run and set caco.backend=tiled"
    assert [record.message for record in caplog.records] == [line]


# What a method says of its bank


def test_uses_name_the_rows_temperatures_and_dtype_of_the_method():
    caco = CaCo(CaCoConfig(bank_size=37, bank_temperature=0.05, operands="bf16", norm="project"), 16)
    (use,) = caco.bank_uses(8, 8)
    assert use == BankUse(
        "caco.backend", "auto", 64, 37, 16, ((0.08, 0.05), (0.2,)), 0.05, torch.bfloat16, positives=2, norm="project"
    )
    (use,) = MoCo(MoCoConfig(queue_size=37), 16).bank_uses(8, 2)
    assert use == BankUse("moco.backend", "auto", 8, 37, 16, ((0.2,),))
    (use,) = NNCLR(NNCLRConfig(queue_size=37), 16).bank_uses(8, 2)
    assert use == BankUse("nnclr.backend", "auto", 16, 37, 16, (), selects=True)


def test_banks_are_found_in_a_method_that_does_not_name_them_and_in_methods_within():
    class Outer(Method):
        section = "small"
        check_views = embed = loss = None

        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList([KeyQueue(29, 16), MoCo(MoCoConfig(queue_size=41, temperature=0.3), 16)])
            self.bank = LearnableBank(37, 16, norm="project")

    assert sorted(Outer().bank_uses(8, 3)) == [
        BankUse("moco.backend", "auto", 8, 41, 16, ((0.3,),)),
        BankUse("small.backend", "auto", 24, 29, 16, ((0.1,),)),
        BankUse("small.backend", "auto", 24, 37, 16, ((0.1,),), step_temperature=0.1, norm="project"),
    ]


# What the log says


def line_of(use: BankUse, device: torch.device = CPU) -> str:
    bank, fault = settle(use, device, seed=0)
    assert fault is None
    return str(bank)


def test_the_line_names_backend_reason_and_products(monkeypatch):
    assert line_of(USE) == "bank: tiled, because device is cpu; products in f32"
    named = USE._replace(backend="tiled", dtype=torch.bfloat16)
    assert line_of(named) == "bank: tiled, because the settings name it; products in bf16"
    reference = USE._replace(backend="reference", dtype=torch.bfloat16)
    assert line_of(reference) == "bank: reference, because the settings name it; products in f32"
    monkeypatch.setattr(dispatch, "cuda_backend", lambda: None)
    built = "the extension was not built (CACO_CUDA=1 python setup.py build_ext builds it)"
    gpu = torch.device("cuda")
    assert line_of(USE, gpu) == f"bank: tiled, because {built}; products in f32"
    use_tf32(True)
    try:
        assert line_of(USE, gpu) == f"bank: tiled, because {built}; products in f32", "TF32 is for encoders alone"
    finally:
        use_tf32(False)


def test_the_line_of_a_gpu_without_a_path_says_what_to_build(monkeypatch):
    class Kernels:
        available = staticmethod(lambda device: False)
        why_not = staticmethod(lambda device: "A100 is sm_80, built for 90a: rebuild with CACO_ARCHES=80")

    monkeypatch.setattr(dispatch, "cuda_backend", lambda: Kernels)
    expected = "bank: tiled, because A100 is sm_80, built for 90a: rebuild with CACO_ARCHES=80; products in f32"
    assert line_of(USE, torch.device("cuda")) == expected


@pytest.mark.parametrize("path, products", [(70, "fp16"), (80, "bf16"), (90, "bf16")], indirect=["path"])
def test_the_line_of_kernels_says_that_they_were_checked(cuda_ops, path, products):
    name = {70: "sm_70", 80: "sm_80", 90: "sm_90a"}[path]
    line = (
        re.escape(f"bank: cuda kernels ({name}), checked against tiled in ")
        + r"\d+\.\d s"
        + f"; products in {products}"
    )
    assert re.fullmatch(line, line_of(USE))


@one_path
def test_f32_operands_take_the_tiled_form(cuda_ops, path):
    method = CaCo(CaCoConfig(bank_size=37, operands="f32"), 16)
    assert method.bank.backend == "tiled"
    (use,) = method.bank_uses(8, 2)
    reason = "caco.operands=f32 needs f32 products, which the kernels do not have"
    assert line_of(use) == f"bank: tiled, because {reason}; products in f32"
    assert CaCo(CaCoConfig(bank_size=37), 16).bank.backend == "auto"


def test_f32_operands_on_the_kernels_are_refused():
    with pytest.raises(
        UserError, match="caco.operands: found 'f32' with caco.backend=cuda, but the kernels multiply in"
    ):
        CaCoConfig(operands="f32", backend="cuda")


def test_kernels_that_are_not_there_are_refused_in_one_line():
    with pytest.raises(UserError, match="^caco.backend: found 'cuda', but device is cpu; set it to auto or tiled$"):
        require_backend("caco.backend", "cuda", CPU)


# Whole runs


def short(images: Path, *overrides: str):
    return config(images, "evaluation.every_epochs=0", "evaluation.baselines=false", "trainer.max_steps=2", *overrides)


@one_path
def test_each_start_of_a_run_checks_once_and_says_so(cuda_ops, monkeypatch, path, images, tmp_path, caplog):
    calls = []
    right = kernel_check.first_fault
    monkeypatch.setattr(kernel_check, "first_fault", lambda *arguments: calls.append(arguments) or right(*arguments))
    with caplog.at_level("INFO", "caco_fast"):
        train(short(images), tmp_path / "run")
        train(short(images, "trainer.max_steps=3"), tmp_path / "run", resume="auto")
    assert len(calls) == 2
    lines = [record.message for record in caplog.records]
    assert sum(line.startswith("bank: cuda kernels (sm_90a), checked against tiled in") for line in lines) == 2
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    for start in starts:
        (bank,) = start["banks"]
        assert bank.pop("check_seconds") >= 0
        reason = "the kernels run on this device"
        assert bank == {"backend": "cuda", "reason": reason, "products": "bf16", "kernels": "sm_90a"}


@one_path
@pytest.mark.parametrize("operation", PLANTED)
def test_a_wrong_kernel_stops_the_run_before_its_first_step(cuda_ops, monkeypatch, path, images, tmp_path, operation):
    plant(monkeypatch, operation, 0)
    with pytest.raises(UserError) as error:
        train(short(images), tmp_path / "run")
    line = str(error.value)
    assert line.startswith(f"bank_{operation.split('_')[0]}: ") and "\n" not in line
    assert "; set caco.backend=tiled to train without the kernels, and please report this line" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train(short(images, "caco.backend=tiled"), tmp_path / "run")


@pytest.mark.parametrize(
    "method, section", [("caco", "caco"), ("moco", "moco"), ("ablation", "caco"), ("clae", "moco")]
)
def test_the_kernels_on_a_cpu_are_refused_before_anything_else(images, tmp_path, method, section):
    settings = [f"method={method}", f"{section}.backend=cuda", "clae.base=moco", "data.path=/no/such/folder"]
    run = short(images, *settings)
    with pytest.raises(UserError, match=f"^{section}.backend: found 'cuda', but device is cpu"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Several ranks


def settled_line(operation: str) -> str:
    """The line with which this rank stops; the kernel is wrong on rank 1 only."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        kernels_over(emulated_module(), monkeypatch, 90)
        if rank() == 1:
            plant(monkeypatch, operation, 0, "row" if operation != "step_cuda_" else "exception")
        try:
            settle_banks(CaCo(CaCoConfig(bank_size=74), 16), 8, 2, CPU, seed=0, timeout=60)
        except UserError as error:
            return str(error)
        finally:
            drop_kernels()
    return "no fault"


@pytest.mark.parametrize("operation", PLANTED)
def test_a_fault_on_one_rank_stops_all_with_the_same_line(emulated, operation):
    first, second = run_ranks(settled_line, 2, operation)
    assert first == second
    assert first.startswith(f"bank_{operation.split('_')[0]}: ") and " on rank 1: " in first

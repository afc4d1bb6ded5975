"""The check of the kernels at the start of a run: on the run's own shape they must agree with the tiled form.

A kernel that is wrong on this GPU would train a wrong encoder for days without a word.

Legend: R query rows, K bank rows, C channels, B images on this rank.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from caco_fast.distributed import all_gather_objects, is_distributed, rank
from caco_fast.errors import UserError
from caco_fast.methods import Method
from caco_fast.ops import dispatch
from caco_fast.ops.checks import BankUse, Check, check_attend, check_select, check_step, make_problem

log = logging.getLogger(__name__)

# Bank rows that are checked, and multiplications of one product (R K C), so that the tiled form in f64 should take less
# than a second, and takes less than 2 GiB.
LEAST_BANK_ROWS, MOST_BANK_ROWS, MOST_WORK = 256, 65536, 2**33
# After which a line says that the check has not ended. A kernel that waits for ever can't be stopped from here.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class BankBackend:
    """The backend that a bank's operations run on, as the log and environment.json name it."""

    backend: str
    reason: str
    products: str  # precision of the matrix products
    kernels: str | None = None  # the family of kernels
    check_seconds: float | None = None

    def __str__(self) -> str:
        if self.backend != "cuda":
            return f"bank: {self.backend}, because {self.reason}; products in {self.products}"
        checked = f"checked against tiled in {self.check_seconds:.1f} s"
        return f"bank: cuda kernels ({self.kernels}), {checked}; products in {self.products}"


def require_backend(setting: str, backend: str, device: torch.device) -> None:
    """Raise UserError if `cuda` is named for a device that the kernels do not serve."""
    if backend == "cuda" and (reason := dispatch.why_no_kernels(device)):
        raise UserError(f"{setting}: found 'cuda', but {reason}; set it to auto or tiled")


def settle_banks(
    method: Method, images: int, views: int, device: torch.device, seed: int, timeout: float
) -> list[BankBackend]:
    """Choose the backend of every bank of a method, and check the kernels where they are chosen (collective).

    images: B. views: of each image. seed: of the rows that are compared. timeout: seconds to wait for another rank.

    Raises:
        UserError: a kernel is wrong or fails on some rank, or is not there. All ranks raise the same line.
    """
    uses = method.bank_uses(images, views)
    banks, faults = [], []
    for use in uses:
        bank, fault = settle(use, device, seed + rank())
        banks.append(bank)
        faults.append(fault)
    of_ranks = _of_all_ranks(([bank.backend for bank in banks], faults), timeout)
    for number, (backends, faults) in enumerate(of_ranks):
        place = f" on rank {number}" if is_distributed() else ""
        for use, fault in zip(uses, faults, strict=True):
            if fault is not None:
                raise UserError(
                    f"{fault}{place}: the check before the first step found it; set {use.setting}=tiled to train "
                    "without the kernels, and please report this line"
                )
        if backends != of_ranks[0][0]:
            log.warning("bank: %s%s, but %s on rank 0", ", ".join(backends), place, ", ".join(of_ranks[0][0]))
    return banks


def settle(use: BankUse, device: torch.device, seed: int) -> tuple[BankBackend, str | None]:
    """The backend of one bank on this rank, and what is wrong with it."""
    require_backend(use.setting, use.backend, device)
    backend, reason = dispatch.choose(use.setting, use.backend, device)
    products = dispatch.products(backend, device, use.dtype)
    if backend != "cuda":
        if use.reason is not None:
            reason = dispatch.why_no_kernels(device) or use.reason
        return BankBackend(backend, reason, products), None
    kernels: Any = dispatch.cuda_backend()
    start = time.perf_counter()
    with _says_if_it_hangs(use.setting):
        fault = first_fault(use, kernels, device, seed)
    seconds = round(time.perf_counter() - start, 3)
    return BankBackend(backend, reason, products, kernels.path_name(device), seconds), fault


@contextmanager
def _says_if_it_hangs(setting: str) -> Iterator[None]:
    line = "the check of the kernels has not ended after %.0f s; if one hangs, kill the run and set %s=tiled"
    timer = threading.Timer(PATIENCE_SECONDS, log.error, (line, PATIENCE_SECONDS, setting))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def first_fault(use: BankUse, kernels: Any, device: torch.device, seed: int) -> str | None:
    """The first error of the kernels on random rows of the run's shape, or None."""
    most = min(MOST_BANK_ROWS, MOST_WORK // (use.rows * use.channels))
    shape = (use.rows, min(use.bank_rows, max(most, LEAST_BANK_ROWS)), use.channels)
    on = "R {} K {} C {}".format(*shape) + f", {dispatch.PRECISIONS[use.dtype]} rows"
    operation = "bank_operand"
    try:
        for operation, checks in _checks(use, shape, kernels, device, seed):
            for check in checks():
                if not check.passed:
                    return f"{operation}: {check.name} {check.found} ({on})"
    # A kernel may fail in any way, and all ranks must hear of it.
    except Exception as error:
        return f"{operation}: {type(error).__name__}: {' '.join(str(error).split())[:200]} ({on})"
    finally:
        if device.type == "cuda":
            # Training needs the memory for tensors of other sizes.
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
    return None


def _checks(
    use: BankUse, shape: tuple[int, int, int], kernels: Any, device: torch.device, seed: int
) -> list[tuple[str, Callable[[], Iterator[Check]]]]:
    """The operations that the method calls, each with its checks."""
    problem = make_problem(
        shape,
        use.dtype,
        device,
        use.temperatures[0] if use.temperatures else (0.1,),
        generator=torch.Generator(device).manual_seed(seed),
        copies=True,
        positives=use.positives,
        norm=use.norm,
        weight_decay=use.weight_decay,
        exact="tiled",
    )
    # A bank hands its copy of the unit rows to every call.
    operand = kernels.unit_operand(problem.bank, problem.operand, kernels.target_for(device))
    checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("bank_attend", partial(check_attend, problem._replace(temperatures=temperatures), operand))
        for temperatures in use.temperatures
    ]
    if use.selects or use.step_temperature is not None:
        of_keys = problem._replace(queries=problem.queries.float())
        checks.append(("bank_select", partial(check_select, of_keys, operand)))
    if use.step_temperature is not None:
        of_step = problem._replace(temperatures=(use.step_temperature,))
        checks.append(("bank_step", partial(check_step, of_step, operand)))
    return checks


def _of_all_ranks(value: Any, timeout: float) -> list[Any]:
    """The values of all ranks in rank order, over gloo: a GPU computes nothing any more once a kernel has crashed."""
    if not is_distributed():
        return [value]
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(1, timeout)))
    values = all_gather_objects(value, group)
    dist.destroy_process_group(group)
    return values

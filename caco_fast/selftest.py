"""Checks the compiled kernels on the GPU of this machine against the reference in f64.

    python -m caco_fast.selftest [--device cuda:0] [--small]

Prints one line per operation and shape: the largest error as a share of what the rounding of the operands allows.
Returns 0 if all hold, 1 if one does not, 2 if there is nothing to test: no compiled kernels, no GPU, or none for it.
Takes seconds, and is the first thing to run on a new machine.

Legend: R query or key rows, K bank rows, C channels.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from caco_fast.ops import bank_attend, bank_select, bank_step_, dispatch

TEMPERATURES = (0.1, 0.05)
LR, MOMENTUM = 0.5, 0.9
# Half the distance between neighbouring values near 1.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALL = ((1, 1, 64), (70, 333, 80), (129, 257, 128), (33, 300, 256), (40, 130, 512))
LARGE = ((512, 65536, 256), (2048, 8191, 128))


class Check(NamedTuple):
    name: str
    share: float  # of the allowed error; above 1 it fails

    @property
    def passed(self) -> bool:
        return self.share <= 1  # False for NaN


class Problem(NamedTuple):
    """Rows whose operands are exact, so that the reference in f64 sees the products that the kernels see."""

    queries: Tensor  # [R, C] as given
    bank: Tensor  # [K, C]
    unit: Tensor  # [K, C] f64
    rounding: float


def make_problem(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    rows, bank_rows, channels = shape
    generator = torch.Generator().manual_seed(0)
    # Unit rows of 4^n elements +-2^-n, in lengths that are powers of 2: exact in every dtype, and so are their norms.
    halvings = next(n for n in (4, 3) if 4**n <= channels)
    places = torch.rand(bank_rows, channels, generator=generator).argsort(dim=1)[:, : 4**halvings]
    signs = 2.0 * torch.randint(0, 2, places.shape, generator=generator) - 1
    unit = torch.zeros(bank_rows, channels).scatter_(1, places, signs / 2**halvings)
    lengths = 2.0 ** torch.randint(-3, 4, (bank_rows, 1), generator=generator)
    queries = torch.nn.functional.normalize(torch.randn(rows, channels, generator=generator), dim=1)
    near = min(rows, bank_rows)
    queries[:near] += unit[:near]  # some rows much more similar than all others, as in training
    queries = torch.nn.functional.normalize(queries, dim=1).to(device, dtype)
    kernels = dispatch.cuda_backend()
    assert kernels is not None
    operand = kernels.operand_dtype(queries, kernels.target_for(device))
    return Problem(
        queries.to(operand).to(dtype), (unit * lengths).to(device), unit.to(device).double(), ROUNDING[operand]
    )


def check_attend(p: Problem) -> Iterator[Check]:
    found, again = (bank_attend(p.queries, p.bank, TEMPERATURES, backend="cuda") for _ in range(2))
    exact = bank_attend(p.queries.double(), p.bank.double(), TEMPERATURES, backend="reference")
    yield Check("lse", max(largest(a - b) for a, b in zip(found[0], exact[0], strict=True)) / 2e-4)
    probability = torch.softmax(p.queries.double() @ p.unit.T / TEMPERATURES[0], dim=1)
    allowed = 1.1 * p.rounding * (probability @ p.unit.abs()) + 1e-5
    yield Check("mean row", largest((found[1] - exact[1]) / allowed))
    yield same("attend twice the same bits", (*found[0], found[1]), (*again[0], again[1]))


def check_select(p: Problem) -> Iterator[Check]:
    index, similarity = bank_select(p.queries, p.bank, backend="cuda")
    _, best = bank_select(p.queries.double(), p.bank.double(), backend="reference")
    chosen = (p.queries.double() * p.unit[index]).sum(dim=1)
    yield Check("select", float((best - chosen).amax()) / 1e-6)
    yield Check("select's similarity", largest(similarity - chosen) / 1e-6)


def step(p: Problem, positives: Tensor, lse: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The new bank and velocity."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    queries = p.queries.double() if backend == "reference" else p.queries
    bank, velocity = p.bank.to(dtype, copy=True), torch.full_like(p.bank, 0.01, dtype=dtype)
    rows = len(queries)
    settings = dict(temperature=TEMPERATURES[0], lr=LR, momentum=MOMENTUM, positives=positives, backend=backend)
    bank_step_(bank, velocity, queries, lse, row_weight=torch.full_like(lse, 1 / rows), **settings)
    return bank, velocity


def check_step(p: Problem) -> Iterator[Check]:
    positives = bank_select(p.queries, p.bank, backend="cuda")[0].unsqueeze(1)
    lse, _ = bank_attend(p.queries.double(), p.bank.double(), TEMPERATURES[0], backend="reference")
    lse = lse.float()
    (bank, velocity), again = (step(p, positives, lse, "cuda") for _ in range(2))
    exact_bank, exact_velocity = step(p, positives, lse, "reference")
    # What rounding a_i p_ij and q_i can do to G_j = sum_i a_i p_ij q_i, and through it to the tangent.
    queries, unit = p.queries.double(), p.unit.abs()
    pull = torch.exp(queries @ p.unit.T / TEMPERATURES[0] - lse.double().unsqueeze(1)) / len(queries)  # [R, K]
    allowed = 2 * p.rounding * (pull.T @ queries.abs())  # [K, C]
    allowed = allowed + (allowed * unit).sum(dim=1, keepdim=True) * unit + 1e-6 / len(queries)
    allowed = allowed / (TEMPERATURES[0] * p.bank.double().norm(dim=1, keepdim=True)) + 1e-6
    yield Check("velocity", largest((velocity - exact_velocity) / allowed))
    yield Check("bank", largest((bank - exact_bank) / (LR * allowed + 1e-6 * exact_bank.abs().amax())))
    yield same("step twice the same bits", (bank, velocity), again)


def largest(errors: Tensor) -> float:
    return float(errors.abs().amax())


def same(name: str, found: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> Check:
    equal = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return Check(name, 0.0 if equal else float("inf"))


def run(device: torch.device, shapes: tuple[tuple[int, int, int], ...] = LARGE + SMALL) -> bool:
    """Run all checks and print a line for each. Returns whether all passed."""
    passed = True
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            problem = make_problem(shape, dtype, device)
            name = "R {} K {} C {} ".format(*shape) + str(dtype).removeprefix("torch.")
            for check in (*check_attend(problem), *check_select(problem), *check_step(problem)):
                passed &= report(name, check)
    return passed


def report(name: str, check: Check) -> bool:
    verdict = "ok  " if check.passed else "FAIL"
    print(f"{verdict}  {name:<32} {check.name:<32} {100 * check.share:6.1f} % of bound")
    return check.passed


def device_named(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"found {name!r}, expected a device such as cuda:1") from None


def nothing_to_test(device: torch.device) -> str | None:
    """Why no kernel can be tested on this device, or None."""
    kernels = dispatch.cuda_backend()
    if kernels is None:
        return "the kernels are not compiled; run `python setup.py build_ext` on a machine with nvcc"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device}, torch finds {torch.cuda.device_count()} GPUs"
    reason: str | None = kernels.why_not(device)
    return reason


def main(arguments: list[str] | None = None, prog: str = "python -m caco_fast.selftest") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", type=device_named, help="the GPU to test, such as cuda:1")
    parser.add_argument("--small", action="store_true", help="small shapes only, for compute-sanitizer")
    options = parser.parse_args(arguments)
    if reason := nothing_to_test(options.device):
        print(f"error: nothing to test: {reason}", file=sys.stderr)
        return 2
    if not run(options.device, SMALL if options.small else LARGE + SMALL):
        print("error: a kernel gives wrong results on this GPU; please report the lines above", file=sys.stderr)
        return 1
    print("all checks passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

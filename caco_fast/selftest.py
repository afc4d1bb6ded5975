"""Checks the compiled kernels on the GPU of this machine against the formulas in f64.

    python -m caco_fast.selftest [--device cuda:0] [--small]

Prints one line per operation and shape: the largest error as a share of what the rounding of the operands allows.
Returns 0 if all hold, 1 if one does not, 2 if there is nothing to test: no compiled kernels, no GPU, or none for it.
Takes seconds, and is the first thing to run on a new machine.

Legend: R query or key rows, K bank rows, C channels.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from caco_fast.ops import backends, bank_attend, bank_select, bank_step_, ema_update_, lars_step_

TEMPERATURES = (0.1, 0.05)
LR, MOMENTUM = 0.5, 0.9
# Half the distance between neighbouring values near 1.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALL = ((1, 1, 64), (70, 333, 80), (129, 257, 128), (33, 300, 256), (40, 130, 512))
# Of the tensors in a list; more than one chunk of the kernels, less than one, one element.
LISTS = ((64, 3, 7, 7), (300, 500), (256,), (16389,), (), (3, 3))
LARGE = ((512, 65536, 256), (2048, 8191, 128))


@dataclass(frozen=True)
class Check:
    name: str
    share: float  # of the allowed error; above 1 it fails

    @property
    def passed(self) -> bool:
        return self.share <= 1  # False for NaN


@dataclass(frozen=True)
class Problem:
    queries: Tensor  # [R, C] as given
    bank: Tensor  # [K, C]
    low_queries: Tensor  # [R, C] f64: as the matrix products see them
    low_unit: Tensor  # [K, C] f64
    unit: Tensor  # [K, C] f64, not rounded
    rounding: float


def make_problem(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    rows, bank_rows, channels = shape
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(rows, channels, generator=generator), dim=1)
    bank = torch.randn(bank_rows, channels, generator=generator)
    near = min(rows, bank_rows)
    bank[:near] += 20 * queries[:near]  # some rows much more similar than all others, as in training
    queries, bank = queries.to(device, dtype), bank.to(device)
    kernels = backends.cuda_backend()
    operand = kernels.operand_dtype(queries, kernels.target_for(device))
    unit = torch.nn.functional.normalize(bank.double(), dim=1)
    return Problem(queries, bank, queries.to(operand).double(), unit.to(operand).double(), unit, ROUNDING[operand])


def check_attend(p: Problem) -> Iterator[Check]:
    (lse, other_lse), mean_row = bank_attend(p.queries, p.bank, TEMPERATURES, backend="cuda")
    again = bank_attend(p.queries, p.bank, TEMPERATURES, backend="cuda")
    scores = p.low_queries @ p.low_unit.T
    error = max(
        (found - torch.logsumexp(scores / t, dim=1)).abs().amax().item()
        for found, t in zip((lse, other_lse), TEMPERATURES, strict=True)
    )
    yield Check("lse", error / 2e-4)
    probability = torch.softmax(scores / TEMPERATURES[0], dim=1)
    allowed = 1.1 * p.rounding * (probability @ p.low_unit.abs()) + 1e-5
    yield Check("mean row", ((mean_row - probability @ p.low_unit).abs() / allowed).amax().item())
    same = torch.equal(again[0][0], lse) and torch.equal(again[0][1], other_lse) and torch.equal(again[1], mean_row)
    yield Check("attend twice the same bits", 0.0 if same else float("inf"))


def check_select(p: Problem) -> Iterator[Check]:
    index, similarity = bank_select(p.queries, p.bank, backend="cuda")
    exact = p.queries.double() @ p.unit.T
    chosen = exact.gather(1, index.unsqueeze(1)).squeeze(1)
    yield Check("select", (exact.amax(dim=1) - chosen).amax().item() / 1e-6)
    yield Check("select's similarity", (similarity - chosen).abs().amax().item() / 1e-6)


def check_step(p: Problem) -> Iterator[Check]:
    rows = p.queries.shape[0]
    index = bank_select(p.queries, p.bank, backend="cuda")[0].unsqueeze(1)
    row_weight = torch.full((rows,), 1 / rows, device=p.bank.device)
    temperature = TEMPERATURES[0]
    scores = p.low_queries @ p.low_unit.T / temperature
    lse = torch.logsumexp(scores, dim=1)
    results = []
    for _ in range(2):
        bank, velocity = p.bank.clone(), torch.full_like(p.bank, 0.01)
        bank_step_(
            bank,
            velocity,
            p.queries,
            lse.float(),
            temperature=temperature,
            lr=LR,
            momentum=MOMENTUM,
            row_weight=row_weight,
            positives=index,
            backend="cuda",
        )
        results.append((bank, velocity))
    (bank, velocity), again = results

    pull = torch.exp(scores - lse.unsqueeze(1)) / rows  # [R, K]
    pulled = pull.T @ p.low_queries  # [K, C]
    allowed = 2 * p.rounding * (pull.T @ p.low_queries.abs())
    exact = p.queries.double()
    chosen_p = torch.exp((exact * p.unit[index[:, 0]]).sum(1) / temperature - lse)
    pulled.index_add_(0, index[:, 0], (1 - 2 * chosen_p).unsqueeze(1) / rows * exact)
    scale = 1 / (temperature * p.bank.double().norm(dim=1, keepdim=True))
    tangent = pulled - (pulled * p.unit).sum(1, keepdim=True) * p.unit
    expected = MOMENTUM * 0.01 - scale * tangent
    allowed = scale * (allowed + (allowed * p.unit.abs()).sum(1, keepdim=True) * p.unit.abs() + 1e-6 / rows) + 1e-6
    yield Check("velocity", ((velocity - expected).abs() / allowed).amax().item())
    moved = p.bank.double() - LR * expected
    yield Check("bank", ((bank - moved).abs() / (LR * allowed + 1e-6 * moved.abs().amax())).amax().item())
    same = torch.equal(again[0], bank) and torch.equal(again[1], velocity)
    yield Check("step twice the same bits", 0.0 if same else float("inf"))


def draw_list(generator: torch.Generator, device: torch.device) -> list[Tensor]:
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in LISTS]
    return [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]


def error_share(found: list[Tensor], exact: list[Tensor]) -> float:
    """Of 1e-6 of the largest element: a few roundings of f32."""
    return max(((a - b).abs().amax() / b.abs().amax()).item() for a, b in zip(found, exact, strict=True)) / 1e-6


def check_lists(device: torch.device) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    params, grads, velocities, keys = (draw_list(generator, device) for _ in range(4))
    flag, scale = torch.ones((), device=device), torch.full((), 1024.0, device=device)
    exact = [t.double() for t in keys]
    ema_update_(exact, [t.double() for t in params], 0.3, backend="reference")
    ema_update_(keys, params, 0.3, backend="cuda")
    yield Check("ema", error_share(keys, exact))

    settings = dict(lr=LR, momentum=MOMENTUM, weight_decay=0.01, trust=0.02)
    exact_params, exact_velocities = ([t.double() for t in tensors] for tensors in (params, velocities))
    exact_grads = [t.double() for t in grads]
    lars_step_(exact_params, exact_grads, exact_velocities, **settings, grad_scale=scale, backend="reference")
    results = []
    for _ in range(2):
        w, v = ([t.clone() for t in tensors] for tensors in (params, velocities))
        lars_step_(w, grads, v, **settings, grad_scale=scale, backend="cuda")
        results.append(w + v)
    yield Check("lars", error_share(results[0], exact_params + exact_velocities))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    yield Check("lars twice the same bits", 0.0 if same else float("inf"))

    before = [t.clone() for t in keys + params + velocities]
    grads[0].fill_(torch.inf)
    lars_step_(params, grads, velocities, **settings, skip=flag, backend="cuda")
    ema_update_(keys, params, 0.3, skip=flag, backend="cuda")
    same = all(torch.equal(a, b) for a, b in zip(before, keys + params + velocities, strict=True))
    yield Check("nothing where a step is skipped", 0.0 if same else float("inf"))


def run(device: torch.device, shapes: tuple[tuple[int, int, int], ...] = SMALL + LARGE) -> bool:
    """Runs all checks, prints a line for each, and says whether all passed."""
    passed = True
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            problem = make_problem(shape, dtype, device)
            name = "R {} K {} C {} ".format(*shape) + str(dtype).removeprefix("torch.")
            for check in (*check_attend(problem), *check_select(problem), *check_step(problem)):
                passed &= report(name, check)
    for check in check_lists(device):
        passed &= report(f"{len(LISTS)} tensors", check)
    return passed


def report(name: str, check: Check) -> bool:
    verdict = "ok  " if check.passed else "FAIL"
    print(f"{verdict}  {name:<32} {check.name:<32} {100 * check.share:6.1f} % of bound")
    return check.passed


def device_named(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"found {name!r}, wanted a device such as cuda:1") from None


def main(arguments: list[str] | None = None, prog: str = "python -m caco_fast.selftest") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", type=device_named, help="the GPU to test, such as cuda:1")
    parser.add_argument("--small", action="store_true", help="small shapes only, for compute-sanitizer")
    options = parser.parse_args(arguments)
    device: torch.device = options.device
    kernels = backends.cuda_backend()
    if kernels is None:
        reason = "the kernels are not compiled; run `python setup.py build_ext` on a machine with nvcc"
    elif device.type == "cuda" and not torch.cuda.is_available():
        reason = "torch finds no CUDA GPU"
    elif device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        reason = f"there is no {device}, torch finds {torch.cuda.device_count()} GPUs"
    else:
        reason = kernels.why_not(device)
    if reason:
        print(f"error: nothing to test: {reason}", file=sys.stderr)
        return 2
    passed = run(device, SMALL if options.small else SMALL + LARGE)
    if not passed:
        print("error: a kernel gives wrong results on this GPU; please report the lines above", file=sys.stderr)
        return 1
    print("all checks passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Checks the compiled kernels on the GPU of this machine against the reference in f64.

    python -m caco_fast.selftest [--device cuda:0] [--small]

Prints one line per operation and shape: the largest error as a share of what the rounding of the operands allows.
Returns 0 if all hold, 1 if one does not, 2 if there is nothing to test: no compiled kernels, no GPU, or none for it.
Takes seconds, and is the first thing to run on a new machine.

Legend: R query or key rows, K bank rows, C channels.
"""

import argparse
import sys

import torch

from caco_fast.ops import dispatch
from caco_fast.ops.checks import Check, check_attend, check_select, check_step, make_problem

TEMPERATURES = (0.1, 0.05)
SMALL = ((1, 1, 64), (70, 333, 80), (129, 257, 128), (33, 300, 256), (40, 130, 512))
LARGE = ((512, 65536, 256), (2048, 8191, 128))


def run(device: torch.device, shapes: tuple[tuple[int, int, int], ...] = LARGE + SMALL) -> bool:
    """Run all checks and print a line for each. Returns whether all passed."""
    passed = True
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            problem = make_problem(shape, dtype, device, TEMPERATURES)
            of_step = problem._replace(temperatures=TEMPERATURES[:1], weight_decay=0.01)
            name = "R {} K {} C {} ".format(*shape) + str(dtype).removeprefix("torch.")
            for check in (*check_attend(problem), *check_select(problem), *check_step(of_step)):
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

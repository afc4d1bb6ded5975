"""Which implementation answers a call.

`reference` is dense and reads like the formula, `tiled` is plain torch in little memory, `cuda` the compiled kernels:
the module `caco_fast.ops.cuda`, imported on first use and allowed to be absent. It offers

    available(device) -> bool
    why_not(device) -> str | None                                          one line for the user if it is not
    attend(queries, bank, temperatures) -> (lse, other_lse, mean_row)      as `attend_tiled`
    select(keys, bank) -> (index, similarity)                              as `select_tiled`
    step_(bank, velocity, queries, lse, temperature, lr, momentum, row_weight, positives, positive_weight, norm, skip)
        -> None
"""

import functools
import importlib
from types import ModuleType

import torch

BACKENDS = ("auto", "reference", "tiled", "cuda")


@functools.cache
def cuda_backend() -> ModuleType | None:
    """The module with the compiled kernels, or None where it was not built."""
    try:
        return importlib.import_module("caco_fast.ops.cuda")
    except ModuleNotFoundError as error:
        # Any other missing module is a fault in the backend itself and must be seen.
        if error.name in ("caco_fast.ops.cuda", "caco_fast._C"):
            return None
        raise


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: the one named, or for `auto` the fastest that can. A named backend is never replaced."""
    if backend == "auto":
        if dtype == torch.float64:
            return "reference"
        kernels = cuda_backend()
        return "cuda" if kernels is not None and kernels.available(device) else "tiled"
    if backend == "cuda":
        kernels = cuda_backend()
        if kernels is None:
            raise RuntimeError(
                f"{op}: backend='cuda' wants the compiled kernels, found none: "
                "run `python setup.py build_ext`, or use backend='auto'"
            )
        if not kernels.available(device):
            raise RuntimeError(f"{op}: backend='cuda': {kernels.why_not(device)}, or use backend='auto'")
    return backend

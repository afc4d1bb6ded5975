"""One launch of each kernel of a training step, for a profiler: attend at one and at two temperatures, select, step.

    ncu --profile-from-start off -k 'regex:attend_kernel|select_kernel|step_kernel' python tools/check/launches.py R,K,C

Everything runs once before, so that what is profiled is in a steady state.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "bench")]

import torch  # noqa: E402
from ops_work import BankInputs, bank_work  # noqa: E402

DTYPE = "bfloat16"


def main() -> None:
    rows, bank_rows, channels = map(int, sys.argv[1].split(","))
    step = bank_work("bank", f"cuda {DTYPE} 1 t", BankInputs(rows, bank_rows, channels, "cuda"))
    attend = bank_work("bank_attend", f"cuda {DTYPE} 2 t", BankInputs(rows, bank_rows, channels, "cuda"))
    for work in (step, attend):
        work.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for work in (step, attend):
        work.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()

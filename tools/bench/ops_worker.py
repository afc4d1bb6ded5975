"""The process that measures for `ops.py`: it reads a task as JSON from its argument and prints a row for each variant.

It loads the package that PYTHONPATH names, and of it what `caco_fast.ops` and `caco_fast.bank` export, so that
`ops.py --base` can run it on an older version. A row holds samples in milliseconds, or the error that ended the
variant. A variant whose first result differs from that of the dense form or of the loop is not timed.
"""

import contextlib
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ops_work
import torch
from ops_work import BANK_OPERATIONS, DENSE, LIST_OPERATIONS, LOOP, BankInputs, ListInputs, Outcome, Work
from timing import RESET_PEAK, Timer, ceilings, peak_bytes, start_peak
from torch.utils._python_dispatch import TorchDispatchMode

TF32, COMPILED, TILED_BF16 = "dense eager TF32", "dense compiled TF32", "tiled bfloat16"
BROKEN = 3  # the exit status of a process that can do nothing more, after a row with an error
WARMUP, LEAST_ROUNDS, SECONDS_PER_VARIANT = 2, 7, 1.5
# The largest difference, relative to the norm of the expected result. In f32 only the order of sums differs. TF32 and
# fp16 round both operands of a product by half the distance of two numbers near 1 at most; so does bf16, whose weights
# are rounded too.
F32_DIFFERENCE = 1e-5
ROUNDED_DIFFERENCE = {"TF32": 2 * 2.0**-11, "float16": 2 * 2.0**-11, "bfloat16": 0.02}
# Rounded keys choose another bank row only where two are nearly as similar, which in 2^20 random rows happens to 1 %.
MOST_OTHER_POSITIVES = 0.05

Row = dict[str, Any]
Size = tuple[int, int, int]  # R, K, C

CPU_SIZES: list[Size] = [(512, 65536, 256)]
# On a GPU the peers run at these sizes, at the first two with torch.compile. The other sizes show how kernels scale.
COMPILED_SIZES: list[Size] = [(2048, 65536, 256), (512, 65536, 256)]
COMPARED_SIZES: list[Size] = [*COMPILED_SIZES, *((rows, 65536, 256) for rows in (256, 1024, 8192)), (2048, 2**20, 256)]
KERNEL_SIZES: list[Size] = [
    (rows, bank_rows, channels)
    for channels in (256, 128)
    for bank_rows in (65536, 98304, 2**20)
    for rows in (2048, 512, 256, 1024, 8192)
    if (rows, bank_rows, channels) not in COMPARED_SIZES
]


@dataclass(frozen=True)
class Task:
    operations: tuple[str, ...]
    sizes: tuple[Size, ...] | None  # None: those of the device
    device: str
    dtypes: tuple[str, ...]
    rounds: int
    seconds: float
    threads: int
    only: tuple[str, ...] = ()  # variants whose names begin so; none: all
    first: int = 0  # the group of `groups` to begin with
    memory_of: str | None = None  # only this variant's memory is measured

    def __post_init__(self) -> None:
        # As JSON brings it, there are lists.
        for name in ("operations", "dtypes", "only"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple((r, k, c) for r, k, c in self.sizes))

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def groups(self) -> list[list[Row]]:
        """The rows to measure. Those of a group are measured in turns, so that a disturbance meets all.

        On a GPU each is alone, so that its memory counts.
        """
        found = []
        for operation, size in self.cases():
            names = [name for name in self.variants(operation, size) if not self.only or name.startswith(self.only)]
            rows = [{**case(operation, size), "variant": name} for name in names]
            found += [[row] for row in rows] if self.on_gpu else [rows]
        return found

    def cases(self) -> list[tuple[str, Size | None]]:
        sizes = self.sizes or ([*COMPARED_SIZES, *KERNEL_SIZES] if self.on_gpu else CPU_SIZES)
        lists = [(operation, None) for operation in self.operations if operation in LIST_OPERATIONS]
        return lists + [(op, size) for size in sizes for op in self.operations if op in BANK_OPERATIONS]

    def variants(self, operation: str, size: Size | None) -> list[str]:
        """On a GPU the kernels come first: a run may be cut."""
        if operation in LIST_OPERATIONS:
            return [LOOP, "foreach", "foreach, flag", *["foreach compiled"] * self.on_gpu]
        if not self.on_gpu:
            return [DENSE, *(f"tiled {dtype}" for dtype in self.dtypes)]
        attends = operation in ("bank", "bank_attend")
        kernels = [f"cuda {dtype}{t}" for dtype in self.dtypes for t in ((" 1 t", " 2 t") if attends else ("",))]
        if self.sizes is None and size not in COMPARED_SIZES:
            return kernels
        return [*kernels, TILED_BF16, DENSE, TF32, *[COMPILED] * (size in COMPILED_SIZES)]


def case(operation: str, size: Size | None) -> Row:
    if size is None:
        shapes = ops_work.encoder_shapes()
        return {"operation": operation, "size": {"tensors": len(shapes), "elements": sum(s.numel() for s in shapes)}}
    return {"operation": operation, "size": dict(zip("RKC", size))}


def rows(task: Task) -> Iterator[Row]:
    """The rows of all groups, each as soon as it is measured. On a GPU the first row has the ceilings."""
    torch.set_num_threads(task.threads)
    if task.on_gpu:
        torch.cuda.set_device(torch.device(task.device).index or 0)  # set_device("cuda") is an error
    timer, end = Timer(task.device), time.monotonic() + task.seconds
    if task.on_gpu and not task.first:
        yield {"ceilings": ceilings(timer, task.device)}
    expected: dict[Any, Outcome] = {}
    for group in task.groups()[task.first :]:
        if time.monotonic() > end:
            yield from ({**row, "error": f"not begun within {task.seconds:g} s"} for row in group)
            continue
        works: dict[str, Work] = {}
        for row in group:
            with guarded(row):
                where = (row["operation"], *row["size"].values())
                if all(key[0] != where for key in expected):
                    expected = {}  # those of another case only hold memory
                key = where, ops_work.temperatures(row["variant"])
                if key not in expected:
                    expected[key] = right_outcome(row, task.device)
                works[row["variant"]] = work = make_work(row, row["variant"], task.device)
                first_run(row, work, expected[key], task)
        measure(group, works, task, timer)
        yield from group
        works, work = {}, None
        gc.collect()
        if task.on_gpu:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                # After an error within a kernel a process can do nothing more on the GPU. ops.py starts another.
                sys.exit(BROKEN)
            torch.cuda.empty_cache()


def make_work(row: Row, variant: str, device: str) -> Work:
    torch._dynamo.reset()
    operation = row["operation"]
    if operation in LIST_OPERATIONS:
        return ops_work.list_work(operation, variant, ListInputs(ops_work.encoder_shapes(), device))
    return ops_work.bank_work(operation, variant, BankInputs(*row["size"].values(), device))


def right_outcome(row: Row, device: str) -> Outcome:
    """What the loop in f64 makes, or the dense form in f32; the tiled form in f32 where the dense one is too large."""
    if row["operation"] in LIST_OPERATIONS:
        inputs = ListInputs(ops_work.encoder_shapes(), device).double()
        work = ops_work.list_work(row["operation"], LOOP, inputs)
        work.run()
        return work.outcome()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    other = " 2 t" if row["variant"].endswith("2 t") else ""
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            work = make_work(row, DENSE + other, device)
            work.run()
            return work.outcome()
        work = make_work(row, "tiled float32" + other, device)
        work.run()
        return work.outcome()
    finally:
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def guarded(row: Row) -> Iterator[None]:
    """The precision of products that a variant's name states; an exception becomes the row's result."""
    torch.set_float32_matmul_precision("high" if "TF32" in row["variant"] else "highest")
    try:
        yield
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    finally:
        torch.set_float32_matmul_precision("highest")


def most_difference(variant: str) -> float:
    """The largest difference that the dtype of a variant's products explains."""
    named = [largest for dtype, largest in ROUNDED_DIFFERENCE.items() if dtype in variant.split()]
    if variant.startswith("cuda float32"):
        named = [ROUNDED_DIFFERENCE["bfloat16"]]  # The kernels' products run in bf16 or fp16.
    return max(named, default=F32_DIFFERENCE)


def first_run(row: Row, work: Work, expected: Outcome, task: Task) -> None:
    """Note memory, aten calls, and the difference to what is expected."""
    device = torch.device(task.device)
    calls = AtenCalls() if row["operation"] in LIST_OPERATIONS and "compiled" not in row["variant"] else None
    before = start_peak(device)
    with calls or contextlib.nullcontext():
        work.run()
    if task.on_gpu:
        row["extra_bytes"] = peak_bytes(device) - before
    if calls:
        row["aten_calls"] = calls.counted.total()
    if row["variant"] != DENSE:
        compare(row, work, expected)


def compare(row: Row, work: Work, expected: Outcome) -> None:
    """Note how far the result is from the expected one, and an error if that is too far.

    A bank row that is a key's positive on one side but not on the other is left out. These keys are counted.
    """
    (found, positives), (right, right_positives) = work.outcome(), expected
    if positives is not None and right_positives is not None:
        other = positives != right_positives  # [R]
        row["other_positives"] = int(other.sum())
        if row["other_positives"] > MOST_OTHER_POSITIVES * len(other):
            row["error"] = f"wrong: {row['other_positives']} of {len(other)} keys have another positive than expected"
        left_out = torch.cat([positives[other], right_positives[other]])
        found, right = ([tensor.index_fill(0, left_out, 0) for tensor in tensors] for tensors in (found, right))
    pairs = zip(found, right, strict=True)
    row["difference"] = max(((own - other).norm() / other.norm()).item() for own, other in pairs)
    if not row["difference"] <= most_difference(row["variant"]):
        row["error"] = f"wrong: its result differs by {row['difference']:.3g} of the norm of the expected one"


class AtenCalls(TorchDispatchMode):
    """Count calls of torch's operators. On a GPU each launches a kernel, or several for a long list."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))


def measure(found: list[Row], works: dict[str, Work], task: Task, timer: Timer) -> None:
    """Add samples to every row without an error."""
    end = None
    for turn in range(WARMUP + task.rounds):
        timed = [row for row in found if "error" not in row]
        if turn == WARMUP:
            end = time.monotonic() + SECONDS_PER_VARIANT * len(timed)
        if end and time.monotonic() > end and turn >= WARMUP + min(LEAST_ROUNDS, task.rounds):
            return
        for row in timed:
            with guarded(row):
                times = one_round(works[row["variant"]], timer)
                if turn >= WARMUP:
                    for name, value in times.items():
                        row.setdefault("samples", {}).setdefault(name, []).append(value)


def one_round(work: Work, timer: Timer) -> dict[str, float]:
    """Milliseconds of the whole, of each of several parts, of launching, and of all the processor's threads."""
    times = {name: timer([part]) for name, part in work.parts.items()} if len(work.parts) > 1 else {}
    start = time.process_time()
    times["whole"] = timer(list(work.parts.values()))
    if timer.on_gpu:
        return {**times, "host": timer.host_ms}
    return {**times, "processor": 1000 * (time.process_time() - start)}


def extra_memory(task: Task) -> Row:
    """Peak bytes of one run of `memory_of`, above what this process held before it."""
    torch.set_num_threads(task.threads)
    row, variant, device = task.groups()[0][0], task.memory_of or "", torch.device(task.device)
    if row["operation"] in BANK_OPERATIONS:
        # Libraries load and set up here.
        make_work({**row, "size": {"R": 8, "K": 64, "C": row["size"]["C"]}}, variant, task.device).run()
    work = make_work(row, variant, task.device)
    before = start_peak(device)
    work.run()
    return {"extra_bytes": peak_bytes(device) - before if RESET_PEAK.exists() else None}


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    for row in [extra_memory(task)] if task.memory_of else rows(task):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

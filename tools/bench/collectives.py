#!/usr/bin/env python3
"""Bytes that several ranks send for the bank in one step of CaCo, and what each rank holds and computes.

    python tools/bench/collectives.py [--ranks 8] [--batch 1024] [--bank-rows 65536 1048576]    # gloo, on the CPU
    python tools/bench/collectives.py --table benchmarks/results/bench_collectives.json         # the result as Markdown

Every rank runs `CaCoLoss`, its backward pass and the bank's step on random unit queries and keys of its share of the
batch. This is all that the bank takes part in. There is no encoder. Bytes are counted at each collective
(`caco_fast.distributed.Traffic`), so they do not depend on the backend. Processor seconds are those of the slowest rank
in the first step.

Legend: B images of the global batch, R = 2 B query rows, K bank rows, C channels, N ranks.
"""

import json
import tempfile
import time
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.nn.functional import normalize

from caco_fast.bank import LearnableBank, ShardedBank
from caco_fast.benchmarking import RESULTS, Bench, run_script, write_result
from caco_fast.distributed import barrier, count_traffic, rank, world_size
from caco_fast.errors import UserError
from caco_fast.methods import CaCoLoss

RESULT = RESULTS / "bench_collectives.json"
BANKS = {"sharded": ShardedBank, "replicated": LearnableBank}
# Every rank holds a replicated bank, so more rows would take all the memory of a small machine.
MOST_REPLICATED = 65536


def measure_step(parallel: str, batch: int, bank_rows: int, channels: int, operands: torch.dtype) -> dict[str, Any]:
    """One step on this rank: bytes and calls by collective, bytes of bank and velocity held, processor seconds."""
    bank = BANKS[parallel](bank_rows, channels, generator=torch.Generator().manual_seed(0))
    criterion = CaCoLoss(bank, operands=operands)
    generator = torch.Generator().manual_seed(1 + rank())
    q_a, q_b, k_a, k_b = (
        normalize(torch.randn(batch // world_size(), channels, generator=generator), dim=1) for _ in range(4)
    )
    q_a.requires_grad_()
    barrier()
    start = time.process_time()
    with count_traffic() as traffic:
        criterion(q_a, q_b, k_a, k_b).backward()
        bank.step(lr=0.1)
    return {
        "payload_bytes": sum(traffic.payload.values()),
        "sent_bytes": sum(traffic.sent.values()),
        "calls": sum(traffic.calls.values()),
        "by_collective": {
            name: {"calls": n, "payload_bytes": traffic.payload[name]} for name, n in traffic.calls.items()
        },
        "held_bytes": sum(rows.numel() * rows.element_size() for rows in (bank.bank, bank.velocity)),
        "processor_seconds": round(time.process_time() - start, 2),
    }


def run_rank(number: int, ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=ranks)
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, measure_step(*arguments))
    if number == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(ranks: int, *arguments: Any) -> dict[str, Any]:
    """Run `measure_step` on several processes and return the largest of each figure over the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        # Ranks are forked from a process that has done the imports, which cost more than the step.
        set_forkserver_preload(["caco_fast.methods"])
        start_processes(run_rank, (ranks, folder, arguments), nprocs=ranks, start_method="forkserver")
        found = json.loads(Path(folder, "found.json").read_text())
    return {
        name: value if isinstance(value, dict) else max(each[name] for each in found)
        for name, value in found[0].items()
    }


def table(record: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings = record["settings"]
    lines = [
        f"{settings['ranks']} ranks, batch {settings['batch']}, C {settings['channels']}; counted over gloo on the CPU",
        "",
        "| K | bank | queries sent as | collectives | payload MB | sent by a rank, MB | bank held by a rank, MB "
        "| bank's processor s of a rank |",
        "|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for result in record["results"]:
        megabytes = [f"{result[name] / 1e6:.2f}" for name in ("payload_bytes", "sent_bytes")]
        cells = [f"{result['bank_rows']:,}", result["parallel"], result["operands"], str(result["calls"]), *megabytes]
        cells += [f"{result['held_bytes'] / 1e6:,.0f}", f"{result['processor_seconds']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    gradient = " and ".join(f"{4 * rows * settings['channels'] / 1e6:,.0f}" for rows in settings["bank_rows"])
    return "\n".join([*lines, "", f"An all-reduce of the bank's gradient would have a payload of {gradient} MB."])


def main() -> None:
    bench = Bench(__doc__, table, RESULT.name)
    bench.parser.add_argument("--ranks", type=int, default=8, help="N, processes on this machine")
    bench.parser.add_argument("--batch", type=int, default=1024, help="B, images of the global batch")
    bench.parser.add_argument("--bank-rows", type=int, nargs="+", default=[65536, 2**20], help="K")
    bench.parser.add_argument("--channels", type=int, default=256, help="C")
    options = bench.parse(positive=("ranks", "batch", "channels"))
    if options.batch % options.ranks:
        raise UserError(f"--batch: found {options.batch}, expected a multiple of --ranks {options.ranks}")
    cases = [("sharded", rows, "float32") for rows in options.bank_rows]
    cases += [("sharded", options.bank_rows[0], "bfloat16")]
    cases += [("replicated", rows, "float32") for rows in options.bank_rows if rows <= MOST_REPLICATED]
    results = []
    for parallel, rows, operands in cases:
        found = measure(options.ranks, parallel, options.batch, rows, options.channels, getattr(torch, operands))
        results.append({"parallel": parallel, "bank_rows": rows, "operands": operands, **found})
        print(json.dumps(results[-1]), flush=True)
    settings = {name: getattr(options, name) for name in ("ranks", "batch", "bank_rows", "channels")}
    settings["payload"] = "bytes of the whole tensor that is gathered, reduced or scattered, each counted once"
    settings["sent"] = "per rank, by a ring: (N - 1) / N of the payload, twice that for an all-reduce"
    print()
    bench.show(write_result(options.output or RESULT, settings=settings, results=results))


if __name__ == "__main__":
    run_script(main)

"""Time of the EMA of the key encoder and of the LARS step on ResNet-50 with CaCo's projector, by each backend.

    python tools/bench/optim.py                        # on the CPU: foreach against a loop over tensors
    python tools/bench/optim.py --device cuda          # the kernels against torch's foreach and torch.compile of it
    python tools/bench/optim.py --table benchmarks/results/bench_optim_cuda.json

Each operation is timed by itself and with the overflow flag of fp16, which is not set. `cuda, moved` has its gradients
at other addresses in every call, as they are after a backward pass, so that the kernels' table is written each time. A
variant whose result differs from the reference in f64 is not timed. On a GPU times are device events around work that
was enqueued while the GPU slept, L2 cold; `host ms` is how long the call takes to return.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bank_gpu import Timer
from torch import Tensor

from caco_fast.benchmarking import ROOT, read_result, spread, synchronize, write_result
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, ProjectorConfig, build_encoder_pair
from caco_fast.ops import ema_update_, lars_step_
from caco_fast.ops.dispatch import cuda_backend

PARTS = ("ema", "ema, flag", "lars", "lars, flag")
# Bytes that each parameter takes at least: EMA reads 8 and writes 4; LARS reads 8 for the norms, then 12, and writes 8.
TRAFFIC = {"ema": 12, "ema, flag": 12, "lars": 28, "lars, flag": 28}
LARS = dict(lr=0.1, momentum=0.9, weight_decay=1.5e-6, trust=0.001)
EMA_WEIGHT = 0.01
PEER = "foreach"
# What takes long to start comes last.
ON_CPU, ON_GPU = ("reference", PEER), (PEER, "cuda", "cuda, moved", "foreach compiled")
# Of f32 against f64, relative to the largest element of a tensor.
MOST_DIFFERENCE = 1e-5


class Inputs:
    """Two encoders' parameters in channels_last, gradients and a copy, velocities, and a flag that is not set."""

    def __init__(self, device: str, narrow: bool = False) -> None:
        backbone = BackboneConfig("resnet18" if narrow else "resnet50")
        with torch.device("meta"):
            query = build_encoder_pair(backbone, ProjectorConfig(), 3).query
        shapes = [p.shape for p in query.parameters()]
        generator = torch.Generator(device).manual_seed(0)

        def draw() -> list[Tensor]:
            return [self._draw(shape, generator, device) for shape in shapes]

        self.params, self.keys, self.velocities = draw(), draw(), draw()
        self.grads = [draw()]
        self.grads.append([grad.clone() for grad in self.grads[0]])
        self.flag = torch.zeros((), device=device)
        self.elements = sum(p.numel() for p in self.params)

    @staticmethod
    def _draw(shape: torch.Size, generator: torch.Generator, device: str) -> Tensor:
        values = 0.1 * torch.randn(shape, generator=generator, device=device)
        return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values


Work = Callable[[], None]


def works_of(variant: str, inputs: Inputs) -> dict[str, Work]:
    """Each part as a call without arguments."""
    backend = variant.split()[0].rstrip(",")

    def ema(skip: Tensor | None) -> None:
        ema_update_(inputs.keys, inputs.params, EMA_WEIGHT, skip=skip, backend=backend)

    def lars(grads: list[Tensor], skip: Tensor | None) -> None:
        lars_step_(inputs.params, grads, inputs.velocities, **LARS, skip=skip, backend=backend)

    if variant.endswith("compiled"):
        ema, lars = (torch.compile(function, dynamic=False) for function in (ema, lars))
    grads = itertools.cycle(inputs.grads if variant.endswith("moved") else inputs.grads[:1])
    return {
        "ema": lambda: ema(None),
        "ema, flag": lambda: ema(inputs.flag),
        "lars": lambda: lars(next(grads), None),
        "lars, flag": lambda: lars(next(grads), inputs.flag),
    }


def differences(works: dict[str, Work], inputs: Inputs) -> dict[str, float]:
    """The largest difference of each part to the reference in f64."""
    found = {}
    changed = inputs.keys + inputs.params + inputs.velocities
    for part, work in works.items():
        before = [tensor.clone() for tensor in changed]
        keys, params, velocities = ([t.double() for t in ts] for ts in (inputs.keys, inputs.params, inputs.velocities))
        if part.startswith("ema"):
            ema_update_(keys, params, EMA_WEIGHT, backend="reference")
        else:
            lars_step_(params, [g.double() for g in inputs.grads[0]], velocities, **LARS, backend="reference")
        work()
        pairs = zip(changed, keys + params + velocities, strict=True)
        found[part] = max(((a - b).abs().amax() / b.abs().amax()).item() for a, b in pairs)
        for tensor, old in zip(changed, before):
            tensor.copy_(old)
    return found


def measure_variant(variant: str, inputs: Inputs, timer: Timer, rounds: int) -> dict[str, Any]:
    works = works_of(variant, inputs)
    wrong = {part: off for part, off in differences(works, inputs).items() if not off <= MOST_DIFFERENCE}
    if wrong:
        part, off = next(iter(wrong.items()))
        return {"error": f"wrong: {part} differs by {off:.2g} of its largest element"}
    ms: dict[str, list[float]] = {part: [] for part in PARTS}
    host: dict[str, list[float]] = {part: [] for part in PARTS}
    for at in range(rounds + 2):
        for part, work in works.items():
            took = timer([work])
            synchronize(timer.flushed.device)
            start = time.perf_counter()
            work()
            returned = 1000 * (time.perf_counter() - start)
            if at >= 2:  # the first two warm up
                ms[part].append(took)
                host[part].append(returned)
    result = {"ms": {part: spread(values, 4) for part, values in ms.items()}}
    result["host_ms"] = {part: spread(values, 4) for part, values in host.items()}
    result["gb_per_s"] = {
        part: round(TRAFFIC[part] * inputs.elements / result["ms"][part]["median"] / 1e6, 1) for part in PARTS
    }
    return result


def measure(device: str, rounds: int, output: Path, narrow: bool = False) -> dict[str, Any]:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch finds no CUDA GPU here, use --device cpu")
    inputs, timer, module = Inputs(device, narrow), Timer(device), cuda_backend()
    variants = ON_GPU if on_gpu else ON_CPU
    if on_gpu and (module is None or not module.available(torch.device(device))):
        variants = tuple(name for name in variants if not name.startswith("cuda"))
    settings = {
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "tensors": len(inputs.params),
        "elements": inputs.elements,
        "rounds": rounds,
        "bytes": "per element: EMA 12, LARS 28",
    }
    results = {}
    for variant in variants:
        results[variant] = measure_variant(variant, inputs, timer, rounds)
        write_result(output, settings=settings, results=results)  # so that an end by force keeps those before
    return json.loads(output.read_text())


def table(record: dict[str, Any]) -> str:
    """The result as a Markdown table; `faster` is the time of torch's foreach over this one."""
    settings, results, machine = record["settings"], record["results"], record["machine"]
    where = settings["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
    where += f", torch {record['versions']['torch']}"
    lines = [
        f"{settings['tensors']} tensors, {settings['elements']:,} elements; {where}",
        "",
        "| variant | operation | ms (p20-p80) | host ms | GB/s | faster than foreach |",
        "|---|---|--:|--:|--:|--:|",
    ]
    peer = results[PEER].get("ms")
    for variant, result in results.items():
        if "error" in result:
            lines.append(f"| {variant} | {result['error']} | | | | |")
            continue
        for part in PARTS:
            ms, host = result["ms"][part], result["host_ms"][part]["median"]
            faster = f"{peer[part]['median'] / ms['median']:.2f} x" if peer else ""
            took = f"{ms['median']:.3g} ({ms['p20']:.3g}-{ms['p80']:.3g})"
            lines.append(f"| {variant} | {part} | {took} | {host:.2g} | {result['gb_per_s'][part]:.0f} | {faster} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds after two to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--output", type=Path, help="JSON file, default benchmarks/results/bench_optim_DEVICE.json")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a result as Markdown and do nothing else")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: found {getattr(options, name)}, wanted 1 or more")
    if options.table:
        print(table(read_result(options.table)))
        return
    torch.set_num_threads(options.threads)
    kind = torch.device(options.device).type
    output = options.output or ROOT / "benchmarks" / "results" / f"bench_optim_{kind}.json"
    print(table(measure(options.device, options.rounds, output)))
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""The stages of tools/check/gpu.py: what runs on a GPU, in which order, within which time, and what it proves.

A machine may be had for minutes only. Therefore `quick` brings correctness and the first figures, and `rest` all that
is left. What must not be lost is early.
"""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "csrc")]

import sources  # noqa: E402

WORK = ROOT / "build" / "gpu_check"
TESTS_OF_KERNELS = ("tests/gpu", "tests/ops", "tests/emulation", "tests/bank")
# In a file of tests that a GPU runs: their mark, or the backends that include a GPU.
FOR_A_GPU = re.compile(r"pytest\.mark\.gpu|backends import .*\bKERNELS\b")
HEADLINE = "2048,65536,256"  # R, K, C
# The headline again, for its ratios to the others; K = 2^20; twice its R, which tells the loop from the fixed cost.
SIZES = (HEADLINE, "2048,1048576,256", "512,65536,256", "4096,65536,256", "256,65536,256", "1024,65536,256")
SIZES += ("8192,65536,256", "2048,65536,128", "2048,65536,512")
QUICK_SECONDS, REST_SECONDS, ALL_SECONDS = 240, 400, 590
CONFIGS = "caco_fast/configs"
TIMED = r"cuda bfloat16 1 t \| \d"  # the kernels gave right results, and have a time
Command = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """Commands run one after the other until one fails."""

    name: str
    claim: str  # what holds if it passes
    limit_s: int
    commands: tuple[Command, ...]
    paths: tuple[str, ...] = ()  # the kernel paths whose proof needs this stage; none: worth knowing only
    expected: str = ""  # expression that the output must contain, besides an exit status of 0
    shown: str = ""  # expression of the lines that are kept of a stage that passed, besides the last one
    beforehand: tuple[Command, ...] = ()  # run in the background from the start of the whole check
    needs: tuple[str, ...] = ("build",)  # it is left out if one of them failed
    packages: tuple[str, ...] = ()  # it is left out if one of them is missing
    environment: dict[str, str] = field(default_factory=dict)
    waits: bool = False  # if it runs out of time, a kernel may hang


@dataclass(frozen=True)
class Machine:
    architecture: str  # compute capability, such as "90"
    gpu: str = "gpu"  # its name in those of files
    output: Path = WORK
    nvcc: str = "nvcc"
    sanitizer: str = "compute-sanitizer"
    filter_option: str = "--kernel-name"  # of compute-sanitizer
    ncu: str = "ncu"
    python: str = sys.executable

    @property
    def paths(self) -> list[str]:
        """The kernel paths that run here, its own last. tests/gpu runs every one of them."""
        return paths_run(self.architecture, kernel_paths())

    @property
    def target(self) -> str:
        # Hopper's own instructions need the target 90a.
        return "90a" if self.architecture == "90" else self.architecture

    def written(self, name: str) -> str:
        return str(self.output / f"{name}_{self.gpu}.json")

    def ops(self, *words: str) -> Command:
        """tools/bench/ops.py, whose tests are other stages."""
        return (self.python, "tools/bench/ops.py", *words, "--device", "cuda", "--no-gate")


def kernel_paths() -> list[str]:
    """The names of the kernel paths. Each has its tiles in a file of csrc/tiles/."""
    return sorted(path.stem for path in (sources.ROOT / "tiles").glob("sm*.cuh"))


def paths_run(capability: str, present: list[str]) -> list[str]:
    """The paths of `present` that a GPU of this compute capability runs."""
    number = int(capability)
    runs = {"sm70": 70 <= number < 80, "sm80": number >= 80, "sm90": number == 90}
    return [path for path in present if runs.get(path)]


def stages(machine: Machine) -> list[Stage]:
    """All stages, those of `quick` first."""
    return [*quick(machine), *rest(machine)[1:]]


def quick(machine: Machine) -> list[Stage]:
    """What the first four minutes decide: whether the kernels are right, and how fast."""
    own = machine.paths[-1]
    once = ("--sizes", HEADLINE, "--dtype", "bfloat16", "float32", "float16")
    profile = machine.output / f"kernels_{machine.gpu}"
    return [
        build(machine),
        primitives(machine, own),
        Stage(
            "selftest",
            "each operation agrees with its formula",
            60,
            ((machine.python, "-m", "caco_fast.selftest"),),
            paths=(own,),
            shown=r"^FAIL",
            waits=True,
        ),
        Stage(
            "headline",
            f"time, memory and share of cuBLAS at R, K, C = {HEADLINE}, next to dense and tiled forms",
            60,
            (
                machine.ops("bank", *once, "--variants", "cuda", "tiled", "dense eager", "--seconds", "40")
                + ("--output", machine.written("bench_headline")),
            ),
            needs=("build", "selftest"),
            expected=TIMED,
            shown=r"^\|",
            waits=True,
        ),
        Stage(
            "profile",
            "the counters of attend at one and two temperatures, select and step are read",
            60,
            (
                (machine.ncu, "--clock-control", "none", "--set", "full", "--profile-from-start", "off", "-f")
                + ("-k", "regex:attend_kernel|select_kernel|step_kernel", "-o", str(profile))
                + (machine.python, "tools/check/launches.py", HEADLINE),
                ("sh", "-c", f"'{machine.ncu}' --import '{profile}.ncu-rep' --page raw > '{profile}.txt'"),
                (machine.ncu, "--import", f"{profile}.ncu-rep", "--page", "details"),
            ),
            needs=("build", "selftest"),
            shown=r"_kernel|Duration|Compute \(SM\) Throughput|DRAM Throughput|L2 Cache Throughput|SM Busy|Issue Slots",
        ),
        tests(machine, f"tests {own}", (own,), "not sm80 and not compile", 75, "of the operations on this GPU's path"),
        Stage(
            "sizes",
            "times of the kernels at other sizes, K = 2^20 among them",
            75,
            (
                machine.ops("bank", "--sizes", *SIZES, "--dtype", "bfloat16", "--variants", "cuda", "--seconds", "60")
                + ("--output", machine.written("bench_sizes")),
            ),
            needs=("build", "selftest"),
            expected=TIMED,
            shown=r"^\|",
            waits=True,
        ),
    ]


def rest(machine: Machine) -> list[Stage]:
    """What else there is to prove and to measure."""
    *others, own = machine.paths
    step = (machine.python, "tools/bench/step.py")
    packages = ("omegaconf",)
    found = [
        build(machine),
        sanitized(machine, "memcheck", "no access out of bounds", r"ERROR SUMMARY: 0 errors"),
    ]
    for path in others:
        found.append(primitives(machine, path))
        found.append(
            tests(machine, f"tests {path}", (path,), "sm80 and not compile", 70, f"of the operations on {path}")
        )
    found += [
        tests(machine, "tests compile", (own,), "compile and not sm80", 60, "of the operations under torch.compile"),
        Stage(
            "compiled",
            "times next to those of torch.compile",
            100,
            (
                machine.ops("bank", "--sizes", HEADLINE, "512,65536,256", "--dtype", "bfloat16", "--seconds", "60")
                + ("--variants", "cuda", "dense", "--output", machine.written("bench_compiled")),
            ),
            expected=TIMED,
            shown=r"^\|",
        ),
        Stage(
            "lists",
            "times of the key encoder's average and of the LARS step",
            50,
            (machine.ops("ema_update", "lars_step", "--seconds", "30") + ("--output", machine.written("bench_lists")),),
            needs=(),
            shown=r"^\|",
        ),
        Stage(
            "steps",
            "pairs/s of whole steps: CaCo with and without a CUDA graph, MoCo v2, CaCo as released",
            110,
            (
                (*step, "--config", f"{CONFIGS}/imagenet_resnet50_200ep_batch1024.yaml", "--batch", "128", "256")
                + ("--variants", "CaCo", "CaCo, CUDA graph", "MoCo v2 symmetric", "CaCo as released")
                + ("--rounds", "4", "--seconds", "40", "--output", machine.written("bench_train"))
                + ("trainer.device=cuda",),
            ),
            packages=packages,
            shown=r"^\|",
        ),
        Stage(
            "CUDA graph",
            "50 steps replayed from a CUDA graph have the losses of steps launched kernel by kernel",
            60,
            (
                (machine.python, "tools/check/switches.py", "--switches", "graph", "--precision", "bf16", "fp16")
                + ("trainer.device=cuda", "--output", machine.written("prove_switches")),
            ),
            packages=packages,
            shown=r"^\|",
        ),
        Stage(
            "loader",
            "the loader in memory makes its views on the GPU as fast as the step takes them",
            45,
            (
                (*step, "--config", f"{CONFIGS}/quickstart.yaml", "--variants", "CaCo", "CaCo, with the loader")
                + ("--rounds", "3", "--output", machine.written("bench_loader"), "trainer.device=cuda"),
            ),
            packages=packages,
            shown=r"^\|",
        ),
        *([dali(machine)] if importlib.util.find_spec("nvidia.dali") else []),
        tests(machine, "other tests", (), "", 70, "of other parts", of_kernels=False),
        sanitized(machine, "racecheck", "no race in shared memory", r"RACECHECK SUMMARY: 0 hazards"),
    ]
    return found


def build(machine: Machine) -> Stage:
    """For this GPU only, which takes a quarter of the time of all architectures."""
    command = (machine.python, "setup.py", "build_ext")
    environment = {"CACO_ARCHES": machine.target, "CACO_CUDA": "1"}
    return Stage(
        "build",
        "the kernels compile here",
        120,
        (command,),
        paths=tuple(machine.paths),
        needs=(),
        environment=environment,
    )


def primitives(machine: Machine, path: str) -> Stage:
    emulate, compile_, *runs = commands_of_primitives(path, machine.architecture, machine.nvcc)
    return Stage(
        f"primitives {path}",
        "each primitive does on the device what its emulation does",
        40,
        tuple(runs),
        paths=(path,),
        shown=".",
        beforehand=(emulate, compile_),
        needs=(),
    )


def commands_of_primitives(path: str, architecture: str, nvcc: str) -> tuple[Command, ...]:
    """Build the program of the path's primitives twice; the emulated one writes its results, the device compares."""
    source = str(ROOT / "tests" / "emulation" / f"primitives_check_{path}.cu")
    emulated, device, written = (str(WORK / f"primitives_{path}_{kind}") for kind in ("emulated", "device", "results"))
    common = ("-std=c++20", "-O2", f"-I{sources.ROOT}")
    target = Machine(architecture).target
    return (
        ("g++", *common, f"-I{ROOT / 'tests'}", "-pthread", "-DCACO_EMULATE", "-x", "c++", source, "-o", emulated),
        (nvcc, *common, f"-gencode=arch=compute_{target},code=sm_{target}", source, "-o", device),
        (emulated, written),
        (device, written, "compare"),
    )


def tests(
    machine: Machine, name: str, paths: tuple[str, ...], chosen: str, limit_s: int, claim: str, of_kernels: bool = True
) -> Stage:
    # By file: other files in these folders may import packages that such a machine lacks.
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if FOR_A_GPU.search(path.read_text())]
    names = [str(path.relative_to(ROOT)) for path in found]
    files = [name for name in names if name.startswith(TESTS_OF_KERNELS) == of_kernels]
    options = ("-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen, "--durations", "8")
    return Stage(
        name,
        f"all tests {claim} pass",
        limit_s,
        ((machine.python, "-m", "pytest", *options, *files),),
        paths=paths,
        expected=r"\d+ passed",
        packages=() if of_kernels else ("omegaconf",),
        waits=of_kernels,
    )


def sanitized(machine: Machine, tool: str, claim: str, clean: str) -> Stage:
    check = (machine.sanitizer, "--tool", tool, "--error-exitcode", "9", machine.filter_option, "kns=caco")
    command = (*check, machine.python, "-m", "caco_fast.selftest", "--small")
    # One allocation per tensor, or the checker cannot see where one ends.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    own = machine.paths[-1]
    return Stage(tool, claim, 75, (command,), paths=(own,), expected=clean, environment=environment)


def dali(machine: Machine) -> Stage:
    corpus = str(WORK / "corpus")
    return Stage(
        "DALI",
        "images/s of DALI with its views on the GPU",
        60,
        (
            (machine.python, "tools/make/jpeg_corpus.py", corpus, "--images", "3000"),
            (machine.python, "tools/bench/data.py", corpus, "--device", "cuda", "--cases", "two", "--repeats", "3")
            + ("--output", machine.written("bench_data")),
        ),
        needs=(),
        packages=("omegaconf",),
        shown=r"^\|",
    )


def where_it_waits(machine: Machine) -> Stage:
    """What follows a stage that ran out of time on the path of wgmma: a debug build says what its kernels wait for."""
    tree = WORK / "bounded_wait"
    parts = "caco_fast csrc setup.py pyproject.toml README.md LICENSE NOTICE"
    script = (
        f"rm -rf '{tree}' && mkdir -p '{tree}' && cp -r {parts} '{tree}' && cd '{tree}' && rm -f caco_fast/_C.*.so && "
        f"('{machine.python}' setup.py -q build_ext > build.log 2>&1 || (tail -n 20 build.log; false)) && "
        f"('{machine.python}' -m caco_fast.selftest || true)"
    )
    return Stage(
        "where it waits",
        "a build with CACO_BOUNDED_WAIT names the block, thread and barrier of a launch that hangs",
        90,
        (("sh", "-c", script),),
        expected="waited too long|all checks passed",
        shown="waited too long",
        environment={"CACO_BOUNDED_WAIT": "1", "CACO_ARCHES": machine.target, "PYTHONPATH": os.pathsep.join(wheels())},
    )


def wheels() -> list[str]:
    """Wheels that travelled with the sources. Those of pure Python can be imported as they are."""
    return sorted(str(path) for path in (ROOT / "build" / "wheels").glob("*-none-any.whl"))

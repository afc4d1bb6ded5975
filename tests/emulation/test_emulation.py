"""The emulation of CUDA on the CPU catches the bugs that it is there for; and the real kernels under sanitizers."""

import itertools
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.emulation import build
from tests.ops.backends import PATHS

SCHEDULES = [f"{seed} {greedy} {lazy}" for seed, greedy, lazy in itertools.product((0, 5), (0, 1), (0, 1))]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "report_signal_unsafe=0:exitcode=66",
}


@cache
def program(source: str, sanitizer: str) -> Path:
    return build.build_program(source, sanitizer)


def output_of(source: str, sanitizer: str, *arguments: str) -> str:
    reason = build.missing_tool()
    if reason:
        pytest.skip(reason)
    command = [str(program(source, sanitizer)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **OPTIONS}, timeout=300)
    return done.stdout + done.stderr


def assert_caught(source: str, bug: str, sanitizer: str, words: str) -> None:
    """Under one of the schedules the bug is reported in these words; those after it need not run."""
    found: list[str] = []
    for schedule in SCHEDULES:
        found.append(output_of(source, sanitizer, bug, *schedule.split()))
        if re.search(words, found[-1]):
            return
    pytest.fail("\n".join(found))


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
def test_without_a_bug_nothing_is_reported(sanitizer):
    for schedule in SCHEDULES:
        assert output_of("planted.cpp", sanitizer, "none", *schedule.split()) == "ok, 0 conflicts\n"


# bug, what reports it, and in what words; by the emulator itself under at least one of the schedules.
PLANTED = [
    ("missing wait", "", "wrong"),
    ("one stage for two", "", "wrong"),
    ("missing swizzle", "", r"ok, [1-9]"),
    ("wrong stride", "", "error: cp.async: misaligned"),
    ("misaligned ldmatrix", "", "error: ldmatrix: misaligned"),
    ("diverged shuffle", "", "error: (warp diverged|deadlock)"),
    ("shuffle meets vote", "", "error: warp diverged: __\\w+ meets __\\w+"),
    ("barrier in a branch", "", "error: deadlock: .*__syncthreads"),
    ("missing barrier", "thread", "data race"),
    ("one stage for two", "thread", "data race"),
    ("update without atomics", "thread", "data race"),
    ("shared out of bounds", "address", "heap-buffer-overflow"),
    ("global out of bounds", "address", "heap-buffer-overflow"),
]


@pytest.mark.parametrize("bug, sanitizer, words", PLANTED, ids=[f"{bug}-{s or 'emulator'}" for bug, s, _ in PLANTED])
def test_a_planted_bug_is_caught(bug, sanitizer, words):
    assert_caught("planted.cpp", bug, sanitizer, words)


PLANTED_SM90 = [
    ("missing wait for full", "", "wrong|error: mbarrier: more arrivals"),
    ("missing wait for empty", "", "wrong|error: mbarrier: more arrivals"),
    ("wrong parity", "", "error: (deadlock: .*mbarrier wait|mbarrier: more arrivals)"),
    ("uninitialised mbarrier", "", "error: mbarrier: not initialised"),
    ("too many bytes", "", "error: deadlock: .*mbarrier wait"),
    ("too few bytes", "", "error: mbarrier: more bytes than expected"),
    ("wrong box", "", "error: deadlock: .*mbarrier wait"),
    ("missing swizzle", "", "wrong"),
    ("misaligned destination", "", "error: TMA: the swizzle requires a destination"),
    ("missing wait for products", "", "wrong"),
    ("missing commit", "", "wrong"),
    ("missing fence", "", "error: wgmma without wgmma.fence"),
    ("weights written too early", "", "wrong"),
    ("released too early", "", "wrong"),
    ("diverged warpgroup", "", "error: deadlock: .*wgmma"),
    ("operand beyond its slab", "", "error: wgmma: operand beyond shared memory"),
    ("misaligned source", "", "error: bulk copy: addresses and size"),
    ("misaligned prefetch", "", "error: bulk prefetch: address and size"),
    ("prefetch beyond the end", "address", "heap-buffer-overflow"),
    ("plain stores", "", "error: wgmma: a thread has stored to an operand, unfenced"),
    ("missing proxy fence", "", "error: wgmma: a thread has stored to an operand, unfenced"),
    ("proxy fence before the stores", "", "error: wgmma: a thread has stored to an operand, unfenced"),
    ("proxy fence by one thread", "", "error: wgmma: a thread has stored to an operand, unfenced"),
    ("operand overwritten too early", "", "error: wgmma: a thread has stored to an operand, unfenced"),
    ("missing barrier", "thread", "data race"),
    ("wrong number at the barrier", "", "error: (named barrier: threads wait for different numbers|deadlock)"),
]


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
def test_without_a_bug_nothing_is_reported_on_sm90(sanitizer):
    for schedule in SCHEDULES:
        assert output_of("planted_sm90.cpp", sanitizer, "none", *schedule.split()) == "ok, 0 conflicts\n"


@pytest.mark.parametrize("bug, sanitizer, words", PLANTED_SM90, ids=[bug for bug, *_ in PLANTED_SM90])
def test_a_bug_planted_on_sm90_is_caught(bug, sanitizer, words):
    assert_caught("planted_sm90.cpp", bug, sanitizer, words)


@pytest.mark.parametrize("kernel_path", PATHS)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("shape", ["37 70 64 float16", "3 45 256 bfloat16", "5 37 512 bfloat16", "3 80 144 float16"])
def test_kernels_under_a_sanitizer(sanitizer, shape, kernel_path):
    """Once in thread order with late copies, and once in shuffled, greedy order with early ones."""
    for schedule in ("0 0 1", "5 1 0"):
        arguments = (*shape.split(), *schedule.split(), str(kernel_path))
        assert output_of("kernels_program.cpp", sanitizer, *arguments) == "ok\n"


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_ring_that_goes_round_under_a_sanitizer(sanitizer):
    """Four tiles of 48 through the three stages of attend and step on sm90; the shapes above have one tile there."""
    assert output_of("kernels_program.cpp", sanitizer, *"150 150 512 float16 5 1 0 90".split()) == "ok\n"

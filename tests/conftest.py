"""What holds for every test: one thread, a fixed seed, and which tests are slow."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, because it reads them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

TESTS = Path(__file__).resolve().parent
# Files and folders whose tests together take more than some seconds, by measured durations. A test of another file
# marks itself with `pytest.mark.slow`.
SLOW = frozenset(
    """
    emulation gpu
    test_bank_ranks test_methods_on_ranks
    test_bad_images test_bad_images_of_ranks test_bench_data test_dali_loader test_dali_parity test_index
    test_ten_thousand test_torchvision_loader test_views
    test_bench_train test_checkpoint test_compiling test_dependability test_growth test_no_waiting test_rank_0_writes
    test_ranks test_reproducible test_resume_on_other_ranks test_scaling test_step_graph test_training
    test_bench_ops test_faulty_images test_golden test_gpu test_readme test_train_cli
    """.split()
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        places = item.path.relative_to(TESTS).with_suffix("").parts
        if SLOW.intersection(places) or _emulates_kernels(item):
            item.add_marker(pytest.mark.slow)


def _emulates_kernels(item: pytest.Item) -> bool:
    """Whether a test compiles the emulated kernels first: by its fixture, or as its parameter `backend`, say sm80."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    fixtures = set(getattr(item, "fixturenames", ()))
    return bool({"emulated", "cuda_ops"} & fixtures) or str(parameters.get("backend", "")).startswith("sm")


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

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
# Files and folders whose tests together take more than some seconds, by measured durations, the longest first. A test
# of another file marks itself with `pytest.mark.slow`.
SLOW = tuple(
    """
    emulation test_dependability test_sass test_method_interface test_train_cli test_training test_step_graph
    test_golden test_bench_ops test_examples test_methods_on_ranks test_kernel_check test_growth test_faulty_images
    test_compiling test_torchvision_loader test_resume_on_other_ranks test_ten_thousand test_index test_bench_train
    test_agreement test_epoch_end test_held_out test_curves test_distributed test_resume_settings test_scale
    test_bank_traffic test_bad_images_of_ranks test_scaling test_checkpoint test_reproducible test_readme
    test_bank_ranks test_gpu_rehearsal test_gpu test_ranks test_dali_loader test_bench_data test_dali_parity
    test_views test_bad_images test_accumulate test_recipes test_run_figures test_recompute test_rank_0_writes
    test_protocols_on_ranks test_no_waiting gpu test_compare test_evaluation test_pictures test_export test_released
    test_end_of_run
    """.split()
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {item: item.path.relative_to(TESTS).with_suffix("").parts for item in items}
    for item in items:
        if set(SLOW).intersection(places[item]) or _emulates_kernels(item):
            item.add_marker(pytest.mark.slow)
    # With several processes the longest files start first, so that none of them is left for the end.
    if hasattr(config, "workerinput"):
        rank = {name: index for index, name in enumerate(SLOW)}
        items.sort(key=lambda item: min(rank.get(place, len(SLOW)) for place in places[item]))


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

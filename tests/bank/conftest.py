"""One thread and a fixed seed for the tests of the banks, and the emulated kernels."""

import pytest
import torch

from tests.ops.backends import cuda_ops, emulated, filled_memory, path

__all__ = ["cuda_ops", "emulated", "filled_memory", "path"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

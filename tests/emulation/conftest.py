"""The fixtures of the emulated kernels."""

from tests.csrc.conftest import cuda_ops, device, emulated, path  # noqa: F401

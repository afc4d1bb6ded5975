"""The emulated kernels, for tests of what a run does with them."""

from tests.ops.backends import cuda_ops, emulated, filled_memory, path

__all__ = ["cuda_ops", "emulated", "filled_memory", "path"]

"""The fixtures of the emulated kernels."""

from tests.ops.backends import cuda_ops, emulated, filled_memory, path

__all__ = ["cuda_ops", "emulated", "filled_memory", "path"]

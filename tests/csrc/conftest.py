"""The emulated kernels, for the tests of the emulator."""

from tests.ops.backends import cuda_ops, emulated, filled_memory, path

__all__ = ["cuda_ops", "emulated", "filled_memory", "path"]

"""A pre-trained backbone, written in the formats of other libraries and read back: `caco-fast export`."""

# Each file registers its formats.
from caco_fast.export import bank, detection, hub, onnx, state_dicts  # noqa: F401
from caco_fast.export.base import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]

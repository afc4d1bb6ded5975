"""The scripts of tools/ as modules, for tests."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def load_tool(name: str) -> ModuleType:
    """Import tools/<name>.py anew, such as "bench/step". Worker processes find it too, and so do its neighbours."""
    folder, stem = (TOOLS / name).parent, Path(name).name
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    sys.modules.pop(stem, None)
    return importlib.import_module(stem)

"""The parts of NVIDIA Apex that are installed, for users who have built it (github.com/NVIDIA/apex)."""

import importlib.util
from pathlib import Path

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_BNP=1 pip install -v --no-build-isolation ."
)


def missing(file: str, extension: str) -> str | None:
    """The reason why a part of Apex is missing, or None. A part is a file in the package and an extension module."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "NVIDIA Apex is not installed"
    # Look at its files instead of importing it, because the package index's other 'apex' fails to import.
    folders = found.submodule_search_locations or ()
    if not any(Path(folder, file).is_file() for folder in folders):
        return f"the installed package 'apex' is not NVIDIA's, it has no {file}; uninstall it"
    if importlib.util.find_spec(extension) is None:
        return f"NVIDIA Apex is installed without its extension {extension}"
    return None


def build_or_off(setting: str) -> str:
    """The advice if `setting` requires Apex and Apex is missing."""
    return f"build it by `{BUILD}`, or set {setting}=off"

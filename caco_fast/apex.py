"""What of NVIDIA Apex is here, for those who have built it (github.com/NVIDIA/apex)."""

import importlib.util
from pathlib import Path

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_BNP=1 pip install -v --no-build-isolation ."
)


def missing(file: str, extension: str) -> str | None:
    """Why a part of Apex can't be had here, or None. The part: its file in the package, and its extension module."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "NVIDIA Apex is not installed"
    # By its files, not by import: the package index's apex fails to import.
    folders = found.submodule_search_locations or ()
    if not any(Path(folder, file).is_file() for folder in folders):
        return f"the installed package 'apex' is not NVIDIA's, it has no {file}; uninstall it"
    if importlib.util.find_spec(extension) is None:
        return f"NVIDIA Apex is installed without its extension {extension}"
    return None


def build_or_off(setting: str) -> str:
    """What to do where Apex is asked for by `setting` and missing."""
    return f"build it by `{BUILD}`, or set {setting}=off"

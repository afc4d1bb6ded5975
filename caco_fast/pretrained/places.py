"""The file that the text of a source names: the chosen checkpoint of a run, the tensors of a Hugging Face folder."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from caco_fast.engine.checkpoint import checkpoints_in
from caco_fast.errors import UserError
from caco_fast.models.layouts import ENCODERS
from caco_fast.models.weights import HUB_FILES, split_choices

EXPECTED = (
    "a run folder (RUN, RUN@best, RUN@step=N, RUN@epoch=N), a file of weights, a folder with config.json, torchvision:"
    "NAME, timm:NAME or random:NAME"
)


class Place(NamedTuple):
    """A file of weights, and how it was named."""

    path: Path
    name: str  # for tables and as the name of a folder
    run: Path | None  # the run folder, if the text names one
    latest: bool  # whether the file is the newest checkpoint of the run
    hub: bool  # whether config.json is beside it
    encoder: str  # of two in the file; "": the usual one


def locate(text: str, key: str = "source") -> Place:
    """The file that `text` names. UserError if there is none.

    key: the setting or argument that holds the text, for error lines.
    """
    name, choices = split_choices(text)
    path = Path(name).expanduser()
    encoders = [choice for choice in choices if choice.partition("=")[0] in (*ENCODERS, "prefix")]
    checkpoints = [choice for choice in choices if choice not in encoders]
    if len(encoders) > 1 or len(checkpoints) > 1:
        raise UserError(f"{key}: found '{text}', expected one checkpoint and one encoder behind @")
    encoder, chosen = "".join(encoders), "".join(checkpoints)
    title = "-".join([_stem(path), *choices]).replace("=", "-").replace("/", "-").rstrip(".")
    if (path / "checkpoints").is_dir():
        file = _checkpoint(path, chosen, key)
        return Place(file, title, path, not chosen, False, encoder)
    if chosen:
        raise UserError(f"{key}: found @{chosen} behind {path}, expected that behind a run folder")
    if path.is_dir():
        for name in HUB_FILES:
            if (path / name).is_file() and (path / "config.json").is_file():
                return Place(path / name, title, None, False, True, encoder)
    if not path.is_file():
        what = "a folder without checkpoints/ or config.json" if path.is_dir() else f"'{text}', which doesn't exist"
        raise UserError(f"{key}: found {what}, expected {EXPECTED}")
    return Place(path, title, None, False, False, encoder)


def resolved_init(init: str) -> str:
    """`backbone.init` with a run folder replaced by the file of its checkpoint; anything else stays.

    Raises:
        UserError: the run folder has no such checkpoint.
    """
    folder, choices = split_choices(init)
    if not init or not (Path(folder).expanduser() / "checkpoints").is_dir():
        return init
    place = locate(init, "backbone.init")
    return f"{place.path}@{place.encoder}" if place.encoder else str(place.path)


def sha256_of(path: Path) -> str:
    """The hash of a file, read block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _stem(path: Path) -> str:
    """The name of a folder, or that of a file without its endings: CaCo_200.pth.tar -> CaCo_200."""
    name = path.resolve().name
    for ending in (".tar", ".pth", ".pt", ".safetensors", ".bin", ".ckpt"):
        name = name.removesuffix(ending)
    # A checkpoint of ours says little without the name of its run.
    if path.resolve().parent.name == "checkpoints":
        name = f"{path.resolve().parent.parent.name}-{name}"
    return name


def _checkpoint(folder: Path, chosen: str, key: str) -> Path:
    """best, step=N, epoch=N, or the newest one, of a run folder."""
    checkpoints = folder / "checkpoints"
    steps = dict(checkpoints_in(checkpoints))
    epochs = sorted(path.name for path in checkpoints.glob("epoch_*.pt"))
    if not chosen and steps:
        return steps[max(steps)]
    what, _, number = chosen.partition("=")
    names = {"best": "best.pt", "step": f"step_{int(number or 0):08d}.pt", "epoch": f"epoch_{int(number or 0):04d}.pt"}
    if chosen and (checkpoints / names[what]).is_file():
        return checkpoints / names[what]
    found = [f"step={step}" for step in steps] + ["best"] * (checkpoints / "best.pt").is_file()
    found += [f"epoch={int(name[6:-3])}" for name in epochs]
    held = f"it has {', '.join(f'@{name}' for name in found)}" if found else "it has no checkpoint yet"
    raise UserError(f"{key}: found {f'@{chosen}' if chosen else 'no checkpoint'} for the run {folder}, but {held}")

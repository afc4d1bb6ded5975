"""Weights of a backbone, from a file of any known layout, timm or torchvision: all of them, or one line why not."""

import logging
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from caco_fast.distributed import rank
from caco_fast.errors import UserError
from caco_fast.models.layouts import COUNTER, ENCODERS, Weights, find_backbone

log = logging.getLogger(__name__)

# What may follow the name of a file or run: which checkpoint, and which encoder in it.
_CHOICE = re.compile(rf"@(best|step=\d+|epoch=\d+|prefix=[^@]+|{'|'.join(ENCODERS)})$")
# The files of a folder in Hugging Face's layout, the first that is there.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def initialise(backbone: nn.Module, init: str, name: str, channels: int, options: Mapping[str, Any]) -> None:
    """Load the weights that `backbone.init` names into a backbone. UserError if not all of them are there.

    init: the path of a file or of a folder in Hugging Face's layout, timm, torchvision, or one of these with a name, as
    in timm:NAME. name, channels, options: of the architecture.
    """
    wanted = {key: value.shape for key, value in backbone.state_dict().items()}
    kind, _, other = init.partition(":")
    if kind in ("timm", "torchvision") and not Path(init).exists():
        fetched = other or name
        tree = fetch_weights(kind, fetched, channels, {} if other else options, f"backbone.init: {init}")
        weights = find_backbone(tree, wanted, f"backbone.init: {kind}'s {fetched}")
    else:
        file, choices = split_choices(init)
        if choices and choices[-1].partition("=")[0] not in (*ENCODERS, "prefix"):
            raise UserError(f"backbone.init: found @{choices[-1]} behind {file}, expected that behind a run folder")
        path = Path(file).expanduser()
        hub = next((path / name for name in HUB_FILES if (path / name).is_file()), None)
        tree = read_weights(str(hub or path))
        weights = find_backbone(tree, wanted, f"backbone.init: {init}", choices[-1] if choices else "")
    load_backbone(backbone, weights)
    if rank() == 0:
        log.info("backbone: %s", describe(weights, init))


def load_backbone(backbone: nn.Module, weights: Weights) -> None:
    """Load all tensors of a backbone; counters of batches, which old files lack, stay as they are."""
    counters = {key: value for key, value in backbone.state_dict().items() if key.endswith(COUNTER)}
    backbone.load_state_dict(counters | weights.state)


def describe(weights: Weights, name: str) -> str:
    """The line that says what was taken from `name`, and what was not."""
    place = f" under '{weights.place}'" if weights.place else ""
    left_out = f"; left out: {', '.join(weights.left_out)}" if weights.left_out else ""
    return f"{len(weights.state)} tensors of {name}{place}{left_out}"


def split_choices(text: str) -> tuple[str, list[str]]:
    """`runs/a@best@key` as ("runs/a", ["best", "key"]). A path that exists is taken as it is."""
    choices: list[str] = []
    while not Path(text).expanduser().exists() and (found := _CHOICE.search(text)):
        text, choices = text[: found.start()], [found[1], *choices]
    return text, choices


def read_weights(file: str, key: str = "backbone.init", trust: bool = False) -> Mapping[str, Any]:
    """What a file of weights holds: safetensors, or a file of torch.save.

    key: the setting or argument that names the file, for error lines. trust: whether pickled classes are loaded too,
    which runs code of the file.

    Raises:
        UserError: the file is missing, damaged, or holds classes and isn't trusted.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "doesn't exist"
        or_names = ", timm or torchvision" if key == "backbone.init" else ""
        raise UserError(f"{key}: {path} {what}, expected a file of weights{or_names}")
    if path.suffix in (".pkl", ".pickle"):
        raise UserError(
            f"{key}: {path} is a pickle, as BYOL (haiku) and detectron2 release their weights, whose loading runs "
            "code, and is not read; convert its tensors to a .safetensors file with the names of torchvision"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # torch does not check checksums when it reads.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"{key}: {path} is damaged (checksum of {damaged}); fetch it again")
        tree = torch.load(path, map_location="cpu", weights_only=not trust)
    except UserError:
        raise
    except Exception as error:
        # Damaged files raise nearly any exception.
        raise UserError(f"{key}: {path} {_reason(error, key)}") from None
    if isinstance(tree, Mapping):
        return tree
    raise UserError(f"{key}: {path} holds a {type(tree).__name__}, expected a dict of tensors")


def fetch_weights(kind: str, name: str, channels: int, options: Mapping[str, Any], where: str) -> Mapping[str, Tensor]:
    """The pretrained weights of an architecture of timm or torchvision, as a state_dict, over the network.

    name: of the architecture, with the tag of the weights behind a dot if there are several. where: for error lines.
    """
    fetch: dict[str, Callable[[], Mapping[str, Any]]] = {
        "timm": lambda: timm.create_model(
            name, pretrained=True, num_classes=0, in_chans=channels, **options
        ).state_dict(),
        "torchvision": lambda: _of_torchvision(name, where.partition(":")[0]),
    }
    key = where.partition(":")[0]
    try:
        return fetch[kind]()
    except UserError:
        raise
    except Exception as error:
        # Networks, hubs and caches raise many kinds of errors.
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        instead = "set backbone.init=FILE" if key == "backbone.init" else "give the file"
        raise UserError(
            f"{where} gives no weights for {name} ({reason}); without a network fetch them elsewhere and {instead}"
        ) from None


def _of_torchvision(name: str, key: str) -> Mapping[str, Any]:
    from torchvision.models import get_model_weights, list_models

    architecture, _, tag = name.partition(".")
    if architecture not in list_models():
        raise UserError(f"{key}: torchvision has no {architecture}; set it to timm or a file")
    weights = get_model_weights(architecture)
    if tag and tag not in weights.__members__:
        raise UserError(
            f"{key}: found '{name}', expected {architecture} alone or with .{', .'.join(weights.__members__)}"
        )
    return (weights[tag] if tag else weights.DEFAULT).get_state_dict(progress=False, check_hash=True)


def _reason(error: Exception, key: str) -> str:
    """The reason why a file can't be read, as the end of a sentence that begins with its name."""
    if isinstance(error, PermissionError):
        return "can't be read, there is no permission; allow it with chmod u+r"
    if found := re.search(r"GLOBAL (\S+) was not an allowed global|Unsupported (?:global|class) (\S+)", str(error)):
        trusted = "" if key == "backbone.init" else ", or load it with --trust"
        return (
            f"holds a {found[1] or found[2]}, whose loading could run code, and is not read; if you trust the file, "
            "save its tensors alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
            f"{trusted}"
        )
    if isinstance(error, (ModuleNotFoundError, AttributeError)):
        return f"holds classes that are not here ({error}); save its tensors alone where they are"
    return f"is truncated, damaged or no file of weights ({type(error).__name__}); fetch it again"

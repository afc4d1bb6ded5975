"""Weights of a backbone, from a file of any known layout, timm or torchvision: all of them, or one line why not.

A file is taken under one prefix, at which every tensor of the architecture is found with its shape. What else is in the
file, such as classifiers, projectors and queues, is named and left out.
"""

import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from caco_fast.distributed import rank
from caco_fast.errors import UserError

log = logging.getLogger(__name__)

# Where files keep their tensors, and under which prefix. The first that fits is taken: of two encoders that a file
# holds, the one that is evaluated (DINO's teacher) or trained (the queries' encoder of CaCo, MoCo and AdCo).
CONTAINERS = (
    "state.encoders",
    "teacher",
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "classy_state_dict.base_model.model.trunk",
    "",
    "student",
)
PREFIXES = (
    "query.backbone.",
    "",
    "module.encoder_q.",
    "module.base_encoder.",
    "module.encoder.",
    "backbone.",
    "module.backbone.",
    "encoder.",
    "encoder_q.",
    "base_encoder.",
    "module.",
    "_feature_blocks.",
)
# Classifiers, which may share their first word with the architecture, as ConvNeXt's head.norm does.
CLASSIFIERS = ("fc.", "head.", "heads.", "classifier.")
# BatchNorm's count of its batches, which old files lack and which nothing reads here.
COUNTER = "num_batches_tracked"

Shapes = Mapping[str, torch.Size]


class Weights(NamedTuple):
    """The tensors of a backbone, and where they were found."""

    state: dict[str, Tensor]
    container: str
    prefix: str
    left_out: list[str]  # first words of the names that are not the backbone's


@dataclass(frozen=True)
class _Place:
    """One container and prefix of a file, compared with the architecture."""

    container: str
    prefix: str
    state: dict[str, Tensor]
    missing: list[str]
    reshaped: list[str]
    # Tensors that belong to a larger architecture of the same kind.
    surplus: list[str]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.reshaped or self.surplus)

    def __str__(self) -> str:
        found = [
            f"{len(names)} {what}, such as {names[0]}"
            for what, names in (("are missing", self.missing), ("differ in shape", self.reshaped))
            if names
        ]
        found += [f"{len(self.surplus)} are of a larger one, such as {self.surplus[0]}"] if self.surplus else []
        return f"under '{self.prefix}' {'; '.join(found)}"


def initialise(backbone: nn.Module, init: str, name: str, channels: int, options: Mapping[str, Any]) -> None:
    """Load the weights that `backbone.init` names into a backbone. UserError if not all of them are there.

    init: the path of a file, timm or torchvision. name, channels, options: of the architecture.
    """
    fetch: dict[str, Callable[[], Mapping[str, Any]]] = {
        "timm": lambda: timm.create_model(
            name, pretrained=True, num_classes=0, in_chans=channels, **options
        ).state_dict(),
        "torchvision": lambda: _of_torchvision(name),
    }
    wanted = {key: value.shape for key, value in backbone.state_dict().items()}
    if init in fetch:
        weights = find_backbone(_fetched(init, name, fetch[init]), wanted, f"backbone.init: {init}'s {name}")
    else:
        weights = find_backbone(read_weights(init), wanted, f"backbone.init: {init}")
    counters = {key: value for key, value in backbone.state_dict().items() if key.endswith(COUNTER)}
    backbone.load_state_dict(counters | weights.state)
    if rank() == 0:
        where = " under '" + ".".join(filter(None, (weights.container, weights.prefix.rstrip(".")))) + "'"
        left_out = f"; left out: {', '.join(weights.left_out)}" if weights.left_out else ""
        log.info(
            "backbone: %d tensors of %s%s%s", len(weights.state), init, where if where != " under ''" else "", left_out
        )


def read_weights(file: str) -> Mapping[str, Any]:
    """What a file of weights holds: safetensors, or a file of torch.save without pickled classes.

    Raises:
        UserError: the file is missing, damaged, or holds classes, which loading would run as code.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "doesn't exist"
        raise UserError(f"backbone.init: {path} {what}, expected a file of weights, timm or torchvision")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # torch does not check checksums when it reads.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"backbone.init: {path} is damaged (checksum of {damaged}); fetch it again")
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        # Damaged files raise nearly any exception.
        raise UserError(f"backbone.init: {path} {_reason(error)}") from None
    if isinstance(tree, Mapping):
        return tree
    raise UserError(f"backbone.init: {path} holds a {type(tree).__name__}, expected a dict of tensors")


def find_backbone(tree: Mapping[str, Any], wanted: Shapes, where: str) -> Weights:
    """The tensors of these names and shapes in what a file holds. UserError, with what was found, if one is missing.

    where: the setting and the file, for the error line.
    """
    places = list(_places(tree, wanted))
    for place in places:
        if place.fits:
            return Weights(place.state, place.container, place.prefix, _left_out(tree, place))
    expected = f"expected {len(wanted)} tensors such as {_shown(wanted)}"
    advice = "set backbone.name, stem and options to the architecture of the file"
    if not places:
        found = {key: value.shape for _, part in _containers(tree) for key, value in part.items()}
        held = (
            f"{len(found)} tensors such as {_shown(found)}" if found else f"the keys {', '.join(map(str, tree))[:80]}"
        )
        raise UserError(f"{where}: found {held}, {expected} under one prefix; {advice}")
    nearest = min(places, key=lambda place: len(place.missing))
    raise UserError(f"{where}: {nearest}; {expected}; {advice}")


def _places(tree: Mapping[str, Any], wanted: Shapes) -> Iterator[_Place]:
    """The places at which at least one tensor of the architecture is, known prefixes first."""
    # Any tensor may be the one that tells of a prefix which is not in the table.
    first = next(iter(wanted))
    for container, part in _containers(tree):
        others = [key.removesuffix(first) for key in part if key.endswith(f".{first}")]
        for prefix in dict.fromkeys([*PREFIXES, *others]):
            place = _compare(container, prefix, part, wanted)
            if place.state:
                yield place


def _containers(tree: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The containers of a file that hold tensors, each as name -> tensor."""
    for name in CONTAINERS:
        part: Any = tree
        for key in filter(None, name.split(".")):
            part = part.get(key) if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping):
            continue
        tensors = {str(key): value for key, value in part.items() if isinstance(value, Tensor)}
        if tensors:
            yield name, tensors


def _compare(container: str, prefix: str, part: Mapping[str, Tensor], wanted: Shapes) -> _Place:
    under = {key.removeprefix(prefix): value for key, value in part.items() if key.startswith(prefix)}
    state = {key: value for key, value in under.items() if key in wanted and value.shape == wanted[key]}
    missing = [key for key in wanted if key not in under and not key.endswith(COUNTER)]
    reshaped = [
        f"{key} (found {list(under[key].shape)}, expected {list(shape)})"
        for key, shape in wanted.items()
        if key in under and under[key].shape != shape
    ]
    words = {key.partition(".")[0] for key in wanted}
    # Further sets of BatchNorms belong to a method, not to the architecture.
    others = [key for key in under if key not in wanted and not key.startswith(CLASSIFIERS) and ".further." not in key]
    surplus = [key for key in others if key.partition(".")[0] in words]
    return _Place(container, prefix, state, missing, reshaped, surplus)


def _left_out(tree: Mapping[str, Any], place: _Place) -> list[str]:
    """The first words of the other names below the prefix, and of the names beside it."""
    part, own = dict(_containers(tree))[place.container], {place.prefix + key for key in place.state}
    others = [key.removeprefix(place.prefix).removeprefix("module.") for key in part if key not in own]
    return list(dict.fromkeys(key.partition(".")[0] for key in others))


def _shown(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{key} {list(shape)}" for key, shape in list(shapes.items())[:2])


def _reason(error: Exception) -> str:
    """The reason why a file can't be read, as the end of a sentence that begins with its name."""
    if isinstance(error, PermissionError):
        return "can't be read, there is no permission; allow it with chmod u+r"
    if found := re.search(r"GLOBAL (\S+) was not an allowed global|Unsupported (?:global|class) (\S+)", str(error)):
        return (
            f"holds a {found[1] or found[2]}, whose loading could run code, and is not read; if you trust the file, "
            "save its tensors alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
        )
    return f"is truncated, damaged or no file of weights ({type(error).__name__}); fetch it again"


def _fetched(init: str, name: str, fetch: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return fetch()
    except UserError:
        raise
    except Exception as error:
        # Networks, hubs and caches raise many kinds of errors.
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"backbone.init: {init} gives no weights for {name} ({reason}); without a network fetch them elsewhere and "
            "set backbone.init=FILE"
        ) from None


def _of_torchvision(name: str) -> Mapping[str, Any]:
    from torchvision.models import get_model_weights, list_models

    if name not in list_models():
        raise UserError(f"backbone.init: torchvision has no {name}; set it to timm or a file")
    return get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)

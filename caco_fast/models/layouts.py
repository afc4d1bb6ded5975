"""The layouts of released checkpoints: where each project keeps its encoder, and how a file is recognised.

A backbone is taken under one prefix, at which every tensor of the architecture is found with its shape. What else is in
the file, such as classifiers, projectors and queues, is named and left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caco_fast.errors import UserError

# Where files keep their tensors, and under which prefix. The first that fits is taken: of two encoders that a file
# holds, the one that is evaluated (DINO's teacher) or trained (the queries' encoder of CaCo, MoCo and AdCo).
AVERAGED = ("teacher", "state_dict_ema", "model_ema")
TRAINED = ("state_dict", "model", "classy_state_dict.base_model.model.trunk", "", "student")
CONTAINERS = ("state.encoders", *AVERAGED, *TRAINED)
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
    "encoder_q.0.",
    "online_net.0.",
    "base_encoder.",
    "module.",
    "_feature_blocks.",
)
# Of the second encoder, which follows the trained one as a mean of its weights.
KEY_PREFIXES = (
    "key.backbone.",
    "module.encoder_k.",
    "module.momentum_encoder.",
    "encoder_k.",
    "encoder_k.0.",
    "encoder_k.module.0.",
    "target_net.0.",
    "target_net.module.0.",
    "momentum_encoder.",
    "momentum_backbone.",
    "backbone_momentum.",
)
# lightly's DINO, whose teacher is under `backbone.`.
STUDENT_PREFIXES = ("student_backbone.",)
# Names for one of two encoders in a file.
ENCODERS = {"key": "key", "teacher": "key", "query": "query", "student": "query"}
# Classifiers, which may share their first word with the architecture, as ConvNeXt's head.norm does.
CLASSIFIERS = ("fc.", "head.", "heads.", "classifier.")
# BatchNorm's count of its batches, which old files lack and which nothing reads here.
COUNTER = "num_batches_tracked"

Shapes = Mapping[str, torch.Size]


class Layout(NamedTuple):
    """How a project's files are told from others with the same prefix."""

    framework: str
    prefixes: tuple[str, ...]
    # What the names of tensors beside the backbone, or of the file's top level, begin with: all of these.
    beside: tuple[str, ...] = ()
    containers: tuple[str, ...] = CONTAINERS


_MOCO = ("module.encoder_q.", "module.encoder_k.")
_LIGHTNING = ("backbone.", "momentum_backbone.", "backbone_momentum.", "student_backbone.", "encoder.")
# The first that fits names the file.
LAYOUTS = (
    Layout("caco_fast", ("query.backbone.", "key.backbone.")),
    Layout("DINO", ("module.backbone.", "backbone.", ""), (), ("teacher", "student")),
    Layout("AdCo", _MOCO, ("Memory_Bank", "module.encoder_q.fc.2.bias")),
    Layout("CaCo", _MOCO, ("Memory_Bank",)),
    Layout("MoCo v1", _MOCO, ("module.queue", "module.encoder_q.fc.weight")),
    Layout("MoCo v2", _MOCO, ("module.queue",)),
    Layout("MoCo", _MOCO),
    Layout("MoCo v3", ("module.base_encoder.", "module.momentum_encoder.")),
    Layout("SimSiam", ("module.encoder.",), ("module.predictor.",)),
    Layout("InfoMin, InsDis or PIRL", ("module.encoder.",)),
    Layout("SwAV or DeepCluster v2", ("module.", ""), ("module.prototypes",)),
    Layout("SwAV or DeepCluster v2", ("module.", ""), ("module.projection_head",)),
    Layout("SwAV or DeepCluster v2", ("",), ("prototypes",)),
    Layout("Barlow Twins", ("module.backbone.",), ("module.projector.", "module.bn.")),
    Layout("VICReg", ("module.backbone.",), ("module.projector.",)),
    Layout("VISSL", ("_feature_blocks.",)),
    Layout("mmselfsup", ("backbone.", *KEY_PREFIXES, "encoder_q.0.", "online_net.0."), ("meta",)),
    Layout("solo-learn", _LIGHTNING, ("projector.",)),
    Layout("solo-learn", _LIGHTNING, ("classifier.",)),
    Layout("lightly", _LIGHTNING, ("projection_head",)),
    Layout("lightly", _LIGHTNING, ("online_classifier.",)),
    Layout("lightly", ("backbone_momentum.", "student_backbone.")),
    Layout("SimCLR (sthalles)", ("backbone.",), ("backbone.fc.0.",)),
    Layout("names of torchvision", ("",), ("conv1.",)),
)
# The converted weights of Google's SimCLR: nothing but {"state_dict": ...} with torchvision's names and a classifier.
SIMCLR = "SimCLR (converted from Google's)"


class Weights(NamedTuple):
    """The tensors of a backbone, and where they were found."""

    state: dict[str, Tensor]
    container: str
    prefix: str
    left_out: list[str]  # first words of the names that are not the backbone's
    framework: str = ""  # whose layout it is, as far as the names tell

    @property
    def place(self) -> str:
        """Container and prefix as one name; "" for the top level of a file."""
        return ".".join(filter(None, (self.container, self.prefix.rstrip("."))))


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


def find_backbone(tree: Mapping[str, Any], wanted: Shapes, where: str, encoder: str = "") -> Weights:
    """The tensors of these names and shapes in what a file holds. UserError, with what was found, if one is missing.

    where: the setting and the file, for the error line. encoder: of two in the file: key or teacher for the one that
    follows as a mean, query or student for the other, prefix=NAME for that under NAME; "" takes the usual one.
    """
    places = list(_places(tree, wanted, encoder))
    fitting = [place for place in places if place.fits]
    if fitting:
        place = fitting[0]
        others = [other for other in fitting if other.container == place.container and not _known(other.prefix)]
        if not _known(place.prefix) and len(others) > 1:
            found = ", ".join(f"'{other.prefix}'" for other in others)
            raise UserError(
                f"{where}: found {len(others)} encoders of this architecture, under {found}, expected one; choose it "
                f"by @prefix={place.prefix} behind the name of the file"
            )
        return Weights(place.state, place.container, place.prefix, _left_out(tree, place), _framework(tree, place))
    expected = f"expected {len(wanted)} tensors such as {_shown(wanted)}"
    advice = "set backbone.name, stem and options to the architecture of the file"
    if places:
        nearest = min(places, key=lambda place: len(place.missing))
        raise UserError(f"{where}: {nearest}; {expected}; {advice}")
    found = {key: value.shape for _, part in _containers(tree, CONTAINERS) for key, value in part.items()}
    held = f"{len(found)} tensors such as {_shown(found)}" if found else f"the keys {', '.join(map(str, tree))[:80]}"
    if encoder:
        raise UserError(f"{where}: found {held}, expected a {encoder} encoder; leave out @{encoder}")
    raise UserError(f"{where}: found {held}, {expected} under one prefix; {advice}")


def input_channels(tree: Mapping[str, Any], wanted: Shapes) -> int:
    """Channels of the images that a file's first convolution takes; 3 if an architecture of these names isn't there."""
    first, last = next((name for name, shape in wanted.items() if len(shape) == 4), ""), list(wanted)[-1]
    found = set()
    for _, part in _containers(tree, CONTAINERS):
        for key, value in part.items():
            # Other convolutions may have the same last word.
            if (key == first or key.endswith(f".{first}")) and key.removesuffix(first) + last in part:
                found.add(value.shape[1] if value.ndim == 4 else 3)
    return 3 if 3 in found or len(found) != 1 else found.pop()


def _places(tree: Mapping[str, Any], wanted: Shapes, encoder: str) -> Iterator[_Place]:
    """The places at which at least one tensor of the architecture is, known prefixes first."""
    # Any tensor may be the one that tells of a prefix which is not in the table.
    first = next(iter(wanted))
    chosen = ENCODERS.get(encoder, encoder)
    for container, part in _containers(tree, CONTAINERS):
        others = [key.removesuffix(first) for key in part if key.endswith(f".{first}")]
        prefixes: Sequence[str] = [*PREFIXES, *others]
        if chosen.startswith("prefix="):
            prefixes = [chosen.removeprefix("prefix=")]
        elif chosen == "key" and container not in AVERAGED:
            prefixes = KEY_PREFIXES
        elif chosen == "query":
            prefixes = [] if container in AVERAGED else [*STUDENT_PREFIXES, *PREFIXES]
        for prefix in dict.fromkeys(prefixes):
            place = _compare(container, prefix, part, wanted)
            if place.state:
                yield place


def _known(prefix: str) -> bool:
    return prefix in (*PREFIXES, *KEY_PREFIXES, *STUDENT_PREFIXES)


def _containers(tree: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The containers of a file that hold tensors, each as name -> tensor."""
    for name in names:
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
    part, own = dict(_containers(tree, CONTAINERS))[place.container], {place.prefix + key for key in place.state}
    others = [key.removeprefix(place.prefix).removeprefix("module.") for key in part if key not in own]
    return list(dict.fromkeys(key.partition(".")[0] for key in others))


def _framework(tree: Mapping[str, Any], place: _Place) -> str:
    """Whose layout a file has, by the names beside the backbone; "" if no project's."""
    part = dict(_containers(tree, CONTAINERS))[place.container]
    if set(tree) == {"state_dict"} and place.prefix == "" and len(part.get("fc.weight", ())) == 1000:
        return SIMCLR
    names = [*part, *map(str, tree)]
    for layout in LAYOUTS:
        if place.prefix in layout.prefixes and place.container in layout.containers:
            if all(any(name.startswith(sign) for name in names) for sign in layout.beside):
                return layout.framework
    return ""


def _shown(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{key} {list(shape)}" for key, shape in list(shapes.items())[:2])

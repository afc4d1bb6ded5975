"""ResNets for detection: detectron2, with two configurations, and mmdet.

Source: the detection settings of MoCo and AdCo: Faster R-CNN and Mask R-CNN with C4, a further BatchNorm after res5.
"""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from caco_fast.data import DataConfig
from caco_fast.data.build import pixels_of
from caco_fast.errors import UserError
from caco_fast.export.base import INSTEAD, register, tensors_of
from caco_fast.export.state_dicts import torchvision_difference, torchvision_model
from caco_fast.models.layouts import COUNTER
from caco_fast.pretrained import Pretrained

RESNETS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
WEIGHTS = "model.pkl"
# torchvision's names, in this order, and detectron2's.
RENAMED = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)

_BASE = """\
# Written by caco_fast. The settings are those of MoCo's and AdCo's detection folders, {what}.
# Res5ROIHeadsExtraNorm, a BatchNorm after res5, is in the train_net.py of these.
# detectron2's own Res5ROIHeads has none.
# Start it where {weights} is, or set MODEL.WEIGHTS to its path.
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: {weights}
  MASK_ON: {mask}
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  BACKBONE:
    FREEZE_AT: 0
  RESNETS:
    DEPTH: {depth}
    NORM: SyncBN
    STRIDE_IN_1X1: false
{widths}  RPN:
    PRE_NMS_TOPK_TEST: 6000
    POST_NMS_TOPK_TEST: 1000
  ROI_HEADS:
    NAME: Res5ROIHeadsExtraNorm
{classes}INPUT:
  FORMAT: RGB
  MIN_SIZE_TRAIN: {train_sizes}
  MIN_SIZE_TEST: 800
DATASETS:
  TRAIN: {train}
  TEST: {test}
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.02
  STEPS: {steps}
  MAX_ITER: {iterations}
{warmup}TEST:
  PRECISE_BN:
    ENABLED: true
VERSION: 2
"""
_VOC = dict(
    what="for PASCAL VOC 2007 and 2012, tested on that of 2007",
    mask="false",
    classes="    NUM_CLASSES: 20\n",
    train_sizes="[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]",
    train="[voc_2007_trainval, voc_2012_trainval]",
    test="[voc_2007_test]",
    steps="[18000, 22000]",
    iterations="24000",
    warmup="  WARMUP_ITERS: 100\n",
)
_COCO = dict(
    what="for COCO 2017, schedule 2x",
    mask="true",
    classes="",
    train_sizes="[640, 672, 704, 736, 768, 800]",
    train="[coco_2017_train]",
    test="[coco_2017_val]",
    steps="[120000, 160000]",
    iterations="180000",
    warmup="",
)


def detectron2_name(name: str) -> str:
    """layer1.0.bn2.weight -> res2.0.conv2.norm.weight"""
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def torchvision_name(name: str) -> str:
    """The inverse of `detectron2_name`."""
    name = re.sub(r"^stem\.conv1\.norm\.", "bn1.", name)
    name = re.sub(r"^stem\.conv1\.", "conv1.", name)
    name = re.sub(r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}.", name)
    name = re.sub(r"\.shortcut\.norm\.", ".downsample.1.", name)
    name = re.sub(r"\.shortcut\.", ".downsample.0.", name)
    return re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name)


def _require_resnet(name: str, pretrained: Pretrained) -> None:
    architecture = pretrained.architecture.name
    if architecture not in RESNETS:
        raise UserError(f"{name}: found {architecture}, expected one of {', '.join(RESNETS)}; {INSTEAD}")
    torchvision_model(name, pretrained)


def write_detectron2(pretrained: Pretrained, folder: Path) -> None:
    _require_resnet("detectron2", pretrained)
    model = {
        detectron2_name(name): value.float().numpy()
        for name, value in tensors_of(pretrained).items()
        if not name.endswith(COUNTER)
    }
    folder.mkdir()
    with open(folder / WEIGHTS, "wb") as file:
        pickle.dump({"model": model, "__author__": "caco_fast", "matching_heuristics": True}, file)
    depth = RESNETS[pretrained.architecture.name]
    for name, settings in ((f"pascal_voc_R_{depth}_C4_24k.yaml", _VOC), (f"coco_R_{depth}_C4_2x.yaml", _COCO)):
        (folder / name).write_text(configuration(pretrained, settings))


def configuration(pretrained: Pretrained, settings: dict[str, str]) -> str:
    """A configuration of detectron2 that starts from the weights beside it."""
    mean, std = pretrained.mean, pretrained.std
    if mean is None or std is None:
        mean, std = pixels_of(DataConfig())
    depth = RESNETS[pretrained.architecture.name]
    # ResNets without bottlenecks have a quarter of the channels after res2, which detectron2 must be told.
    widths = "    RES2_OUT_CHANNELS: 64\n" if depth < 50 else ""
    pixels = {key: [round(255 * value, 3) for value in values] for key, values in (("mean", mean), ("std", std))}
    return _BASE.format(weights=WEIGHTS, depth=depth, widths=widths, **pixels, **settings)


def verify_detectron2(pretrained: Pretrained, folder: Path) -> float:
    """Read it by the rule of names, since detectron2 has no release for the present torch."""
    with open(folder / WEIGHTS, "rb") as file:
        held = pickle.load(file)["model"]
    state: dict[str, Tensor] = {torchvision_name(name): torch.from_numpy(value) for name, value in held.items()}
    counters = {key: value for key, value in tensors_of(pretrained).items() if key.endswith(COUNTER)}
    return torchvision_difference("detectron2", pretrained, state | counters)


def write_mmdet(pretrained: Pretrained, path: Path) -> None:
    _require_resnet("mmdet", pretrained)
    torch.save({"meta": {}, "state_dict": tensors_of(pretrained)}, path)


def verify_mmdet(pretrained: Pretrained, path: Path) -> float:
    """mmdet's ResNets have torchvision's names, and `init_cfg` reads them under `state_dict`."""
    return torchvision_difference("mmdet", pretrained, torch.load(path, weights_only=True)["state_dict"])


register("detectron2", write_detectron2, verify_detectron2, "a folder: model.pkl and two configurations")
register("mmdet", write_mmdet, verify_mmdet, "a file for mmdet's and mmpretrain's init_cfg", (".pth",))

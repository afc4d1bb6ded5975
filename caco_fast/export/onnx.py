"""ONNX: a graph from images to features for any number of images, compared with onnxruntime."""

import contextlib
import importlib.util
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor

from caco_fast import __version__
from caco_fast.errors import UserError
from caco_fast.export.base import largest_difference, probe, register
from caco_fast.models import build_backbone
from caco_fast.pretrained import Pretrained

OPSET = 18


def write_onnx(pretrained: Pretrained, path: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"onnx: {missing[0]} is not installed, which writes or checks the file; run pip install caco-fast[onnx] "
            "onnxruntime"
        )
    # A copy of its own, because the exporter may change the module.
    model = build_backbone(pretrained.architecture, pretrained.channels)
    model.load_state_dict(pretrained.backbone.state_dict())
    # Two images: a batch of one would be taken for a constant.
    images = probe(pretrained, 2)
    level = logging.getLogger("torch.onnx").level
    try:
        # The exporter prints its progress and warns of what this package doesn't decide.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(),
                (images,),
                path,
                input_names=["images"],
                output_names=["features"],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                # One file, which holds up to 2 GiB.
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        # The exporter raises many kinds of errors for what it can't trace.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"onnx: torch can't export {pretrained.architecture.name} ({reason}); take safetensors instead"
        ) from None
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    _describe(pretrained, path)


def _describe(pretrained: Pretrained, path: Path) -> None:
    import onnx

    model = onnx.load(path)
    model.producer_name, model.producer_version = "caco_fast", __version__
    known = {"architecture": pretrained.architecture.name, "source_sha256": str(pretrained.origin.get("sha256", ""))}
    if pretrained.mean and pretrained.std:
        known |= {"mean": str(list(pretrained.mean)), "std": str(list(pretrained.std))}
    for key, value in known.items():
        if value:
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value
    onnx.checker.check_model(model)
    onnx.save(model, path)


def verify_onnx(pretrained: Pretrained, path: Path) -> float:
    """Run it by onnxruntime, on another number of images than it was exported with, and on one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    return max(largest_difference(pretrained, features, count) for count in (1, 3))


register("onnx", write_onnx, verify_onnx, f"a graph of opset {OPSET}, images [N, ...] to features [N, D]", (".onnx",))

"""torch.compile of the encoders' forwards and of the loss, with their gradients."""

import importlib.util
import os
import shutil
from typing import Any

import torch

from caco_fast.errors import UserError
from caco_fast.methods import Method
from caco_fast.models import EncoderPair


def compile_step(encoders: EncoderPair, method: Method, device: torch.device, **options: Any) -> None:
    """Compile both encoders and the method's loss at their first call, once for every shape of views.

    They are compiled in place, so that the keys of checkpoints stay. `options` are those of torch.compile.

    Raises:
        UserError: the compiler that torch.compile calls is not installed.
    """
    _require_compiler(device)
    # DistributedDataParallel would cut the graph at its buckets. That does not work across a custom Function, such as
    # BatchNorm over several ranks. Without cuts, the averaging of the gradients begins after the backward pass.
    torch._dynamo.config.optimize_ddp = False
    keys = () if encoders.key is None else (encoders.key,)
    for module in (encoders.query, *keys, *method.losses()):
        module.compile(dynamic=False, **options)


def _require_compiler(device: torch.device) -> None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("trainer.compile: on a GPU it needs triton, which is not installed; set it to off")
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"trainer.compile: on the CPU it needs a C++ compiler, found no {compiler}; set it to off")

"""BatchNorm, the addition of a shortcut and ReLU in one kernel: groupbn of NVIDIA Apex, in the ResNets of timm.

It serves fp16 in channels_last, with statistics over 1, 2, 4 or 8 ranks of one machine. What it does not serve, such as
evaluation, goes through torch with the same parameters, and the keys of the state_dict stay.

Legend: B images on this rank, C channels.
"""

import logging
import os

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from caco_fast.apex import build_or_off, missing
from caco_fast.distributed import world_size
from caco_fast.errors import UserError
from caco_fast.models.batch_norm import SegmentedBatchNorm

log = logging.getLogger(__name__)


class ApexBatchNorm(SegmentedBatchNorm):
    """BatchNorm of [B, C, h, w], then the sum with `added`, of the same shape, if one is given, then ReLU if `relu`."""

    # Its sums over ranks are part of the kernel, and joined views would be copied.
    joins_views = False

    def __init__(self, norm: nn.BatchNorm2d, relu: bool) -> None:
        options = dict(device=norm.weight.device, dtype=norm.weight.dtype)
        super().__init__(norm.num_features, norm.eps, norm.momentum, **options)
        self.load_state_dict(norm.state_dict())
        self.relu = relu
        # A tuple keeps it out of the state_dict. The first forward makes it, not earlier: it shares memory between
        # ranks, and the key encoder's copy of this module needs its own.
        self._kernels: tuple[nn.Module, ...] = ()

    def forward(self, input: Tensor, added: Tensor | None = None) -> Tensor:
        if self.training and served(input):
            parts = [None] * self.segments if added is None else added.chunk(self.segments)
            outputs = [self._by_apex(part, more) for part, more in zip(input.chunk(self.segments), parts)]
            self.num_batches_tracked.add_(self.segments)
            return outputs[0] if self.segments == 1 else torch.cat(outputs)
        output = super().forward(input)
        if added is not None:
            output = output + added
        return F.relu(output) if self.relu else output

    def _by_apex(self, input: Tensor, added: Tensor | None) -> Tensor:
        if not self._kernels:
            from apex.contrib.groupbn import BatchNorm2d_NHWC

            self._kernels = (BatchNorm2d_NHWC(self.num_features, fuse_relu=self.relu, bn_group=world_size()),)
        (kernels,) = self._kernels
        for name in ("weight", "bias", "running_mean", "running_var", "momentum", "eps"):
            setattr(kernels, name, getattr(self, name))
        # New for every forward: it writes them, and its backward pass reads them after other views have passed.
        kernels.minibatch_mean = torch.empty_like(self.running_mean)
        kernels.minibatch_riv = torch.empty_like(self.running_mean)
        return _nchw(kernels(_nhwc(input), None if added is None else _nhwc(added)))


class ApexBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), shortcut)


class ApexBottleneck(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x))))), shortcut)


BLOCKS = {BasicBlock: ApexBasicBlock, Bottleneck: ApexBottleneck}


def use_apex_norm(asked: str, backbone: nn.Module, autocast: torch.dtype | None, images: int = 0) -> None:
    """Put these BatchNorms into `backbone`, in place, if `asked` is on, or if it is auto and they serve this backbone.

    images: that the statistics are to be taken over; 0: all.

    Raises:
        UserError: `asked` is on, and they do not serve this backbone, precision or machine.
    """
    if asked == "off":
        return
    reason = _not_for(backbone, autocast)
    if images:
        reason = f"groupbn of Apex takes statistics over all images, not over {images} (trainer.batch_norm_images)"
    advice = "set backbone.apex to off or auto"
    if reason is None:
        reason, advice = missing("contrib/groupbn/batch_norm.py", "bnp"), build_or_off("backbone.apex")
    if reason is None:
        log.info("BatchNorm, ReLU and addition of the backbone are groupbn of NVIDIA Apex (backbone.apex=%s)", asked)
        fuse(backbone)
    elif asked == "on":
        raise UserError(f"backbone.apex: {reason}; {advice}")


def fuse(backbone: ResNet) -> None:
    """Put ApexBatchNorm into a ResNet for which `_not_for` returned None."""
    backbone.bn1, backbone.act1 = ApexBatchNorm(backbone.bn1, relu=True), nn.Identity()
    for block in [module for module in backbone.modules() if type(module) in BLOCKS]:
        block.__class__ = BLOCKS[type(block)]
        for name, child in list(block.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(block, name, ApexBatchNorm(child, relu=True))
        for name, child in list((block.downsample or nn.Sequential()).named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(block.downsample, name, ApexBatchNorm(child, relu=False))


def served(input: Tensor) -> bool:
    return input.is_cuda and input.dtype == torch.float16


def _not_for(backbone: nn.Module, autocast: torch.dtype | None) -> str | None:
    """The reason why groupbn can't serve this backbone, or None."""
    if autocast != torch.float16:
        return "groupbn of Apex serves fp16 on a GPU only (trainer.precision=fp16)"
    ranks = world_size()
    if ranks not in (1, 2, 4, 8) or int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) != ranks:
        return f"groupbn of Apex takes statistics over 1, 2, 4 or 8 ranks of one machine, not over these {ranks}"
    if not isinstance(backbone, ResNet) or not all(map(_is_plain, backbone.modules())):
        return "groupbn of Apex serves timm's ResNets of plain blocks with BatchNorm and ReLU only"
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether a part of a ResNet does nothing between BatchNorm, addition and ReLU."""
    if isinstance(module, (BasicBlock, Bottleneck)):
        between = [getattr(module, name) for name in ("se", "drop_path", "drop_block", "aa")]
        plain = all(part is None or isinstance(part, nn.Identity) for part in between)
        return plain and type(module) in BLOCKS and isinstance(module.act1, nn.ReLU)
    return not isinstance(module, ResNet) or (type(module.bn1), type(module.act1)) == (nn.BatchNorm2d, nn.ReLU)


def _nhwc(x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, h, w, C], a view if x is channels_last
    return x.permute(0, 2, 3, 1).contiguous()


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)

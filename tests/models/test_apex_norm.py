"""groupbn of NVIDIA Apex by a stand-in with its interface and its habits: a ResNet with it does what it did without.

Legend: B images, C channels.
"""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caco_fast.apex import BUILD
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, ProjectorConfig, apex_norm, build_backbone, build_encoder_pair
from caco_fast.models.batch_norm import segmented, separable

SMALL = {"layers": [1, 2, 1, 1], "channels": [4, 4, 8, 8]}
ARCHITECTURES = {"basic blocks": "resnet18", "bottlenecks": "resnet50"}


class _GroupNorm(torch.autograd.Function):
    """Statistics pass from forward to backward through buffers of the module, which every forward overwrites unseen."""

    @staticmethod
    def forward(ctx, x, added, weight, bias, running_mean, running_var, mini_mean, mini_inverse, momentum, eps, relu):
        flat = x.reshape(-1, x.shape[-1])
        mini_mean.data.copy_(flat.mean(0))
        mini_inverse.data.copy_(torch.rsqrt(flat.var(0, correction=0) + eps))
        running_mean.data.lerp_(flat.mean(0), momentum)
        running_var.data.lerp_(flat.var(0), momentum)
        y = (x - mini_mean) * mini_inverse * weight + bias + (0 if added is None else added)
        kept = y > 0 if relu else torch.ones_like(y, dtype=torch.bool)
        ctx.save_for_backward(x, weight, mini_mean, mini_inverse, kept)
        ctx.added = added is not None
        return y * kept

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, inverse, kept = ctx.saved_tensors
        grad = (grad * kept).reshape(-1, x.shape[-1])
        hat = ((x - mean) * inverse).reshape(grad.shape)
        of_x = weight * inverse * (grad - grad.mean(0) - hat * (grad * hat).mean(0))
        of_added = grad.reshape(x.shape) if ctx.added else None
        return of_x.reshape(x.shape), of_added, (grad * hat).sum(0), grad.sum(0), *[None] * 7


class StandIn(nn.Module):
    made: list["StandIn"] = []

    def __init__(self, num_features: int, fuse_relu: bool = False, bn_group: int = 1) -> None:
        super().__init__()
        self.num_features, self.fuse_relu, self.bn_group, self.calls = num_features, fuse_relu, bn_group, 0
        self.weight = nn.Parameter(torch.full((num_features,), torch.nan))
        self.bias = nn.Parameter(torch.full((num_features,), torch.nan))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.minibatch_mean, self.minibatch_riv = torch.zeros(num_features), torch.zeros(num_features)
        StandIn.made.append(self)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:  # [B, h, w, C]
        assert x.is_contiguous() and x.shape[-1] == self.num_features and (z is None or self.fuse_relu)
        self.calls += 1
        statistics = self.running_mean, self.running_var, self.minibatch_mean, self.minibatch_riv
        return _GroupNorm.apply(x, z, self.weight, self.bias, *statistics, self.momentum, self.eps, self.fuse_relu)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Apex's module by a stand-in that also serves f64 on the CPU; gives those that are made."""
    names = ("apex", "apex.contrib", "apex.contrib.groupbn")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["apex.contrib.groupbn"].BatchNorm2d_NHWC = StandIn
    monkeypatch.setattr(apex_norm, "served", lambda input: True)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn.made


def make(name: str, stem: str = "imagenet") -> tuple[nn.Module, nn.Module]:
    """A backbone as it is, and the same with Apex's BatchNorms."""
    torch.manual_seed(1)
    plain = build_backbone(BackboneConfig(name, stem, SMALL), channels=3).double()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    fused = copy.deepcopy(plain)
    apex_norm.fuse(fused)
    return plain, fused


def views() -> list[Tensor]:
    return [torch.randn(3, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last) for _ in "ab"]


def assert_same_state(plain: nn.Module, fused: nn.Module) -> None:
    assert plain.state_dict().keys() == fused.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_two_views_before_one_backward_pass(name: str, stand_in: list[StandIn]) -> None:
    """The statistics of the first view must outlive the second one's forward."""
    plain, fused = make(name)
    a, b = views()
    gradients = []
    for backbone in (plain, fused):
        first, second = backbone(a), backbone(b)
        (first.square().sum() + second.sin().sum()).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    assert_same_state(plain, fused)
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(stand_in) == len(norms) and {module.calls for module in stand_in} == {2}
    # ReLU rides with all but the shortcuts' own.
    shortcuts = sum("downsample" in name and name.endswith(".1.weight") for name, _ in plain.named_parameters())
    assert sum(not module.fuse_relu for module in stand_in) == shortcuts > 0


def test_views_in_one_batch_keep_their_statistics(stand_in: list[StandIn]) -> None:
    plain, fused = make("resnet18", "small")
    a, b = views()
    apart = torch.cat([plain(a), plain(b)])
    with segmented(fused, 2):
        together = fused(torch.cat([a, b]))
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)
    assert_same_state(plain, fused)


def test_what_apex_does_not_serve_goes_through_torch(stand_in: list[StandIn], monkeypatch) -> None:
    plain, fused = make("resnet50")
    (a, _) = views()
    torch.testing.assert_close(fused.eval()(a), plain.eval()(a), rtol=1e-12, atol=1e-12)
    monkeypatch.undo()
    torch.testing.assert_close(fused.train()(a), plain.train()(a), rtol=1e-12, atol=1e-12)
    assert_same_state(plain, fused)
    assert not stand_in


def test_views_pass_apart_and_each_encoder_has_kernels_of_its_own(stand_in: list[StandIn], monkeypatch) -> None:
    monkeypatch.setattr(apex_norm, "missing", lambda file, extension: None)
    config = BackboneConfig("resnet18", "small", SMALL, apex="on")
    pair = build_encoder_pair(config, ProjectorConfig(hidden=8, dim=4), 3, torch.float16, joint_views=True)
    assert not pair.query.joint_views and not separable(pair.query)
    pair.query.autocast = pair.key.autocast = None
    images = [view.float() for view in views()]
    pair.queries(images)
    pair.keys(images)
    for norm in [m for m in pair.query.modules() if isinstance(m, apex_norm.ApexBatchNorm)]:
        assert norm._kernels[0].weight is norm.weight
    norms = [m for m in pair.modules() if isinstance(m, apex_norm.ApexBatchNorm)]
    assert {id(norm._kernels[0]) for norm in norms} == {id(module) for module in stand_in}
    assert len(norms) == len(stand_in) and {module.calls for module in stand_in} == {2}


@pytest.mark.parametrize(
    ("backbone", "autocast", "line"),
    [
        (BackboneConfig("resnet18", "small", SMALL), torch.bfloat16, "serves fp16 on a GPU only"),
        (BackboneConfig("seresnet18", "imagenet", SMALL), torch.float16, "serves timm's ResNets of plain blocks"),
        (BackboneConfig("resnet18", "small", SMALL | {"drop_path_rate": 0.1}), torch.float16, "plain blocks"),
        (BackboneConfig("mobilenetv3_small_050"), torch.float16, "serves timm's ResNets of plain blocks"),
        (BackboneConfig("resnet18", "small", SMALL), torch.float16, "NVIDIA Apex is not installed"),
    ],
    ids=["bf16", "squeeze and excitation", "stochastic depth", "no ResNet", "not installed"],
)
def test_where_it_does_not_serve_on_is_an_error_and_auto_leaves_it_out(backbone, autocast, line) -> None:
    module = build_backbone(backbone, channels=3)
    before = [type(child) for child in module.modules()]
    apex_norm.use_apex_norm("auto", module, autocast)
    apex_norm.use_apex_norm("off", module, autocast)
    assert [type(child) for child in module.modules()] == before
    with pytest.raises(UserError, match=line) as error:
        apex_norm.use_apex_norm("on", module, autocast)
    assert str(error.value).startswith("backbone.apex: ") and ("not installed" not in line or BUILD in str(error.value))


def test_ranks_of_two_machines_are_refused(monkeypatch) -> None:
    module = build_backbone(BackboneConfig("resnet18", "small", SMALL), channels=3)
    monkeypatch.setattr(apex_norm, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="1, 2, 4 or 8 ranks of one machine, not over these 4"):
        apex_norm.use_apex_norm("on", module, torch.float16)


def test_it_is_off_unless_asked_for_and_the_setting_is_checked() -> None:
    assert BackboneConfig().apex == "off" and BackboneConfig(apex="True").apex == "on"
    with pytest.raises(UserError, match="backbone.apex: found 'maybe', expected auto, on or off"):
        BackboneConfig(apex="maybe")


def test_the_stand_in_is_batch_norm() -> None:
    """Else the tests above would compare with something else."""
    x = torch.randn(4, 5, 5, 3, dtype=torch.float64, requires_grad=True)
    norm = StandIn(3).double()
    nn.init.uniform_(norm.weight)
    nn.init.zeros_(norm.bias)
    norm.momentum, norm.eps = 0.1, 1e-5
    nchw = x.permute(0, 3, 1, 2)
    wanted = F.batch_norm(nchw, None, None, norm.weight, norm.bias, True, 0.1, 1e-5).permute(0, 2, 3, 1)
    torch.testing.assert_close(norm(x), wanted)

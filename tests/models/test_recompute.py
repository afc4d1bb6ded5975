"""Activations computed a second time: the same losses, gradients and running statistics, with less in memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from caco_fast import build
from caco_fast.distributed import rank
from caco_fast.errors import UserError
from caco_fast.models import Encoder, recompute_activations
from caco_fast.models.backbone import BackboneConfig, build_backbone, feature_width
from caco_fast.models.batch_norm import add_norm_sets, group_batch_norm, segment_batch_norm
from caco_fast.models.projector import ProjectorConfig, build_projector
from tests.engine.graph_steps import different, losses, make_trainer, state_of
from tests.engine.tiny_run import config, write_images
from tests.ranks import run_ranks

RESNET = BackboneConfig("resnet18", stem="small", options={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]})
VIT = BackboneConfig(
    "vit_tiny_patch16_224", options={"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5}
)


def encoder_of(backbone: BackboneConfig, norm_images: int = 0) -> Encoder:
    torch.manual_seed(0)
    features = segment_batch_norm(build_backbone(backbone, 3))
    projector = build_projector(ProjectorConfig(hidden=16, dim=8), feature_width(features))
    encoder = Encoder(features, segment_batch_norm(projector))
    group_batch_norm(encoder, norm_images)
    return encoder


def forward_and_backward(backbone: BackboneConfig, norm_images: int, recompute: bool) -> tuple[dict[str, Tensor], int]:
    """Embeddings, gradients and state after two views, and the numbers that the backward pass found in memory."""
    encoder = encoder_of(backbone, norm_images)
    if recompute:
        recompute_activations(encoder, backbone.name)
    torch.manual_seed(1)
    kept = 0

    def count(value: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if (value if value._base is None else value._base).requires_grad and value.is_leaf else value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        embeddings = encoder(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
    (embeddings[0] * embeddings[1]).sum().backward()
    found = {f"embedding {view}": value.detach() for view, value in enumerate(embeddings)}
    found |= {f"gradient of {name}": value.grad for name, value in encoder.named_parameters()}
    return found | dict(encoder.state_dict()), kept


@pytest.mark.parametrize(
    "backbone, norm_images", [(RESNET, 0), (RESNET, 2), (VIT, 0)], ids=["ResNet", "ResNet in groups", "ViT"]
)
def test_only_the_memory_differs(backbone: BackboneConfig, norm_images: int) -> None:
    found, less = forward_and_backward(backbone, norm_images, recompute=True)
    wanted, more = forward_and_backward(backbone, norm_images, recompute=False)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert less < 0.6 * more


def on_a_rank(images: Path, folder: Path) -> list[str]:
    """What differs after steps with DistributedDataParallel and in parts, BatchNorm's statistics over the ranks too."""
    found = []
    for way in ("checkpoint_activations=true", "joint_views=off"):
        trainer = make_trainer(images, folder / f"{way} {rank()}", f"trainer.{way}", "trainer.accumulate=2")
        found.append({"losses": torch.tensor(losses(trainer, steps=3)), **state_of(trainer)})
    return different(*found)


def test_two_ranks_train_the_same(tmp_path: Path) -> None:
    assert run_ranks(on_a_rank, 2, write_images(tmp_path / "images"), tmp_path) == [[], []]


def test_a_backbone_without_the_switch_is_named() -> None:
    encoder = encoder_of(BackboneConfig("resnet18"))
    encoder.backbone.set_grad_checkpointing = None
    with pytest.raises(UserError, match="trainer.checkpoint_activations: timm's mine can't recompute its activations"):
        recompute_activations(encoder, "mine")


def test_several_norm_sets_are_refused() -> None:
    encoder = encoder_of(RESNET)
    add_norm_sets(encoder, 2)
    with pytest.raises(UserError, match="trainer.checkpoint_activations: .* several BatchNorm sets"):
        recompute_activations(encoder, "resnet18")


@pytest.mark.parametrize("other", ["cuda_graph=true", "compile=true", "joint_views=on"])
def test_what_it_does_not_go_with(other: str) -> None:
    settings = config(Path("none"), "trainer.checkpoint_activations=true", f"trainer.{other}")
    with pytest.raises(UserError, match=f"trainer.checkpoint_activations: not possible with trainer.{other}"):
        build.settled(settings, torch.device("cpu"))

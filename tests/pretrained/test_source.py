"""Sources by their text."""

import torch

from caco_fast.models import BackboneConfig
from caco_fast.pretrained import open_source

SMALL = BackboneConfig("resnet18", "small", {"layers": [1, 1, 1, 1]})


def test_the_hash_of_the_weights_sees_names_shapes_dtypes_and_every_byte():
    first, second = open_source("random:resnet18", SMALL), open_source("random:resnet18", SMALL)
    assert first.weights_sha256 == second.weights_sha256
    for change in (
        lambda model: model.bn1.running_var[3].add_(1e-6),
        lambda model: model.bn1.num_batches_tracked.add_(1),
        lambda model: setattr(model, "bn1", model.layer1[0].bn1.__class__(64, affine=False)),
        lambda model: model.bfloat16(),
    ):
        other = open_source("random:resnet18", SMALL)
        with torch.no_grad():
            change(other.backbone)
        assert other.weights_sha256 != first.weights_sha256

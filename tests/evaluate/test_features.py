"""Features come from a frozen encoder, which stays as it was."""

import pytest
import torch
from torch import nn

from caco_fast.errors import UserError
from caco_fast.evaluate import extract_features


def loader(batches: int = 3) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 6, generator=generator), torch.arange(4, dtype=torch.int32), 10 * number + torch.arange(4))
        for number in range(batches)
    ]


@pytest.fixture
def encoder() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    made[1].running_mean += 3
    return made


def test_features_are_those_of_evaluation_mode_in_order(encoder: nn.Sequential) -> None:
    features, labels, index = extract_features(encoder, loader(), "cpu")
    with torch.no_grad():
        expected = encoder.eval()(torch.cat([images for images, _, _ in loader()]))
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)
    assert labels.tolist() == [0, 1, 2, 3] * 3 and labels.dtype == torch.int64
    assert index.tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert not features.requires_grad


def test_every_module_gets_its_mode_back_and_no_statistics_move(encoder: nn.Sequential) -> None:
    encoder.train()
    encoder[2].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    extract_features(encoder, loader(), "cpu")
    assert [module.training for module in encoder] == [True, True, False] and encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_mode_comes_back_after_an_error(encoder: nn.Sequential) -> None:
    with pytest.raises(RuntimeError):
        extract_features(encoder, [(torch.zeros(2, 7), torch.zeros(2), torch.zeros(2))], "cpu")
    assert encoder.training


def test_features_have_the_dtype_that_autocast_computes(encoder: nn.Sequential) -> None:
    autocast = torch.autocast("cpu", torch.bfloat16)
    low, _, _ = extract_features(encoder, loader(), "cpu", autocast)
    full, _, _ = extract_features(encoder, loader(), "cpu")
    assert low.dtype == torch.bfloat16
    assert 0 < (low.float() - full).abs().max() < 0.1


def test_no_images_is_one_line(encoder: nn.Sequential) -> None:
    with pytest.raises(UserError, match="found no images"):
        extract_features(encoder, [], "cpu")


def test_a_first_batch_that_lost_images_is_no_limit(encoder: nn.Sequential) -> None:
    batches = loader(5)
    batches[0] = tuple(part[:1] for part in batches[0])
    features, labels, index = extract_features(encoder, batches, "cpu")
    expected = encoder.eval()(torch.cat([images for images, _, _ in batches]))
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)
    assert len(labels) == len(index) == 17

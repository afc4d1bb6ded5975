"""CaCo in the style of lightly's examples: python examples/lightly_loop.py (needs: pip install lightly)

The criterion takes the place of lightly's `NTXentLoss`, and the bank that of its memory bank. The images are those of
CIFAR-10, which torchvision downloads into data/.

Legend: B images of a batch, C = 128 channels of an embedding.
"""

import copy
from collections.abc import Iterable

import torch
import torchvision
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn.functional import normalize

from caco_fast import CaCoLoss, LearnableBank


class CaCo(nn.Module):
    """Backbone and projection head, and the moving averages of both, which make the keys."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = MoCoProjectionHead(512, 512, 128)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, C], queries
        return normalize(self.projection_head(self.backbone(x).flatten(start_dim=1)), dim=1)

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, C], keys
        return normalize(self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)), dim=1)


def build_dataloader() -> Iterable:
    """Batches of ((view_a, view_b), labels), as lightly's transforms make them."""
    transform = MoCoV2Transform(input_size=32, gaussian_blur=0.0)
    dataset = torchvision.datasets.CIFAR10("data", download=True, transform=transform)
    return torch.utils.data.DataLoader(dataset, batch_size=256, shuffle=True, drop_last=True, num_workers=8)


def train(dataloader: Iterable, epochs: int = 10, bank_size: int = 4096) -> tuple[CaCo, LearnableBank, float]:
    """Returns the model, the bank and the last loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CaCo(nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])).to(device)
    bank = LearnableBank(size=bank_size, dim=128).to(device)
    criterion = CaCoLoss(bank, temperature=0.1, bank_temperature=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    next_row, mean = 0, float("nan")
    for epoch in range(epochs):
        momentum = cosine_schedule(epoch, epochs, 0.99, 1)
        total, steps = 0.0, 0
        for (view_a, view_b), *_ in dataloader:
            view_a, view_b = view_a.to(device), view_b.to(device)
            q_a, q_b = model(view_a), model(view_b)
            update_momentum(model.backbone, model.backbone_momentum, m=momentum)
            update_momentum(model.projection_head, model.projection_head_momentum, m=momentum)
            k_a, k_b = model.forward_momentum(view_a), model.forward_momentum(view_b)
            if next_row < bank.size:
                # The first keys replace the random rows that the bank starts from.
                next_row = bank.fill(k_a, start=next_row)
            loss = criterion(q_a, q_b, k_a, k_b)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            bank.step(lr=1.0)
            total, steps = total + loss.detach(), steps + 1
        mean = float(total / steps)
        print(f"epoch {epoch + 1} | loss {mean:.3f}")
    return model, bank, mean


if __name__ == "__main__":
    train(build_dataloader())

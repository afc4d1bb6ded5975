"""Train an encoder of your own with CaCo, in a plain PyTorch loop: python examples/own_loop.py

The images are the embedded Fashion-MNIST subset; 39 steps take half a minute on a CPU. What CaCo adds to an ordinary
loop is marked with (1) to (5): a bank, a criterion, a key encoder, the bank's first rows and the bank's step.

Legend: B = 256 images, K = 1024 bank rows, C = 64 channels of an embedding.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from caco_fast import CaCoLoss, LearnableBank
from caco_fast.data import DataConfig, ViewConfig, build_train_loader

BATCH = 256


def build_encoder() -> nn.Module:
    """A small convolutional network: [B, 1, 28, 28] to [B, 64]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 64),
    )


@torch.no_grad()
def follow(key_encoder: nn.Module, encoder: nn.Module, momentum: float = 0.99) -> None:
    """The exponential moving average g <- m g + (1 - m) f."""
    for average, value in zip(key_encoder.parameters(), encoder.parameters()):
        average.lerp_(value, 1 - momentum)


def embed(encoder: nn.Module, view: Tensor) -> Tensor:  # [B, 1, 28, 28] -> [B, C]
    return normalize(encoder(view), dim=1)


def train(seed: int = 0) -> list[dict[str, float]]:
    """One epoch; returns loss and mean probability of the chosen positives of every step."""
    torch.manual_seed(seed)
    encoder = build_encoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)

    # (1) The bank: a module whose state_dict holds its rows and their velocity.
    bank = LearnableBank(size=1024, dim=64)
    # (2) The criterion finds the positive of every query in the bank, and records what the bank's step needs.
    criterion = CaCoLoss(bank, temperature=0.1, bank_temperature=0.1)
    # (3) The key encoder: a copy that follows the encoder and gets no gradient.
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)

    two_views = [ViewConfig(count=2, size=28, blur_p=0.0)]
    loader = build_train_loader(DataConfig(source="embedded"), two_views, batch_size=BATCH, seed=seed)
    history: list[dict[str, float]] = []
    for step, batch in enumerate(loader.batches(epoch=0)):
        view_a, view_b = batch.views
        q_a, q_b = embed(encoder, view_a), embed(encoder, view_b)
        follow(key_encoder, encoder)
        with torch.no_grad():
            k_a, k_b = embed(key_encoder, view_a), embed(key_encoder, view_b)

        if step < bank.size // BATCH:
            # (4) The bank starts from random rows, which resemble no image: the keys of 4 batches replace them.
            bank.fill(k_a, start=BATCH * step)

        loss = criterion(q_a, q_b, k_a, k_b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # (5) The bank's step comes after the optimiser's. It uses the rows that the criterion recorded.
        bank.step(lr=0.1)

        history.append({"loss": loss.item(), "positive": criterion.positive_probability.item()})
        print(f"step {step + 1} | loss {history[-1]['loss']:.3f} | positive {history[-1]['positive']:.4f}")
    loader.close()
    return history


if __name__ == "__main__":
    train()

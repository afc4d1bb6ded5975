"""A run small enough for a test: 40 image files of two classes, a narrow ResNet, a bank of a prime number of rows."""

from pathlib import Path

import numpy as np
from PIL import Image

from caco_fast.config import Config, load_config

SETTINGS = (
    "data.source=folder",
    "data.loader=torchvision",
    "data.workers=0",
    "views=[{size: 32, blur_p: 0.5}, {size: 32, blur_p: 0.1, solarize_p: 0.2}]",
    "backbone.name=resnet18",
    "backbone.stem=small_stride2",
    "backbone.options={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], zero_init_last: false}",
    "projector={layers: 2, hidden: 16, dim: 16}",
    "caco.bank_size=37",
    "adco.bank_size=37",
    "moco.queue_size=37",
    "optimizer={name: lars, lr: 0.3, scale_lr: false}",
    "schedule.warmup_epochs=1",
    "trainer={epochs: 2, batch_size: 8, precision: f32, device: cpu, cpu_threads: 1, log_every: 1}",
    "evaluation={every_epochs: 1, k: [3, 5], batch_size: 16}",
    "run.plain=true",
    "run.tensorboard=false",
    "run.report=false",
)


def write_images(folder: Path, train: int = 20, test: int = 5, size: int = 40) -> Path:
    """Write `train` and `test` images of each of two classes: smooth blobs in warm or cold colours."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for label, tint in (("cold", (60, 90, 200)), ("warm", (210, 120, 50))):
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(count):
                small = rng.integers(0, 90, (5, 5, 3)) + np.array(tint)
                pixels = np.clip(small, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(place / f"{i:03d}.png")
    return folder


def config(images: Path, *overrides: str) -> Config:
    return load_config(None, [*SETTINGS, f"data.path={images}", *overrides])

"""Lists of tensors for the tests of EMA and LARS: sizes about the borders of chunks, layouts and alignments."""

import torch
from torch import Tensor

CHUNK = 16384

SHAPES = (
    (3, 5), (7,), (), (0, 4), (1, 1), (255,), (CHUNK,), (2, CHUNK // 2), (CHUNK + 3,), (3, CHUNK - 1), (0,),
    (4, 6, 3, 3),
)  # fmt: skip


def make(generator: torch.Generator, device: torch.device, misaligned: bool = False) -> list[Tensor]:
    """One tensor of every shape, f32; the four-dimensional one is channels_last. With `misaligned` none of them begins
    at a multiple of 16 bytes."""
    tensors = []
    for shape in SHAPES:
        values = torch.randn(shape, generator=generator)
        room = torch.zeros(values.numel() + 1)[1:] if misaligned else torch.zeros(values.numel())
        if values.ndim == 4:
            n, c, h, w = shape
            placed = room.view(n, h, w, c).permute(0, 3, 1, 2)
        else:
            placed = room.view(shape)
        if device.type != "cpu":
            # A copy to the device would drop the offset into the storage.
            whole = torch.zeros(values.numel() + 1, device=device)
            placed = whole[int(misaligned) :].as_strided(placed.shape, placed.stride())
        placed.copy_(values)
        tensors.append(placed)
    return tensors


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def flag(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)

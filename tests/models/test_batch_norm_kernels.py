"""torch's SyncBatchNorm kernels against the formulas: their calls here, the kernels themselves on a GPU.

Legend: S segments, B rows of each, C channels.
"""

import pytest
import torch
from torch import Tensor

from caco_fast.models.batch_norm_kernels import CudaKernels, Formulas, Running

S, B, C = 3, 6, 5
SHAPES = {"rows": (S * B, C), "maps": (S * B, C, 4, 7), "maps, channels last": (S * B, C, 4, 7)}


def inputs(kind: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layout = torch.channels_last if "last" in kind else torch.contiguous_format
    x, dy = (torch.randn(SHAPES[kind], generator=generator).to(device, dtype, memory_format=layout) for _ in range(2))
    x[:, 0] = 2.0  # a constant channel
    values = {"weight": (C,), "bias": (C,), "mean": (S, C), "inverse": (S, C), "sums": (2, S, C)}
    drawn = {name: torch.rand(shape, generator=generator).to(device, wide) for name, shape in values.items()}
    return {"x": x, "dy": dy, "count": torch.full((S, 1), 500.0, device=device, dtype=wide), **drawn}


def passes(kernels: type, x, dy, weight, bias, mean, inverse, sums, count) -> list[Tensor]:
    # Two ranks of as many values, which bring x and dy.
    sent = [kernels.moments(part, S, mean.dtype, 1e-5) for part in (x, dy)]
    means, spreads = (torch.stack(values) for values in zip(*sent))
    counts = torch.full((2, S, 1), float(x.numel() // (S * C)), device=x.device, dtype=mean.dtype)
    counts[1] += 3
    running = Running(mean[0].clone(), inverse[0].clone(), 0.1)
    merged = kernels.merge(x, means, spreads, counts, running, 1e-5)
    if merged.variance is not None:
        for segment_mean, variance, n in zip(merged.mean, merged.variance, merged.count):
            running.mean.lerp_(segment_mean, running.momentum)
            running.variance.lerp_(variance * n / (n - 1), running.momentum)
    return [
        *merged[:3],
        *running[:2],
        kernels.normalise(x, weight, bias, mean, inverse, 1e-5),
        kernels.normalise(x, weight, bias, mean[:1], inverse[:1], 1e-5),
        kernels.sums(dy, x, mean, inverse),
        kernels.input_gradient(dy, x, weight, mean, inverse, sums, count),
        kernels.input_gradient(dy, x, weight, mean[:1], inverse[:1], sums[:, :1], count[:1]),
    ]


def channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


class SyncKernels:
    """What torch's kernels are documented to do, for one segment."""

    @staticmethod
    def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        x, means, inverses, running_mean, running_var, momentum, eps, counts
    ) -> tuple[Tensor, Tensor]:
        assert means.shape == inverses.shape == (len(counts), x.shape[1]) and counts.dtype == running_mean.dtype
        share, n = counts[:, None] / counts.sum(), counts.sum()
        mean = (share * means).sum(0)
        variance = (share * (inverses**-2 - eps + (means - mean) ** 2)).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * n / (n - 1), momentum)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(x, weight, bias, mean, inverse, eps, out=None) -> Tensor:
        y = (x - channel(mean, x)) * channel(inverse * weight, x) + channel(bias, x)
        if out is None:
            return y
        assert out.stride() == x.stride()
        return out.copy_(y)

    @staticmethod
    def batch_norm_backward_reduce(dy, x, mean, inverse, weight, input_g, weight_g, bias_g) -> tuple[Tensor, ...]:
        axes = [0, *range(2, x.dim())]
        return dy.sum(axes), (dy * (x - channel(mean, x))).sum(axes), None, None

    @staticmethod
    def batch_norm_backward_elemt(dy, x, mean, inverse, weight, sum_dy, sum_dy_xmu, count) -> Tensor:
        assert count.dtype == torch.int32 and count.dim() == 1
        along = (x - channel(mean, x)) * channel(inverse**2 * sum_dy_xmu / count.sum(), x)
        return (dy - channel(sum_dy / count.sum(), x) - along) * channel(weight * inverse, x)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_calls_of_torchs_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in vars(SyncKernels).items():
        if isinstance(function, staticmethod):
            monkeypatch.setattr(torch, name, function.__func__)
    given = inputs(kind, torch.float64)
    for found, wanted in zip(passes(CudaKernels, **given), passes(Formulas, **given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_torchs_kernels_do_what_the_formulas_say(kind: str, dtype: torch.dtype) -> None:
    given = inputs(kind, dtype, "cuda")
    wanted = passes(Formulas, **{name: value.double() for name, value in given.items()})
    for found, exact in zip(passes(CudaKernels, **given), wanted, strict=True):
        bound = 2 * torch.finfo(found.dtype).eps * exact.abs() + 100 * torch.finfo(given["mean"].dtype).eps
        assert ((found.double() - exact).abs() <= bound).all()

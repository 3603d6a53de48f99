"""Convolutions on the plane with GL+(2) or SL(2), by sampled group elements and kernels that are small networks.

Source: arXiv 2310.11366 and its code: SIREN kernels on a masked grid, elements drawn again at every forward pass.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.backends.geometry.matrix_groups import (
    VARIANCE,
    Group,
    GroupSamples,
    coordinates,
    effective_sample_size,
    sample_group,
    split_det,
    xi_inv,
)
from llmcompress.errors import InputError

HIDDEN, OMEGA = 60, 10.0


class SirenKernel(nn.Module):
    """A kernel as a function of `dimensions` coordinates: (..., dimensions) -> (..., out), two hidden layers of
    sines."""

    def __init__(self, dimensions: int, out: int, fan_in: int, generator: torch.Generator | None = None) -> None:
        """fan_in: values that the kernel multiplies for one output, for the scale of its outputs."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((dimensions, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, out)))
        bounds = (1 / dimensions, math.sqrt(6 / HIDDEN) / OMEGA, math.sqrt(6 / HIDDEN) / math.sqrt(fan_in))
        with torch.no_grad():
            for layer, bound in zip(self.layers, bounds, strict=True):
                layer.weight.uniform_(-bound, bound, generator=generator)  # type: ignore[operator]
                layer.bias.uniform_(-bound, bound, generator=generator)  # type: ignore[operator]

    def forward(self, points: Tensor) -> Tensor:
        first, second, last = self.layers
        hidden: Tensor = torch.sin(OMEGA * first(points))
        return last(torch.sin(OMEGA * second(hidden)))


def _grid(size: int, like: Tensor) -> Tensor:
    """Offsets (size², 2) as (x, y) on [-1, 1]², rows first."""
    axis = torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack((x, y), -1).view(-1, 2)


def _mask(points: Tensor, group: Group) -> Tensor:
    """Of transformed offsets (..., 2): the unit disc, hard for SL and smooth for GL."""
    radius = points.norm(dim=-1)
    return (radius <= 1).to(points) if group == "sl" else torch.sigmoid(2 * (1 - radius))


class _GroupLayer(nn.Module):
    def __init__(self, group: Group, in_channels: int, out_channels: int, kernel_size: int, n_samples: int) -> None:
        super().__init__()
        if min(in_channels, out_channels, kernel_size, n_samples) < 1 or kernel_size % 2 == 0:
            raise InputError(
                "channels, kernel_size and n_samples must be at least 1, kernel_size odd; got "
                f"{in_channels}, {out_channels}, {kernel_size}, {n_samples}"
            )
        self.group, self.in_channels, self.out_channels = group, in_channels, out_channels
        self.kernel_size, self.n_samples = kernel_size, n_samples

    def resample(self, generator: torch.Generator | None = None, sigma: float = VARIANCE**0.5) -> GroupSamples:
        """New group elements for this layer and those after it."""
        return sample_group(self.n_samples, 2, self.group, sigma, generator=generator)


class LiftConv2d(_GroupLayer):
    """Images (B, C_in, H, W) and N group elements -> (B, C_out, N, H', W'), no padding. O(B N C_in C_out k² H' W')."""

    def __init__(
        self,
        group: Group,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        n_samples: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(group, in_channels, out_channels, kernel_size, n_samples)
        self.kernel = SirenKernel(2, out_channels * in_channels, in_channels * kernel_size**2, generator)

    def forward(self, x: Tensor, samples: GroupSamples) -> Tensor:
        inverse = samples.g_inv.to(x)
        points = torch.einsum("nij,pj->npi", inverse, _grid(self.kernel_size, x))
        scale = torch.linalg.det(inverse)[:, None] * _mask(points, self.group)
        kernels = self.kernel(points) * scale[..., None]  # (N, k², C_out C_in)
        k, count = self.kernel_size, len(inverse)
        kernels = kernels.view(count, k, k, self.out_channels, self.in_channels).permute(3, 0, 4, 1, 2)
        found = F.conv2d(x, kernels.reshape(-1, self.in_channels, k, k))
        return found.view(len(x), self.out_channels, count, *found.shape[2:])


class GroupConv2d(_GroupLayer):
    """Functions on positions and N group elements, (B, C_in, N, H, W) -> (B, C_out, N, H, W), zero-padded.

    weighted: the mean over samples uses their importance weights, as invariance asks; the paper's code does not.
    O(B N² C_in C_out k² H W).
    """

    def __init__(
        self,
        group: Group,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        n_samples: int,
        weighted: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(group, in_channels, out_channels, kernel_size, n_samples)
        self.weighted = weighted
        dimensions = 2 + 4 - (group == "sl")
        self.kernel = SirenKernel(dimensions, out_channels * in_channels, in_channels * kernel_size**2, generator)

    def forward(self, x: Tensor, samples: GroupSamples) -> Tensor:
        inverse, count, k = samples.g_inv, len(samples.g), self.kernel_size
        relative = inverse[:, None] @ samples.g  # (N, N, 2, 2): row g, column g~
        if self.group == "sl":
            relative = split_det(relative)[1]
        algebra = coordinates(xi_inv(relative), self.group).to(x)
        points = torch.einsum("nij,pj->npi", inverse.to(x), _grid(k, x))
        joined = torch.cat(
            (
                points[:, None].expand(-1, count, -1, -1),
                algebra[:, :, None].expand(-1, -1, k * k, -1),
            ),
            -1,
        )
        weights = torch.linalg.det(inverse) / count
        if self.weighted:
            weights = weights * samples.weights
            effective_sample_size(weights)
        scale = _mask(points, self.group)[:, None] * weights.to(x)[None, :, None]
        kernels = self.kernel(joined) * scale[..., None]  # (N, N~, k², C_out C_in)
        kernels = kernels.view(count, count, k, k, self.out_channels, self.in_channels).permute(4, 0, 5, 1, 2, 3)
        kernels = kernels.reshape(self.out_channels * count, self.in_channels * count, k, k)
        found = F.conv2d(x.flatten(1, 2), kernels, padding=k // 2)
        return found.view(len(x), self.out_channels, count, *found.shape[2:])


class _Residual(nn.Module):
    def __init__(self, group: Group, channels: int, n_samples: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(GroupConv2d(group, channels, channels, 5, n_samples) for _ in range(2))

    def forward(self, x: Tensor, samples: GroupSamples) -> Tensor:
        y = x
        for convolution in self.convolutions:
            y = convolution(F.gelu(F.layer_norm(y, y.shape[1:])), samples)
        return x + y


class GroupResNet(nn.Module):
    """Images (B, C_in, H, W) -> logits (B, classes): lifted, residual blocks with pooling, global maximum, a head.

    New group elements are drawn at every forward pass, in training and evaluation, by `resample`.
    """

    def __init__(
        self, group: Group, in_channels: int, classes: int, channels: int = 40, n_samples: int = 10, blocks: int = 2,
        sigma: float = VARIANCE**0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sigma = sigma
        self.lift = LiftConv2d(group, in_channels, channels, 5, n_samples)
        self.blocks = nn.ModuleList(_Residual(group, channels, n_samples) for _ in range(blocks))
        self.head = nn.Sequential(nn.Linear(channels, 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, classes))

    def resample(self, generator: torch.Generator | None = None) -> GroupSamples:
        return self.lift.resample(generator, self.sigma)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if generator is None:  # another draw at every pass, reproducible from torch's own seed
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        samples = self.resample(generator)
        y = self.lift(x, samples)
        for block in self.blocks:
            y = F.max_pool3d(block(y, samples), (1, 2, 2))
        logits: Tensor = self.head(y.amax((2, 3, 4)))
        return logits

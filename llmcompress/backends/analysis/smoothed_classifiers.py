"""Classifiers under Gaussian noise, of the whole input or of two halves, and what sampling them certifies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.backends.analysis.smoothing_certificates import (
    check_alpha,
    check_sigma,
    check_sigmas,
    clopper_pearson,
    dual_radius,
    smoothed_radius,
)
from llmcompress.errors import InputError, RunError

Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Certificate:
    """The class `label` (-1: none is certain) within an l2 distance `radius` of the input, wrong with chance alpha.

    p_l, p_r: lower bounds of its probability in both halves; p_r is None where the whole input is smoothed. n: draws
    (a half) that the bounds rest on.
    """

    label: int
    radius: float
    p_l: float
    p_r: float | None
    n: int
    alpha: float


# --- halves ----------------------------------------------------------------------------------------------------------


def checkerboard(h: int, w: int) -> Tensor:
    """(h, w) bool: one colour of a checkerboard, its first corner included."""
    return (torch.arange(h)[:, None] + torch.arange(w)) % 2 == 0


def even_odd(d: int) -> Tensor:
    """(d,) bool: the coordinates 0, 2, 4..."""
    return torch.arange(d) % 2 == 0


def fill_neighbours(x: Tensor, mask: Tensor) -> Tensor:
    """Images x (..., h, w) whose pixels outside `mask` (h, w) become the mean of their kept neighbours, of up to four.

    Nothing outside the mask is read. InputError if a missing pixel has no kept neighbour.
    """
    kept = mask.to(x.dtype)
    padded = torch.nn.functional.pad(torch.where(mask, x, 0), (1, 1, 1, 1))
    counts = torch.nn.functional.pad(kept, (1, 1, 1, 1))

    def neighbours(of: Tensor) -> Tensor:
        return of[..., :-2, 1:-1] + of[..., 2:, 1:-1] + of[..., 1:-1, :-2] + of[..., 1:-1, 2:]

    number = neighbours(counts)
    if bool(((number == 0) & ~mask).any()):
        raise InputError("the mask leaves a pixel without any kept neighbour to fill it from")
    return torch.where(mask, x, neighbours(padded) / number.clamp_min(1))


# --- classifiers -----------------------------------------------------------------------------------------------------


class _Smoothed(ABC):
    """Draws predictions under noise: what both kinds of classifier share."""

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise InputError(f"num_classes must be at least 2; got {num_classes}")
        self.num_classes = num_classes

    @abstractmethod
    def certify(self, x: Tensor) -> Certificate:
        """The class of one input and the radius within which it holds."""

    def predict(self, x: Tensor, **options: Any) -> int:
        """The label of `certify` with these options."""
        return self.certify(x, **options).label

    def _counts(
        self, f: Classifier, x: Tensor, sigma: float, n: int, batch_size: int, generator: torch.Generator
    ) -> Tensor:
        """How often each class wins, (num_classes,) int64, over n draws of noise on x."""
        counts = torch.zeros(self.num_classes, dtype=torch.int64)
        for start in range(0, n, batch_size):
            size = (min(batch_size, n - start), *x.shape)
            noise = torch.randn(size, generator=generator, dtype=x.dtype, device=x.device)
            with torch.no_grad():
                logits = f(x + sigma * noise)
            if logits.shape != (size[0], self.num_classes):
                raise InputError(f"a classifier returned {tuple(logits.shape)} for {size[0]} inputs and "
                                 f"{self.num_classes} classes")  # fmt: skip
            if not torch.isfinite(logits).all():
                raise RunError("a classifier's logits are not finite")
            counts += torch.bincount(logits.argmax(1).cpu(), minlength=self.num_classes)
        return counts


def _check_draws(x: Tensor, n0: int, n: int, alpha: float, batch_size: int) -> None:
    if min(n0, n, batch_size) < 1:
        raise InputError(f"n0, n and batch_size must be at least 1; got {n0}, {n}, {batch_size}")
    check_alpha(alpha)
    if not torch.isfinite(x).all():
        raise InputError("the input is not finite")


class SmoothedClassifier(_Smoothed):
    """Randomised smoothing (arXiv 1902.02918): the class that f: (b, *shape) -> (b, num_classes) gives most often.

    InputError for a sigma that is not positive or fewer than two classes.
    """

    def __init__(self, f: Classifier, num_classes: int, sigma: float) -> None:
        super().__init__(num_classes)
        self.f, self.sigma = f, check_sigma("sigma", sigma)

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 1e-3,
        batch_size: int = 1000,
        generator: torch.Generator | None = None,
    ) -> Certificate:
        """n0 draws choose the class of one input x, n others bound its probability. InputError for bad arguments."""
        _check_draws(x, n0, n, alpha, batch_size)
        generator = generator or torch.Generator(device=x.device).manual_seed(0)
        label = int(self._counts(self.f, x, self.sigma, n0, batch_size, generator).argmax())
        k = int(self._counts(self.f, x, self.sigma, n, batch_size, generator)[label])
        p = float(clopper_pearson(k, n, alpha))
        radius = float(smoothed_radius(p, self.sigma))
        return Certificate(label if radius > 0 else -1, radius, p, None, n, alpha)


class DualSmoothedClassifier(_Smoothed):
    """The class with the largest sum of probabilities in two halves (arXiv 2404.09586).

    mask: true where the left half is. A mask (d,): f_l gets the coordinates (b, m) that it holds, f_r the others. A
    mask (h, w): both get images (b, ..., h, w) whose missing pixels are filled from the half's own, after the noise.
    Neither is ever given anything of the other half. InputError for a mask that is all true or all false, a sigma that
    is not positive, fewer than two classes.
    """

    def __init__(
        self,
        f_l: Classifier,
        f_r: Classifier,
        mask: Tensor,
        num_classes: int,
        sigma_l: float,
        sigma_r: float | None = None,
    ) -> None:
        super().__init__(num_classes)
        if mask.dtype != torch.bool or mask.ndim not in (1, 2):
            raise InputError(f"the mask must be bool, (d,) or (h, w); got {mask.dtype}, {tuple(mask.shape)}")
        if bool(mask.all()) or not bool(mask.any()):
            raise InputError("the mask must give coordinates to both halves")
        self.mask, self.f = mask, (f_l, f_r)
        self.sigma = check_sigmas(sigma_l, sigma_r)

    def half(self, x: Tensor, right: bool) -> Tensor:
        """What a half is given of x (..., *mask.shape): its coordinates (..., m); images with the others zero."""
        mask = ~self.mask if right else self.mask
        return x[..., mask] if mask.ndim == 1 else torch.where(mask, x, 0)

    def _classifier(self, right: bool) -> Classifier:
        f, mask = self.f[right], ~self.mask if right else self.mask
        return f if mask.ndim == 1 else lambda images: f(fill_neighbours(images, mask))

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 1e-3,
        batch_size: int = 1000,
        generator: torch.Generator | None = None,
    ) -> Certificate:
        """n0 draws a half choose the class of one input x; n others a half bound its probabilities, at alpha / 2 each.

        InputError for bad arguments or an x whose shape does not end in the mask's.
        """
        _check_draws(x, n0, n, alpha, batch_size)
        if x.shape[-self.mask.ndim :] != self.mask.shape:
            raise InputError(f"the input has shape {tuple(x.shape)}, the mask {tuple(self.mask.shape)}")
        generator = generator or torch.Generator(device=x.device).manual_seed(0)

        def counts(draws: int) -> list[Tensor]:
            return [
                self._counts(self._classifier(right), self.half(x, right), sigma, draws, batch_size, generator)
                for right, sigma in zip((False, True), self.sigma, strict=True)
            ]

        label = int(torch.stack(counts(n0)).sum(0).argmax())
        p_l, p_r = (float(clopper_pearson(int(found[label]), n, alpha / 2)) for found in counts(n))
        radius = float(dual_radius(p_l, p_r, *self.sigma))
        return Certificate(label if radius > 0 else -1, radius, p_l, p_r, n, alpha)

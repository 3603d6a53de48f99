"""Whether a tensor holds numbers only."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """Of a real tensor of any shape: its extremes are NaN if any value is, and one pass without copies finds them."""
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())

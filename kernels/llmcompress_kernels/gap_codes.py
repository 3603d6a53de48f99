"""Gap codes: the run form of column-sparse codes for one row on a GPU.

A stored value has 14 bits or fewer. The 2 bits left of its 16-bit word say how many atoms further on it stands,
1 to 4. A longer way is walked by words of value zero; where half of the atoms are marked that is one word in 15. So a
thread follows one output with one addition a value and no mask, and 2.13 bytes a value are read where a mask and 16-bit
values take 2.25.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALUE_BITS = 14


def encode(indices: Tensor, values: Tensor, atoms: int) -> tuple[Tensor, Tensor] | None:
    """words (L, d_out) int64, four of an output's 16-bit words in each, L of them; starts (parts, d_out) int16.

    indices (d_out, s) int64 ascending, below atoms; values (d_out, s) bfloat16 whose last two bits are zero. Part t
    begins at words[t ceil(L / parts)]; starts[t] is the atom before it. Words after an output's last have value zero
    and go on by one atom each, so that the product reads up to `width` coordinates of z: zeros after the last atom.
    None where the codes are too sparse for this form: more than one word in three would be a filler.
    """
    d_out, s = values.shape
    parts = 16 if d_out >= 8192 else 32  # threads an output: enough to keep a large GPU busy
    steps = indices.diff(dim=1, prepend=indices.new_full((d_out, 1), -1))
    fillers = (steps - 1) // 4
    ends = (fillers + 1).cumsum(1)
    packs = -(-int(ends[:, -1].max()) // 4)
    if 2 * (4 * packs - s) > s + 16 or atoms + 4 * packs - s + 12 > width(atoms) or width(atoms) > 1 << 15:
        return None
    each = -(-packs // parts)
    advance = torch.full((d_out, 4 * packs), 4, dtype=torch.int64, device=values.device)
    advance[torch.arange(4 * packs, device=values.device) >= ends[:, -1:]] = 1
    advance.scatter_(1, ends - 1, steps - 4 * fillers)
    words = torch.zeros_like(advance).scatter_(1, ends - 1, values.view(torch.int16).long() & 0xFFFC)
    words += advance - 1
    before = torch.cat((advance.new_full((d_out, 1), -1), advance.cumsum(1) - 1), 1)
    first = (4 * each * torch.arange(parts, device=values.device)).clamp(max=4 * packs)
    packed = (words.view(d_out, -1, 4) << torch.arange(0, 64, 16, device=values.device)).sum(-1)
    return packed.T.contiguous(), before[:, first].T.to(torch.int16).contiguous()


def width(atoms: int) -> int:
    """Coordinates of z that the product may read: those of the atoms, and as many zeros as codes may go on."""
    return atoms + atoms // 2 + 32


@torch.library.custom_op("llmcompress::gap_expand", mutates_args=(), device_types="cpu")
def gap_expand(z: Tensor, words: Tensor, starts: Tensor) -> Tensor:
    """z S in z's dtype for z (rows, width), codes as `encode` makes them: (rows, d_out). Not differentiable."""
    return reference(z, words, starts).to(z.dtype)


@gap_expand.register_kernel("cuda")
def _(z: Tensor, words: Tensor, starts: Tensor) -> Tensor:
    from llmcompress_kernels import gpu

    return gpu.gap_expand(z, words, starts)


@gap_expand.register_fake
def _(z: Tensor, words: Tensor, starts: Tensor) -> Tensor:
    return z.new_empty(len(z), words.shape[1])


def reference(z: Tensor, words: Tensor, starts: Tensor) -> Tensor:
    """z S in float32 for z (rows, width)."""
    d_out = words.shape[1]
    spread = (words.T[:, :, None] >> torch.arange(0, 64, 16, device=words.device)).reshape(d_out, -1) & 0xFFFF
    positions = ((spread & 3) + 1).cumsum(1) - 1
    values = ((spread & 0xFFFC) << 16).to(torch.int32).view(torch.float32)
    return torch.stack([(row.float()[positions] * values).sum(1) for row in z])

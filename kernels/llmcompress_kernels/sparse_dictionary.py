"""Sparse dictionary, y = (x D) S: a dictionary D (d_in, k) and s values for each output, at the atoms its mask marks.

Bytes read for few rows: 2 d_in k of D in bfloat16, k / 8 of the mask and 2 s of the values an output. Source: CoSpaDi,
arXiv 2509.22075; the storage by mask is this project's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress_kernels import cpu, dispatch, gap_codes, layout
from llmcompress_kernels.checks import check_input, check_matrix, check_shape
from llmcompress_kernels.shared import cast, shared_product, traced_product


def marked(mask: Tensor, atoms: int) -> Tensor:
    """(d_out, atoms) bool of a mask (d_out, ceil(atoms / 8)) uint8, lowest bit first."""
    bits = mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits & 1).bool().flatten(1)[:, :atoms]


def dense_codes(mask: Tensor, values: Tensor, atoms: int) -> Tensor:
    """S transposed, (d_out, atoms) in the dtype of values (d_out, s), which are in ascending order of atoms."""
    return values.new_zeros(len(values), atoms).masked_scatter(marked(mask, atoms), values)


def reference(x: Tensor, dictionary: Tensor, mask: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, in torch's own operations and x's dtype."""
    return F.linear(x @ dictionary.to(x.dtype), dense_codes(mask, values.to(x.dtype), dictionary.shape[1]), bias)


@torch.library.custom_op("llmcompress::sparse_expand", mutates_args=(), device_types="cpu")
def sparse_expand(z: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """z S for z (rows, k): (rows, d_out) in z's dtype."""
    if values.dtype != torch.bfloat16 or not cpu.supports(z, values):
        return F.linear(z, dense_codes(mask, values.to(z.dtype), z.shape[1]))
    padded = F.pad(z.float(), (0, -z.shape[1] % 8))
    return cpu.expand(padded, mask.contiguous(), values.contiguous()).to(z.dtype)


@sparse_expand.register_kernel("cuda")
def _(z: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    return F.linear(z, dense_codes(mask, values.to(z.dtype), z.shape[1]))


@sparse_expand.register_fake
def _(z: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    return z.new_empty(len(z), len(values))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    z, mask, values = ctx.saved_tensors
    codes = dense_codes(mask, values.to(grad.dtype), z.shape[1])
    return grad @ codes, None, (grad.T @ z)[marked(mask, z.shape[1])].view_as(values).to(values.dtype)


sparse_expand.register_autograd(_backward, setup_context=_setup)


def sparse_dictionary_linear(
    x: Tensor,
    dictionary: Tensor,
    mask: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
    gaps: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x D S + bias.

    x (..., d_in), any strides; dictionary (d_in, k) of x's dtype or bfloat16; mask (d_out, ceil(k / 8)) uint8, one bit
    an atom, lowest bit first, exactly s of them set in each row; values (d_out, s) of a floating dtype, by ascending
    atom; bias (d_out,). dense (d_out, d_in): the product as a weight, which takes over for many rows; without it the
    codes are made dense at each call. gaps: the same codes as `gap_codes.encode` makes them, which a GPU reads for one
    row without gradients. Accumulates in float32. Differentiable in x, dictionary, values and bias. Few rows are
    fastest with a dictionary as `layout.arranged` gives it.
    ValueError naming the argument if shapes, dtypes or devices do not fit.
    """
    _check(x, dictionary, mask, values, bias, dense)
    if gaps is not None and (gaps[0].dtype, gaps[1].dtype) != (torch.int64, torch.int16):
        raise ValueError(f"gaps: must be int64 words and int16 starts; got {gaps[0].dtype} and {gaps[1].dtype}")
    return sparse_dictionary_forward(x, layout.checked(dictionary), mask, values, bias, dense, gaps)


def sparse_dictionary_forward(
    x: Tensor,
    dictionary: Tensor,
    mask: Tensor,
    values: Tensor | None,
    bias: Tensor | None,
    dense: Tensor | None,
    gaps: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`sparse_dictionary_linear` for a caller whose tensors are known to fit, mask and values contiguous.

    values: None where a GPU has `dense` and `gaps`.
    """
    path = dispatch.plan("sparse_dictionary", x.numel() // x.shape[-1], x.device.type, x.dtype)
    eager = dispatch.eager(x)
    if x.is_cuda and (gaps is None or (torch.is_grad_enabled() and x.requires_grad)):
        path = "library"
    if path == "library" or (eager and x.device.type == "cpu" and not cpu.supports(x, dictionary)):
        if dense is not None:
            return F.linear(x, dense, bias)
        assert values is not None
        if torch.is_autocast_enabled(x.device.type):
            x, dictionary = cast(x, dictionary)
        z = shared_product(x, dictionary, path) if eager else traced_product(x, dictionary, path)
        y = F.linear(z.to(x.dtype), dense_codes(mask, values.to(x.dtype), z.shape[1]), bias)
        return y.view(x.shape[:-1] + y.shape[1:])
    if gaps is not None and x.is_cuda:
        width = gap_codes.width(dictionary.shape[1])
        z = shared_product(x, dictionary, path, width) if eager else traced_product(x, dictionary, path)
        # padding by nothing would copy z in every sibling
        y = gap_codes.gap_expand(z if z.shape[1] == width else F.pad(z, (0, width - z.shape[1])), *gaps)
    elif not eager:
        assert values is not None
        y = sparse_expand(traced_product(x, dictionary, path), mask, values)
    elif x.device.type == "cpu" and dictionary.stride(0) == 1 and values is not None and values.dtype is torch.bfloat16:
        y = cpu.expand(shared_product(x, dictionary, path), mask, values)
        y = y if y.dtype is x.dtype else y.to(x.dtype)
    else:
        assert values is not None
        z = shared_product(x, dictionary, path)[:, : dictionary.shape[1]]
        y = sparse_expand(z.to(x.dtype), mask, values)
    if x.ndim != 2:
        y = y.view(x.shape[:-1] + y.shape[1:])
    return y if bias is None else y + bias


def _check(
    x: Tensor, dictionary: Tensor, mask: Tensor, values: Tensor, bias: Tensor | None, dense: Tensor | None
) -> None:
    check_matrix("dictionary", dictionary)
    check_input(x, dictionary.shape[0], dictionary, "dictionary")
    check_matrix("values", values)
    d_out, s = values.shape
    d_in, atoms = dictionary.shape
    if dictionary.dtype not in (x.dtype, torch.bfloat16):
        raise ValueError(f"dictionary: dtype must be {x.dtype}, as x has it, or bfloat16; got {dictionary.dtype}")
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (d_out, -(-atoms // 8)):
        raise ValueError(f"mask: must be uint8 ({d_out}, {-(-atoms // 8)}); got {mask.dtype} {tuple(mask.shape)}")
    if not 1 <= s <= atoms:
        raise ValueError(f"values: 1 to {atoms} an output, as many as the dictionary has atoms; got {s}")
    if not torch.compiler.is_compiling() and not (
        marked(mask, atoms).sum(1).eq(s).all() and marked(mask, 8 * mask.shape[1]).sum(1).eq(s).all()
    ):
        raise ValueError(f"mask: each output must have {s} of {atoms} atoms marked")
    check_shape("bias", bias, (d_out,))
    check_shape("dense", dense, (d_out, d_in))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from llmcompress_kernels import gap_codes

from kernels.tests.shapes import SETTINGS, SIZES, assert_close, gap_problem, random


@SETTINGS
@given(SIZES, SIZES, st.floats(0.5, 1.0))
def test_words_are_the_codes(atoms, d_out, density):
    index, values, S = gap_problem(d_out, atoms, -(-int(density * atoms) // 1) or 1)
    found = gap_codes.encode(index, values, atoms)
    if found is None:  # few atoms, badly spread
        assert atoms < 32
        return
    z = F.pad(torch.eye(atoms), (0, gap_codes.width(atoms) - atoms))
    assert np.array_equal(gap_codes.reference(z, *found).double().numpy(), S.T)


@pytest.mark.parametrize("d_out", [40, 9000])
def test_starts_are_where_the_parts_begin(d_out):
    index, values, _ = gap_problem(d_out, 200, 100)
    words, starts = gap_codes.encode(index, values, 200)
    assert starts.shape[0] == (16 if d_out > 8192 else 32)
    each = -(-len(words) // len(starts))
    advance = (words.T[:, :, None] >> torch.arange(0, 64, 16) & 3).reshape(d_out, -1) + 1
    for part in range(len(starts)):
        assert torch.equal(starts[part].long(), advance[:, : 4 * each * part].sum(1) - 1)


def test_half_of_the_atoms_takes_less_than_a_mask_and_16_bit_values():
    index, values, _ = gap_problem(64, 2048, 1024)
    words, starts = gap_codes.encode(index, values, 2048)
    assert words.nbytes + starts.nbytes < values.nbytes + 64 * 2048 / 8


@pytest.mark.parametrize(("atoms", "nonzeros"), [(400, 40), (1 << 15, 1 << 14)])
def test_codes_that_the_form_does_not_suit_are_refused(atoms, nonzeros):
    index, values, _ = gap_problem(2, atoms, nonzeros)
    assert gap_codes.encode(index, values, atoms) is None


def test_the_operator_has_a_fake_that_agrees():
    index, values, _ = gap_problem(12, 60, 30)
    z = random(2, gap_codes.width(60))
    torch.library.opcheck(gap_codes.gap_expand, (z, *gap_codes.encode(index, values, 60)))


def test_the_operator_keeps_the_dtype_of_z():
    index, values, S = gap_problem(12, 60, 30)
    z = F.pad(random(2, 60, dtype=torch.bfloat16), (0, gap_codes.width(60) - 60))
    found = gap_codes.gap_expand(z, *gap_codes.encode(index, values, 60))
    assert found.dtype == torch.bfloat16
    assert_close(found, z[:, :60].double().numpy() @ S.T)

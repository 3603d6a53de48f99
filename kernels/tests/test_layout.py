import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmcompress_kernels import layout

from kernels.tests.shapes import SETTINGS, SIZES, random


@SETTINGS
@given(SIZES, SIZES)
def test_columns_in_pieces_keep_the_values_over_a_padded_matrix_of_zeros(d, n):
    weight = random(d, n)
    arranged = layout.arranged(weight)
    assert arranged.stride() == (1, d + -d % 8)
    assert layout.arranged(arranged) is arranged
    assert torch.equal(arranged, weight)
    whole = layout.whole(arranged)
    assert [side % 8 for side in whole.shape] == [0, 0]
    assert torch.equal(whole[:d, :n], weight)
    assert whole.count_nonzero() == weight.count_nonzero()


@SETTINGS
@given(SIZES, SIZES, st.booleans(), st.booleans())
def test_product_takes_either_side_padded(d, n, pad_x, pad_weight):
    x, weight = random(3, d, dtype=torch.float64), random(d, n, seed=1, dtype=torch.float64)
    expected = x @ weight
    if pad_x:
        x = torch.nn.functional.pad(x, (0, -d % 8))
    found = layout.product(x, layout.arranged(weight) if pad_weight else weight)
    torch.testing.assert_close(found[:, :n], expected)
    assert not found[:, n:].any()


@pytest.mark.parametrize("weight", [random(8, 16), random(16, 9).T, random(20, 30)[:8, :16]])
def test_a_weight_without_padding_is_its_own_whole(weight):
    assert layout.whole(weight).shape == weight.shape


def test_only_what_lies_over_zeros_is_taken_as_it_is():
    arranged, rows = layout.arranged(random(5, 7)), random(5, 7)
    assert layout.checked(arranged) is arranged
    assert layout.checked(rows) is rows
    beside = torch.full((8, 8), torch.nan).T[:5, :7].copy_(rows)
    assert beside.stride() == arranged.stride()
    assert layout.checked(beside).is_contiguous()

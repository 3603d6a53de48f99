import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmcompress_kernels import layout

from kernels.tests.shapes import SETTINGS, SIZES, random

ORDERS = st.sampled_from([layout.columns_in_pieces, layout.rows_in_pieces])


@SETTINGS
@given(SIZES, SIZES, ORDERS)
def test_pieces_keep_the_values_over_a_padded_matrix_of_zeros(d, n, order):
    weight = random(d, n)
    arranged = order(weight)
    assert torch.equal(arranged, weight)
    whole = layout.whole(arranged)
    assert [side % 8 for side in whole.shape] == [0, 0]
    assert torch.equal(whole[:d, :n], weight)
    assert whole.count_nonzero() == weight.count_nonzero()


@SETTINGS
@given(SIZES, SIZES, st.booleans(), st.none() | ORDERS)
def test_product_takes_either_side_padded(d, n, pad_x, order):
    x, weight = random(3, d, dtype=torch.float64), random(d, n, seed=1, dtype=torch.float64)
    expected = x @ weight
    if pad_x:
        x = torch.nn.functional.pad(x, (0, -d % 8))
    found = layout.product(x, order(weight) if order else weight)
    torch.testing.assert_close(found[:, :n], expected)
    assert not found[:, n:].any()


@pytest.mark.parametrize("weight", [random(8, 16), random(16, 9).T, random(20, 30)[:8, :16]])
def test_a_weight_without_padding_is_its_own_whole(weight):
    assert layout.whole(weight).shape == weight.shape


def test_a_cpu_gets_rows_back():
    weight = layout.arranged(layout.columns_in_pieces(random(5, 7)))
    assert weight.stride() == (8, 1)
    assert layout.arranged(weight) is weight

import copy
import json

import numpy as np
import pytest
import torch

from llmcompress.compressors.factors import LowRankFactors, _dominant_columns, exchange, pivot
from llmcompress.compressors.ranks import rank_costs, rank_for
from llmcompress.errors import InputError
from llmcompress.layers.low_rank import LowRankLinear, pack_mask, unpack_mask

D_IN, D_OUT, RANK = 13, 21, 5


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pivoted_layer(dtype=torch.float64, shared=None, A=None):
    """Pivots at outputs 1, 4, 8, 16 and 20, so that every byte of the mask is used."""
    mask = torch.zeros(D_OUT, dtype=torch.bool)
    mask[[1, 4, 8, 16, 20]] = True
    A = random(D_IN, RANK, dtype=dtype) if A is None else A
    layer = LowRankLinear.from_factors(
        A, random(RANK, D_OUT - RANK, seed=1, dtype=dtype), random(D_OUT, seed=2, dtype=dtype), mask, shared=shared
    )
    return layer, mask


def dense_oracle(layer, mask, offset=0):
    """The weight put together row by row in numpy: pivot rows are columns of A, the others combinations of them."""
    A, B = layer.A.detach().numpy(), layer.B.detach().numpy()
    weight, own, rest = np.empty((len(mask), len(A))), offset, 0
    for row, is_pivot in enumerate(mask.tolist()):
        if is_pivot:
            weight[row], own = A[:, own], own + 1
        else:
            weight[row], rest = A @ B[:, rest], rest + 1
    return weight


def test_plain_form_is_the_product_plus_bias():
    A, B, bias, x = random(D_IN, RANK), random(RANK, D_OUT, seed=1), random(D_OUT, seed=2), random(3, 4, D_IN, seed=3)
    layer = LowRankLinear.from_factors(A, B, bias)
    np.testing.assert_allclose(layer(x).detach(), x.numpy() @ A.numpy() @ B.numpy() + bias.numpy(), rtol=1e-12)
    np.testing.assert_allclose(layer.to_dense().detach(), (A.numpy() @ B.numpy()).T, rtol=1e-12)
    assert layer.storage_bits == 64 * (A.numel() + B.numel())
    assert layer.flops == 2 * (A.numel() + B.numel())
    assert "pivots" not in layer.state_dict()


def test_pivot_form_puts_every_output_in_its_place():
    layer, mask = pivoted_layer()
    weight, x = dense_oracle(layer, mask), random(2, 3, D_IN, seed=3)
    np.testing.assert_allclose(layer.to_dense().detach(), weight, rtol=1e-12)
    np.testing.assert_allclose(layer(x).detach(), x.numpy() @ weight.T + layer.bias.detach().numpy(), rtol=1e-11)


def test_storage_counts_values_at_their_width_and_the_mask():
    layer, _ = pivoted_layer(torch.bfloat16)
    assert layer.storage_bits == 16 * (D_IN * RANK + RANK * (D_OUT - RANK)) + 24
    assert layer.num_parameters == D_IN * RANK + RANK * (D_OUT - RANK) + D_OUT
    held = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    assert sum(tensor.numel() * tensor.element_size() * 8 for tensor in held.values()) == layer.storage_bits
    assert layer.flops == 2 * (D_IN * RANK + RANK * (D_OUT - RANK))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 65])
def test_mask_is_packed_little_endian(size):
    mask = random(size) > 0
    packed = pack_mask(mask)
    assert packed.tolist() == np.packbits(mask.numpy(), bitorder="little").tolist()
    assert torch.equal(unpack_mask(packed, size), mask)


def test_layer_built_on_meta_from_its_json_spec_gives_the_same_bits():
    layer, _ = pivoted_layer()
    empty = LowRankLinear.from_spec(json.loads(json.dumps(layer.spec())), torch.float64, "meta")
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    for name, tensor in layer.state_dict().items():  # as transformers does: tensor by tensor, then after_load
        kind = empty._parameters if name in empty._parameters else empty._buffers
        kind[name] = torch.nn.Parameter(tensor) if name in empty._parameters else tensor
    empty.index = torch.empty(D_OUT, dtype=torch.int64)
    empty.after_load()
    x = random(4, D_IN, seed=3)
    assert torch.equal(empty(x), layer(x))


def test_load_state_dict_rebuilds_the_index():
    layer, _ = pivoted_layer()
    other = LowRankLinear.from_spec(layer.spec(), torch.float64, "cpu")
    other.load_state_dict(layer.state_dict())
    x = random(4, D_IN, seed=3)
    assert torch.equal(other(x), layer(x))


def test_copies_casts_and_compiled_layers_agree():
    layer, _ = pivoted_layer()
    x = random(4, D_IN, seed=3)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.pivots.dtype == torch.uint8
    assert half.index.dtype == torch.int64
    torch.testing.assert_close(half(x.bfloat16()).double(), layer(x), rtol=0.05, atol=0.3)


def test_gradients_reach_both_factors():
    layer, _ = pivoted_layer()
    x = random(4, D_IN, seed=3)
    assert torch.autograd.gradcheck(
        lambda a, b: torch.func.functional_call(layer, {"A": a, "B": b}, x), (layer.A, layer.B)
    )


def test_layers_that_share_a_basis_own_a_slice_each():
    A = torch.nn.Parameter(random(D_IN, RANK))
    first_mask, second_mask = torch.zeros(D_OUT, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    first_mask[[2, 9]] = True
    second_mask[[0, 3, 7]] = True
    first = LowRankLinear.from_factors(A, random(RANK, D_OUT - 2, seed=1), None, first_mask)
    second = LowRankLinear.from_factors(A, random(RANK, 5, seed=2), None, second_mask, 2, {"A": "first"})
    assert second.A is first.A
    np.testing.assert_allclose(second.to_dense().detach(), dense_oracle(second, second_mask, offset=2), rtol=1e-12)
    x = random(4, D_IN, seed=3)
    torch.testing.assert_close(second(x), x @ second.to_dense().T)
    assert second.storage_bits == 64 * RANK * 5 + 8
    assert second.flops == 2 * RANK * 5
    assert second.num_parameters == RANK * 5
    assert second.spec()["offset"] == 2
    rebuilt = LowRankLinear.from_spec({**second.spec(), "shared": second.shared}, torch.float64, "cpu")
    assert rebuilt.shared == {"A": "first"}


def test_impossible_sizes_and_corrupt_masks_are_refused():
    with pytest.raises(InputError, match=r"rank must be between 1 and d_in = 13; got 14"):
        LowRankLinear(D_IN, D_OUT, 14)
    with pytest.raises(InputError, match=r"4 pivots from 2 on do not fit rank 5"):
        LowRankLinear(D_IN, D_OUT, RANK, pivot_count=4, offset=2)
    with pytest.raises(InputError, match="the factors' ranks differ"):
        LowRankLinear.from_factors(random(D_IN, 4), random(5, D_OUT))
    layer, _ = pivoted_layer()
    layer.pivots[0] = 255
    with pytest.raises(InputError, match=r"corrupt pivot mask: 11 outputs marked, 5 expected"):
        layer.after_load()


# --- the pivot form of given factors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_pivoted_factors_are_the_same_product_with_small_coefficients(seed):
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = (int(size) for size in torch.randint(20, 60, (2,), generator=generator))
    rank = int(torch.randint(1, min(d_in, d_out), (1,), generator=generator))
    scales = torch.logspace(0, -6, rank, dtype=torch.float64)  # balanced factors of an ill-conditioned weight
    A, B = random(d_in, rank, seed=seed) * scales, scales[:, None] * random(rank, d_out, seed=seed + 99)
    factors = LowRankFactors(A, B, torch.ones(rank))
    found, dense = pivot(factors), factors.to_dense()
    assert float((found.to_dense() - dense).abs().max() / dense.abs().max()) < 1e-10
    assert float(found.B.abs().max()) <= 2
    assert found.A.numel() + found.B.numel() == rank * (d_in + d_out - rank)
    single = LowRankLinear.from_factors(found.A.float(), found.B.float(), None, found.pivots)
    assert float((single.to_dense().detach().double() - dense).abs().max() / dense.abs().max()) < 1e-5


def test_an_exchange_updates_the_coefficients_of_all_columns():
    rows = np.random.default_rng(0).normal(size=(5, 12))
    coefficients = torch.from_numpy(np.linalg.solve(rows[:, :5], rows[:, 5:]))
    exchange(coefficients, 2, 3)
    rows[:, [2, 8]] = rows[:, [8, 2]]
    np.testing.assert_allclose(coefficients, np.linalg.solve(rows[:, :5], rows[:, 5:]), atol=1e-12)


def test_a_bad_choice_of_pivots_is_exchanged_away():
    rows = random(6, 30)
    rows[:, :6] = rows[:, 6:12] + 1e3 * torch.eye(6)[:, [0]]  # nearly dependent
    start = torch.linalg.solve(rows[:, :6], rows[:, 6:]).abs().max()
    assert float(start) > 4
    chosen, coefficients = _dominant_columns(rows, torch.arange(6), torch.arange(6, 30))
    rest = [i for i in range(30) if i not in chosen.tolist()]
    assert chosen.tolist() == sorted(chosen.tolist())
    assert float(coefficients.abs().max()) <= 2
    torch.testing.assert_close(rows[:, chosen] @ coefficients, rows[:, rest], rtol=0, atol=1e-9)


def test_pivots_of_a_deficient_factor_are_found_all_the_same():
    A, B = random(12, 4), random(4, 9, seed=1)
    B[3] = 0
    found = pivot(LowRankFactors(A, B, torch.ones(4)))
    torch.testing.assert_close(found.to_dense(), (A @ B).T, rtol=0, atol=1e-12)


def test_bfloat16_coefficients_lose_no_more_than_a_bfloat16_basis_twice_over():
    factors = LowRankFactors(random(200, 60), random(60, 150, seed=1), torch.ones(60))
    found, dense = pivot(factors), factors.to_dense()

    def loss(A, B):
        rounded = type(found)(A, B, found.pivots, found.singular_values)
        return float((rounded.to_dense() - dense).norm() / dense.norm())

    assert loss(found.A, found.B.bfloat16().double()) <= 2 * loss(found.A.bfloat16().double(), found.B)


def test_rank_costs_count_a_mask_bit_as_a_sixteenth():
    assert rank_costs(10, [6], False).tolist() == [0, 16, 32, 48, 64, 80, 96]
    assert rank_costs(10, [6], True).tolist() == [0, 15.5, 28.5, 39.5, 48.5, 55.5, 60.5]
    assert float(rank_costs(10, [6, 3], True)[2]) == 2 * (10 + 9 - 2) + 1


@pytest.mark.parametrize(("d_in", "d_out"), [(576, 576), (576, 192), (1536, 576), (576, 1536)])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.3, 0.5, 0.9])
def test_rank_for_is_the_largest_that_fits(d_in, d_out, ratio):
    assert rank_for(d_in, d_out, ratio) == min(int((1 - ratio) * d_in * d_out / (d_in + d_out)), d_in, d_out)
    rank, limit = rank_for(d_in, d_out, ratio, pivoted=True), (1 - ratio) * d_in * d_out
    assert rank * (d_in + d_out - rank) + d_out / 16 <= limit
    assert rank == min(d_in, d_out) or (rank + 1) * (d_in + d_out - rank - 1) + d_out / 16 > limit
    assert rank >= rank_for(d_in, d_out, ratio)

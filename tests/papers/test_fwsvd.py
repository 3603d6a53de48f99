"""FWSVD: the Fisher-weighted problem is solved exactly, and its variants are what they say."""

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from llmcompress_eval.perplexity import perplexity, windows
from pydantic import ValidationError

from llmcompress.api import compress
from llmcompress.calibration.collect import InputStatistics, capture_inputs
from llmcompress.calibration.fisher import FisherAccumulator
from llmcompress.calibration.text import pack, tokenize
from llmcompress.compressors.factors import LowRankFactors
from llmcompress.compressors.fwsvd import (
    FWSVD,
    FWSVDOptions,
    fwsvd,
    optimal_weighted_error,
    weighted_error,
    weighted_low_rank,
)
from llmcompress.compressors.ranks import rank_for
from llmcompress.compressors.svd import svd_factorize
from llmcompress.compressors.svd_llm import svd_llm_factorize
from llmcompress.errors import InputError
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.models.structure import analyse
from llmcompress.types import Budget, Problem, Site, Statistics

D_IN, D_OUT, RANK = 40, 70, 12


def problem(seed=0):
    """weight (d_out, d_in) and weights of its inputs, over many decades."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(D_OUT, D_IN))), torch.from_numpy(rng.uniform(size=D_IN) ** 4 * 100 + 1e-3)


def alternating_least_squares(weight, rows, rank, rounds):
    """The weighted problem by brute force: a column of B, then a row of A, at a time. W = weightᵀ."""
    W, q = weight.numpy().T, np.sqrt(rows.numpy())[:, None]
    A = np.random.default_rng(1).normal(size=(len(W), rank))
    for _ in range(rounds):
        B = np.linalg.lstsq(q * A, q * W, rcond=None)[0]
        A = np.linalg.lstsq(B.T, W.T, rcond=None)[0].T
    return float((rows.numpy()[:, None] * (W - A @ B) ** 2).sum())


# --- the paper's problem ---------------------------------------------------------------------------------------------


def test_weighted_error_is_the_optimum():
    weight, rows = problem()
    factors = fwsvd(weight, rows, RANK)
    spectrum = scipy.linalg.svdvals(np.sqrt(rows.numpy())[:, None] * weight.numpy().T)
    least = (spectrum[RANK:] ** 2).sum()
    approximation = (factors.A @ factors.B).numpy()
    error = (rows.numpy()[:, None] * (weight.numpy().T - approximation) ** 2).sum()
    assert error == pytest.approx(least, rel=1e-10)
    assert weighted_error(weight, factors, rows) == pytest.approx(error, rel=1e-12)
    assert optimal_weighted_error(weight, rows, RANK) == pytest.approx(least, rel=1e-10)
    assert weighted_error(weight, svd_factorize(weight, RANK), rows) >= 2 * least
    assert alternating_least_squares(weight, rows, RANK, 300) >= least * (1 - 1e-10)


def test_weights_without_the_root_are_not_optimal():
    weight, rows = problem()
    without_root = fwsvd(weight, rows.square(), RANK)
    assert weighted_error(weight, without_root, rows) > 1.05 * optimal_weighted_error(weight, rows, RANK)


def test_equal_weights_are_plain_svd():
    weight, _ = problem()
    expected = svd_factorize(weight, RANK).to_dense()
    np.testing.assert_allclose(fwsvd(weight, torch.full((D_IN,), 7.0), RANK).to_dense(), expected, atol=1e-10)


def test_scale_of_the_weights_does_not_matter():
    weight, rows = problem()
    product = fwsvd(weight, rows, RANK).to_dense()
    np.testing.assert_allclose(fwsvd(weight, 1e-12 * rows, RANK).to_dense(), product, atol=1e-9)


def test_rows_that_matter_are_kept():
    weight, _ = problem()
    rows = torch.full((D_IN,), 0.01, dtype=torch.float64)
    rows[:10] = 1

    def relative(factors):
        missed = (weight - factors.to_dense())[:, :10]
        return float(missed.norm() / weight[:, :10].norm())

    assert relative(fwsvd(weight, rows, RANK)) <= 0.02
    assert relative(svd_factorize(weight, RANK)) >= 0.5


def test_factors_are_balanced():
    weight, rows = problem()
    factors = fwsvd(weight, rows, RANK)
    root = torch.diag(factors.singular_values[:RANK])
    q = (rows / rows.mean()).sqrt()
    torch.testing.assert_close(factors.B @ factors.B.T, root, rtol=0, atol=1e-9)
    torch.testing.assert_close((q[:, None] * factors.A).T @ (q[:, None] * factors.A), root, rtol=0, atol=1e-9)


def test_inputs_without_gradient_get_the_floor():
    weight, rows = problem()
    rows[5] = 0
    floored = (rows / rows.mean()).clamp_min(1e-3)
    expected = fwsvd(weight, floored, RANK, floor=0.0).to_dense()
    np.testing.assert_allclose(fwsvd(weight, rows, RANK, floor=1e-3).to_dense(), expected, atol=1e-10)
    assert torch.isfinite(fwsvd(weight, rows, RANK).to_dense()).all()


def test_weights_of_zero_give_plain_svd_and_say_so():
    weight, _ = problem()
    factors = fwsvd(weight, torch.zeros(D_IN), RANK)
    np.testing.assert_allclose(factors.to_dense(), svd_factorize(weight, RANK).to_dense(), atol=1e-10)
    assert factors.repair == "all 40 Fisher weights of one side are zero; taken as equal"


# --- the variants ----------------------------------------------------------------------------------------------------


def test_each_variant_minimises_its_own_norm():
    weight, rows = problem()
    rng = np.random.default_rng(4)
    columns = rng.uniform(size=D_OUT) ** 4 + 1e-3
    X = rng.normal(size=(200, D_IN)) * np.logspace(0, -2, D_IN)
    column_weights, gram = torch.from_numpy(columns), torch.from_numpy(X.T @ X)
    sides = {
        "output": (np.eye(D_IN), weighted_low_rank(weight, RANK, column_weights=column_weights)),
        "both": (np.diag(np.sqrt(rows.numpy())), weighted_low_rank(weight, RANK, rows, column_weights)),
        "gram": (X, weighted_low_rank(weight, RANK, column_weights=column_weights, gram=gram)),
    }
    for name, (left, factors) in sides.items():
        W, product = weight.numpy().T, (factors.A @ factors.B).numpy()
        error = np.linalg.norm(left @ (W - product) * np.sqrt(columns))
        spectrum = scipy.linalg.svdvals(left @ W * np.sqrt(columns))
        assert error == pytest.approx(np.sqrt((spectrum[RANK:] ** 2).sum()), rel=1e-9), name
    only_gram = weighted_low_rank(weight, RANK, gram=gram).to_dense()
    np.testing.assert_allclose(only_gram, svd_llm_factorize(weight, gram, RANK).to_dense(), atol=1e-10)


# --- the compressor --------------------------------------------------------------------------------------------------

SITE = Site("layers.3.gate", "gate", 3, D_IN, D_OUT, "layers.3.gate")


def unit_problem(**changes):
    weight, rows = problem()
    rng = np.random.default_rng(6)
    statistics = Statistics(
        tokens=200, sequences=8, row_fisher=rows, column_fisher=torch.from_numpy(rng.uniform(size=D_OUT)),
        gram=torch.diag(rows),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(statistics, name, value)
    return Problem([SITE], [weight], [None], [statistics])


@pytest.mark.parametrize(
    ("weighting", "needs"),
    [
        ("input", {"row_fisher"}),
        ("output", {"column_fisher"}),
        ("both", {"row_fisher", "column_fisher"}),
        ("gram", {"gram", "column_fisher"}),
    ],
)
def test_weighting_chooses_the_statistics(weighting, needs):
    method = FWSVD(FWSVDOptions(weighting=weighting))
    assert method.needs == needs
    unit = unit_problem()
    layer = method.compress(unit, Budget.for_ratio([SITE], 0.3), torch.Generator()).layers[0]
    found = {name: getattr(unit.statistics[0], name) for name in needs}
    expected = weighted_low_rank(
        unit.weights[0], layer.rank, found.get("row_fisher"), found.get("column_fisher"), found.get("gram")
    )
    torch.testing.assert_close(layer.to_dense().detach(), expected.to_dense(), rtol=0, atol=1e-9)


def test_sites_that_share_a_basis_weigh_an_input_by_all_its_readers():
    first = Site("q", "q", 0, D_IN, D_OUT, "q")
    second = Site("k", "k", 0, D_IN, 20, "q")
    weight, rows = problem()
    other, more = problem(seed=1)
    unit = Problem([first, second], [weight, other[:20]], [None, None],
                   [Statistics(row_fisher=rows), Statistics(row_fisher=more)])  # fmt: skip
    method = FWSVD(FWSVDOptions(share="input"))
    assert method.units([first, second]) == [[first, second]]
    layers = method.compress(unit, Budget.for_ratio(unit.sites, 0.3), torch.Generator()).layers
    expected = fwsvd(torch.cat(unit.weights), rows + more, layers[0].rank).to_dense()
    torch.testing.assert_close(torch.cat([l.to_dense() for l in layers]).detach(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("pivot", "values"), [(True, 13 * (110 - 13) + 4.5), (False, 13 * 110)])
def test_rank_fraction_decides_in_place_of_the_budget(pivot, values):
    method = FWSVD(FWSVDOptions(rank_fraction=0.33, pivot=pivot))
    assert method.plan([SITE], Budget(1.0)) == {"rank": 13, "values": values}
    assert method.compress(unit_problem(), Budget(1.0), torch.Generator()).layers[0].rank == 13


# --- a real model ----------------------------------------------------------------------------------------------------

LAYERS = range(8, 12)


def mean_loss(model, tokens):
    return perplexity(model, tokens).nll


@pytest.fixture(scope="module")
def middle(smollm2, smollm2_tokenizer, wikitext):
    """Sites of layers 8 to 11, their Fisher weights from 4 x 256 tokens, their Grams, and 4 x 256 others."""
    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"][:60000]]), 8, 256, "valid")
    sites = [site for site in analyse(smollm2).sites if site.block in LAYERS]
    fisher = FisherAccumulator(smollm2, sites)
    inputs = InputStatistics(sites, frozenset({"gram"}), torch.device("cpu"))
    with fisher, capture_inputs(smollm2, sites, inputs.receive):
        fisher.update({"input_ids": tokens[:4]})
    return sites, fisher, {site.name: inputs.sums[site.input].gram for site in sites}, tokens[4:]


def loss_with(model, sites, held_out, factorize):
    """Held-out loss with the weights of `sites` replaced by `factorize(site, weight, rank)`, which are put back."""
    kept = {site.name: model.get_submodule(site.name).weight.detach().clone() for site in sites}
    try:
        for site in sites:
            rank = rank_for(site.d_in, site.d_out, 0.4)
            approximation = factorize(site, kept[site.name], rank).to_dense()
            model.get_submodule(site.name).weight.data.copy_(approximation)
        return mean_loss(model, held_out)
    finally:
        for name, weight in kept.items():
            model.get_submodule(name).weight.data.copy_(weight)


def test_fisher_weights_help_real_layers_and_whitening_more(smollm2, middle):
    sites, fisher, grams, held_out = middle
    rows, columns = fisher.row_weights, fisher.column_weights
    loss = {
        "dense": mean_loss(smollm2, held_out),
        "svd": loss_with(smollm2, sites, held_out, lambda site, w, r: svd_factorize(w, r)),
        "fwsvd": loss_with(smollm2, sites, held_out, lambda site, w, r: fwsvd(w, rows[site.name], r)),
        "wrong axis": loss_with(smollm2, sites, held_out,
                                lambda site, w, r: weighted_low_rank(w, r, column_weights=columns[site.name])),
        "whitened": loss_with(smollm2, sites, held_out, lambda site, w, r: svd_llm_factorize(w, grams[site.name], r)),
    }  # fmt: skip
    print({name: round(value, 3) for name, value in loss.items()})
    assert loss["fwsvd"] <= loss["dense"] + 0.45
    assert loss["svd"] >= loss["fwsvd"] + 0.8
    assert loss["wrong axis"] >= loss["fwsvd"] + 0.6
    assert loss["whitened"] <= loss["fwsvd"]


@pytest.fixture(scope="module")
def whole(smollm2_tokenizer, wikitext):
    """64 x 512 calibration tokens and 16 windows of 1,024 others."""
    calibration = pack(tokenize(smollm2_tokenizer, [wikitext["valid"]]), 64, 512, "valid")
    return calibration, windows(tokenize(smollm2_tokenizer, [wikitext["test"]]), 1024, 16, "test")


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "reach"), [(0.2, 8000.0), (0.3, 30000.0)])
def test_perplexity_of_a_whole_model_before_fine_tuning(smollm2, whole, ratio, reach):
    calibration, held_out = whole
    found = {}
    for method in ("fwsvd", "svd"):
        model = compress(copy.deepcopy(smollm2), method=method, ratio=ratio, tokens=calibration, pivot=False)
        found[method] = perplexity(model, held_out).perplexity
    print(f"{ratio:.0%} removed: {found}")
    assert found["fwsvd"] <= reach
    assert found["fwsvd"] <= 1e-3 * found["svd"]


@pytest.mark.slow
def test_fine_tuning_of_the_factors_restores_most(smollm2, whole):
    calibration, held_out = whole
    model = compress(copy.deepcopy(smollm2), method="fwsvd", ratio=0.2, tokens=calibration, pivot=False)
    before = perplexity(model, held_out).perplexity
    model.requires_grad_(False)
    factors = [p for layer in model.modules() if isinstance(layer, LowRankLinear) for p in layer.parameters()]
    for factor in factors:
        factor.requires_grad_(True)
    optimizer = torch.optim.AdamW(factors, lr=5e-4)
    for step in range(100):
        rows = calibration[step % len(calibration)][None]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = perplexity(model, held_out).perplexity
    print(f"perplexity {before:.1f} before, {after:.1f} after")
    assert after <= 0.1 * before


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_rank_fraction_that_stores_more_than_dense_is_refused():
    method = FWSVD(FWSVDOptions(rank_fraction=0.8, pivot=False))
    with pytest.raises(InputError, match=r"layers\.3\.gate: rank 32 \(rank_fraction 0\.8\) stores 3520 values.* 2800"):
        method.plan([SITE], Budget(1.0))
    with pytest.raises(InputError, match=r"rank_fraction 0\.01 of rank 40 is below rank 1"):
        FWSVD(FWSVDOptions(rank_fraction=0.01)).plan([SITE], Budget(1.0))
    with pytest.raises(ValidationError, match="less than 1"):
        FWSVDOptions(rank_fraction=1.0)
    with pytest.raises(ValidationError, match="'input', 'output', 'both' or 'gram'"):
        FWSVDOptions(weighting="row")


@pytest.mark.parametrize("rank", [0, 41])
def test_rank_out_of_range(rank):
    weight, rows = problem()
    for attempt in (lambda: fwsvd(weight, rows, rank), lambda: optimal_weighted_error(weight, rows, rank)):
        with pytest.raises(InputError, match=rf"rank must be between 1 and min\(d_in, d_out\) = 40; got {rank}"):
            attempt()


def test_bad_weights_name_the_site():
    budget = Budget.for_ratio([SITE], 0.3)
    _, rows = problem()
    cases = {
        r"layers\.3\.gate: the Fisher weights must have shape \(40,\); got \(39,\)": rows[1:],
        r"layers\.3\.gate: the Fisher weights are negative": -rows,
        r"layers\.3\.gate: the statistic 'row_fisher' is not finite": rows / 0,
        r"layers\.3\.gate: no gradient reached this site; allow_unused": 0 * rows,
        r"layers\.3\.gate: this method needs the statistic 'row_fisher'": None,
    }
    for message, row_fisher in cases.items():
        with pytest.raises(InputError, match=message):
            FWSVD().compress(unit_problem(row_fisher=row_fisher), budget, torch.Generator())


def test_an_unused_site_is_factorised_only_when_allowed_and_noted():
    unit = unit_problem(row_fisher=torch.zeros(D_IN))
    method = FWSVD(FWSVDOptions(allow_unused=True))
    done = method.compress(unit, Budget.for_ratio([SITE], 0.3), torch.Generator())
    assert done.notes == ["layers.3.gate: all 40 Fisher weights of one side are zero; taken as equal"]
    expected = svd_factorize(unit.weights[0], done.layers[0].rank).to_dense()
    torch.testing.assert_close(done.layers[0].to_dense().detach(), expected, rtol=0, atol=1e-9)


def test_fisher_and_gram_exclude_each_other():
    weight, rows = problem()
    with pytest.raises(InputError, match="by Fisher weights or by a Gram, not by both"):
        weighted_low_rank(weight, RANK, row_weights=rows, gram=torch.diag(rows))


def test_unweighted_low_rank_is_plain_svd():
    weight, _ = problem()
    found = weighted_low_rank(weight, RANK)
    assert isinstance(found, LowRankFactors)
    np.testing.assert_allclose(found.to_dense(), svd_factorize(weight, RANK).to_dense(), atol=1e-12)

"""Dictionaries under the whole output-gradient Gram: against the two-sided SVD and the normal equations."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llmcompress
from llmcompress.compressors.allocation.curves import measured_for
from llmcompress.compressors.allocation.loss_aware import LossAware, choices
from llmcompress.compressors.cospadi import CoSpaDi, CoSpaDiOptions, learn_dictionary
from llmcompress.compressors.dictionary_learning import learning_operations
from llmcompress.compressors.kfac_svd import KFACSVD, two_sided_factorize
from llmcompress.compressors.loss_refinement import refine, refinement_operations
from llmcompress.types import Budget, Problem, Profile, Site, Statistics
from tests.tiny import tiny_model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlation(size, seed=0):
    """A Gram with unit diagonal whose eigenvalues span two decades."""
    rows = (
        normal(4 * size, size, seed=seed)
        * torch.logspace(0, -1, size, dtype=torch.float64)
        @ normal(size, size, seed=9)
    )
    gram = rows.T @ rows
    scale = gram.diagonal().sqrt()
    return gram / (scale[:, None] * scale)


def loss(y, factors, gram):
    residual = y - factors.to_dense()
    return float((residual @ gram * residual).sum())


@pytest.fixture
def signals():
    return normal(20, 40, seed=3) * torch.linspace(1, 0.1, 20, dtype=torch.float64)[:, None]


def learnt(y, k, s):
    return learn_dictionary(y, k, s, generator=torch.Generator().manual_seed(0))


def test_with_full_codes_it_comes_to_the_two_sided_svd(signals):
    """s = k leaves plain factors of rank k, whose least loss is known."""
    gram, k = correlation(40), 8
    best = two_sided_factorize(signals.T, torch.eye(20, dtype=torch.float64), gram, k, damping=(0.0, 0.0))
    floor = float(best.singular_values[k:].square().sum())
    start = learnt(signals, k, k)
    assert loss(signals, start, gram) > 1.2 * floor
    assert floor <= loss(signals, refine(signals, start, [gram], rounds=100, tolerance=1e-6), gram) < 1.03 * floor


def test_the_work_that_an_estimate_of_time_counts_is_that_done():
    y = normal(64, 192) * torch.linspace(1, 0.05, 64, dtype=torch.float64)[:, None]
    with FlopCounterMode(display=False) as learning:
        factors = learn_dictionary(y, 48, 24, iterations=8, tolerance=0.0)
    gram = (correlation(96) + torch.eye(96, dtype=torch.float64)) / 2  # no support is tried in vain
    with FlopCounterMode(display=False) as refinement:
        refine(y, factors, [gram, gram], tolerance=0.0)
    assert learning_operations(64, 192, 48, 8) == pytest.approx(learning.get_total_flops(), rel=0.25)
    assert refinement_operations(64, [96, 96], 48) == pytest.approx(refinement.get_total_flops(), rel=0.25)


def test_every_round_lowers_the_loss_that_the_history_tells(signals):
    gram = torch.block_diag(correlation(25, seed=1), correlation(15, seed=2))
    start = learnt(signals, 12, 5)
    found = refine(signals, start, [gram[:25, :25], gram[25:, 25:]])
    total = float((signals @ gram * signals).sum())
    assert found.history[0] == pytest.approx(math.sqrt(loss(signals, start, gram) / total), rel=1e-9)
    assert found.history[-1] == pytest.approx(math.sqrt(loss(signals, found, gram) / total), rel=1e-9)
    assert (np.diff(found.history) <= 0).all()
    assert found.history[-1] < 0.85 * found.history[0]
    assert found.indices.shape == start.indices.shape
    np.testing.assert_allclose(found.dictionary.norm(dim=0), 1, rtol=1e-9)


def test_at_the_end_neither_values_nor_dictionary_can_do_better(signals):
    """The slope vanishes with respect to both, as the normal equations of each say, in float64."""
    gram = correlation(40)
    found = refine(signals, learnt(signals, 12, 5), [gram], rounds=400, tolerance=1e-9)
    codes = torch.zeros(40, 12, dtype=torch.float64).scatter_(1, found.indices, found.values)
    support = torch.zeros_like(codes).scatter_(1, found.indices, 1.0)
    residual = signals - found.dictionary @ codes.T
    scale = float((signals @ gram).norm())
    assert float((residual @ gram @ codes).norm()) < 2e-3 * scale
    assert float(((gram @ residual.T @ found.dictionary) * support).norm()) < 2e-3 * scale


def test_an_identity_gram_leaves_the_error_of_the_columns(signals):
    start = learnt(signals, 12, 5)
    found = refine(signals, start, [torch.eye(40, dtype=torch.float64)])
    assert found.history[0] == pytest.approx(start.history[-1], rel=1e-9)
    assert found.history[-1] <= start.history[-1]


def test_unused_atoms_stay_finite(signals):
    start = learnt(signals, 12, 5)
    extra = torch.cat((start.dictionary, start.dictionary[:, :1]), dim=1)
    found = refine(signals, dataclasses.replace(start, dictionary=extra), [correlation(40)])
    assert torch.isfinite(found.dictionary).all()
    assert found.history[-1] < found.history[0]


# --- the compressor --------------------------------------------------------------------------------------------------


def unit(d_outs=(48, 24), d_in=32, seed=0):
    sites = [Site(f"layers.0.{i}", "other", 0, d_in, d_out, "layers.0.0") for i, d_out in enumerate(d_outs)]
    x = normal(300, d_in, seed=seed) * torch.logspace(0, -1.5, d_in, dtype=torch.float64)
    gram = x.T @ x
    statistics = [
        Statistics(tokens=300, gram=gram, backward_tokens=500, output_gram=500 * correlation(d_out, seed=i))
        for i, d_out in enumerate(d_outs)
    ]
    weights = [normal(d_out, d_in, seed=20 + i).float() for i, d_out in enumerate(d_outs)]
    return Problem(sites, weights, [None] * len(sites), statistics)


def second_order(problem, layers):
    total = 0.0
    for weight, layer, statistics in zip(problem.weights, layers, problem.statistics, strict=True):
        missed = weight.double() - layer.to_dense().detach().double()
        gram, output = statistics.gram / statistics.tokens, statistics.output_gram / statistics.backward_tokens
        total += float((output @ missed @ gram * missed).sum())
    return total


def test_full_weights_lose_less_than_their_diagonal():
    problem = unit()
    budget = Budget.for_ratio(problem.sites, 0.3)
    found = {}
    for structure in ("cospadi", "auto"):
        for weights in ("diagonal", "full"):
            method = CoSpaDi(CoSpaDiOptions(structure=structure, output_weights=weights))
            layers = method.compress(problem, budget, torch.Generator().manual_seed(0)).layers
            found[structure, weights] = second_order(problem, layers)
    assert found["cospadi", "full"] < 0.8 * found["cospadi", "diagonal"]
    assert found["auto", "full"] <= found["cospadi", "full"]


@pytest.mark.parametrize(("rank", "kind"), [(6, "low_rank"), (32, "sparse_dictionary")])
def test_auto_takes_the_lower_of_the_losses(rank, kind):
    """A dictionary, or the two-sided SVD: weights of low rank are the latter's."""
    problem = unit((64,))
    problem.weights = [(normal(64, rank, seed=3) @ normal(rank, 32, seed=4) + 1e-3 * normal(64, 32, seed=5)).float()]
    budget = Budget.for_ratio(problem.sites, 0.5)

    def compressed(method):
        return method.compress(problem, budget, torch.Generator().manual_seed(0)).layers

    auto = compressed(CoSpaDi(CoSpaDiOptions(output_weights="full")))
    dictionary = compressed(CoSpaDi(CoSpaDiOptions(output_weights="full", structure="cospadi")))
    assert auto[0].kind == kind
    least = min(second_order(problem, layers) for layers in (dictionary, compressed(KFACSVD())))
    assert second_order(problem, auto) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.65, 0.75])
def test_measured_losses_are_near_those_of_the_compressed_unit(share):
    problem = unit()
    method = CoSpaDi(CoSpaDiOptions(structure="cospadi", output_weights="full"))
    profile = method.profile(problem)
    assert profile.losses.shape == profile.costs.shape
    assert (profile.losses.diff() <= 0).all()
    at = int(torch.searchsorted(profile.costs, share * profile.dense))
    done = method.compress(problem, Budget(share * profile.dense), torch.Generator().manual_seed(0))
    assert 0.5 < second_order(problem, done.layers) / float(profile.losses[at]) < 1.1


def test_measured_losses_of_auto_are_the_lower_of_both():
    problem = unit()
    auto, alone = (
        CoSpaDi(CoSpaDiOptions(structure=structure, output_weights="full")).profile(problem)
        for structure in ("auto", "cospadi")
    )
    tail = torch.cat((auto.spectrum.square().flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(auto.losses, torch.minimum(tail, alone.losses))


def test_one_unit_in_eight_is_measured_of_each_kind_and_the_ends():
    def site(role, block, d_out):
        return Site(f"{block}.{role}", role, block, 32, d_out, f"{block}.{role}")

    units = [[site(role, block, 16 + 16 * (role == "up"))] for block in range(30) for role in ("q", "up")]
    measured = measured_for(units)
    assert measured[::2] == [0, *[8] * 8, *[24] * 8, *[40] * 8, *[56] * 4, 58]
    assert measured[1::2] == [number + 1 for number in measured[::2]]
    assert measured_for(units[:10]) == list(range(10)), "five of a kind are all measured"


def test_a_unit_follows_the_curve_of_its_like():
    """Exactly where the two differ in scale alone; near its own measurement where weights and inputs are others."""
    method = CoSpaDi(CoSpaDiOptions(structure="cospadi", output_weights="full"))
    measured, problem = method.profile(unit()), unit()
    problem.weights = [3 * weight for weight in problem.weights]
    problem.like = measured
    torch.testing.assert_close(method.profile(problem).losses, 9 * measured.losses)
    other = unit(seed=7)
    other.weights = [normal(*weight.shape, seed=40 + i).float() for i, weight in enumerate(other.weights)]
    own = method.profile(other).losses
    other.like = measured
    near = (measured.costs > 0.45 * measured.dense) & (measured.costs < 0.8 * measured.dense)
    torch.testing.assert_close(method.profile(other).losses[near], own[near], rtol=0.15, atol=0)


@pytest.mark.parametrize("structure", ["auto", "cospadi"])
def test_one_large_direction_leaves_a_curve_that_follows_as_it_was(structure):
    """A dictionary's least size is far above rank one: what rank zero would lose must not enter the curve."""
    method = CoSpaDi(CoSpaDiOptions(structure=structure, output_weights="full"))
    plain = unit()
    plain.like = method.profile(plain)
    large = dataclasses.replace(plain)
    large.weights = [weight + 30 * torch.outer(weight[:, 0], weight[0]) for weight in plain.weights]
    followed, own = method.profile(large), method.profile(dataclasses.replace(large, like=None))
    assert float(own.spectrum[0]) > 5 * float(plain.like.spectrum[0])
    assert (followed.losses.diff() <= 0).all()
    near = (own.costs >= own.costs[0]) & (own.costs < 0.8 * own.dense)
    torch.testing.assert_close(followed.losses[near], own.losses[near], rtol=0.3, atol=0)


def test_the_pipeline_measures_the_curves_that_others_follow(monkeypatch):
    model = tiny_model(num_hidden_layers=7)
    tokens = torch.randint(3, 120, (16, 32), generator=torch.Generator().manual_seed(0))
    measured, original = [], CoSpaDi._losses

    def counted(self, problem, spectrum):
        measured.append(problem.sites[0].block)
        return original(self, problem, spectrum)

    monkeypatch.setattr(CoSpaDi, "_losses", counted)
    step = {"method": "cospadi", "ratio": 0.3, "output_weights": "full", "allocation": "loss_aware"}
    llmcompress.compress(model, tokens=tokens, **step)
    assert sorted(measured) == [block for block in (0, 4, 6) for _ in range(4)]


def test_a_budget_follows_measured_losses_not_the_spectrum():
    sites = [Site(name, "other", 0, 30, 40, name) for name in ("a", "b")]
    costs = torch.linspace(0, 1100, 31, dtype=torch.float64)
    spectrum = torch.ones(30, dtype=torch.float64)
    losses = [scale * torch.exp(-costs / 150) for scale in (1.0, 3.0)]
    profiles = [Profile([site], spectrum, costs, 1200, own) for site, own in zip(sites, losses, strict=True)]
    assert choices(profiles[1])[0][1] == losses[1][1]
    budgets = LossAware().allocate([[site] for site in sites], profiles, 0.3)
    # equal slopes of exp(-c / 150) and 3 exp(-c / 150): the second gets 150 log 3 more, to a step of each grid
    assert budgets[1].values - budgets[0].values == pytest.approx(150 * math.log(3), abs=80)

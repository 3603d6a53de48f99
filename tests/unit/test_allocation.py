import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from llmcompress import catalog
from llmcompress.compressors.allocation.d_rank import DRank, DRankOptions, effective_rank, move_to_values
from llmcompress.compressors.allocation.spread import spread
from llmcompress.compressors.allocation.svd_llm_v2 import SVDLLMV2, SVDLLMV2Options, allocate_ratios, truncation_loss
from llmcompress.compressors.ranks import rank_costs
from llmcompress.errors import InputError
from llmcompress.types import Profile, Site

SHAPES = {
    "q": (32, 32),
    "k": (32, 16),
    "v": (32, 16),
    "o": (32, 32),
    "gate": (32, 64),
    "up": (32, 64),
    "down": (64, 32),
}


def model(blocks=4, scale=300.0):
    """Units of a small model; spectra decay faster in later blocks."""
    generator = torch.Generator().manual_seed(0)
    units, profiles = [], []
    for block in range(blocks):
        for role, (d_in, d_out) in SHAPES.items():
            site = Site(f"layers.{block}.{role}", role, block, d_in, d_out, f"layers.{block}.{role}")
            size = min(d_in, d_out)
            noise = torch.rand(size, generator=generator, dtype=torch.float64)
            spectrum = scale * torch.exp(-0.02 * (block + 1) * torch.arange(size)) * (1 + 0.1 * noise)
            units.append([site])
            profiles.append(Profile([site], spectrum.sort(descending=True).values, rank_costs(d_in, [d_out], True),
                                    d_in * d_out))  # fmt: skip
    return units, profiles


@pytest.mark.parametrize("name", ["uniform", "svd_llm_v2", "d_rank"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_budgets_sum_to_the_ratio_and_none_exceeds_its_dense_size(name, ratio):
    units, profiles = model()
    kind = catalog.get("allocation", name).load()
    allocation = kind(kind.Options())
    budgets = allocation.allocate(units, profiles if kind.needs_profiles else None, ratio)
    dense = [profile.dense for profile in profiles]
    assert math.isclose(sum(budget.values for budget in budgets), (1 - ratio) * sum(dense), rel_tol=1e-12)
    for budget, profile in zip(budgets, profiles, strict=True):
        assert float(profile.costs[1]) - 1e-6 <= budget.values <= profile.dense
    with pytest.raises(InputError, match=r"ratio must be in \(0, 1\)"):
        allocation.allocate(units, profiles, 1.0)


def test_spread_redistributes_what_a_clamp_takes():
    """Shares 1, 2, 7 of 20: the third is held at 8, and the 12 left go 1 : 2."""
    np.testing.assert_allclose(spread([1, 2, 7], [0, 0, 0], [100, 100, 8], 20), [4, 8, 8], rtol=1e-12)
    np.testing.assert_allclose(spread([1, 2, 7], [5, 0, 0], [100, 100, 100], 14), [5, 2, 7], rtol=1e-12)
    np.testing.assert_allclose(spread([1, 1], [1, 1], [3, 2], 5), [3, 2], rtol=1e-12)
    with pytest.raises(InputError, match="6 values cannot be given out between 2 and 5"):
        spread([1, 1], [1, 1], [3, 2], 6)
    with pytest.raises(InputError, match="shares of a budget must be positive"):
        spread([1, 0], [1, 1], [3, 2], 4)


# --- SVD-LLM V2 ------------------------------------------------------------------------------------------------------


def test_ratios_follow_the_papers_formula():
    losses, ratio = [20.0, 400.0, 3000.0], 0.3
    shares = [1 / math.log(loss) for loss in losses]
    expected = [3 * ratio * share / sum(shares) for share in shares]
    np.testing.assert_allclose(allocate_ratios(losses, ratio), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_ratios_keep_their_mean_and_are_ordered_against_the_loss(scale):
    losses = [scale * loss for loss in (5.0, 0.3, 40.0, 1.1, 9.0)]
    ratios = allocate_ratios(losses, 0.4)
    assert abs(sum(ratios) / 5 - 0.4) < 1e-9
    assert np.argsort(ratios).tolist() == np.argsort(losses)[::-1].tolist()
    assert all(0 < ratio <= 1 for ratio in ratios)


def test_clamped_ratios_are_redistributed():
    ratios = allocate_ratios([3.0, 1e4, 1e5], 0.6, [0.7, 0.9, 0.9])
    assert ratios[0] == pytest.approx(0.7)
    assert sum(ratios) == pytest.approx(1.8, abs=1e-12)
    assert ratios[1] / ratios[2] == pytest.approx(math.log(1e5) / math.log(1e4))


def test_losses_of_zero_do_not_divide_by_zero():
    assert allocate_ratios([0.0, 0.0], 0.3) == [0.3, 0.3]
    ratios = allocate_ratios([0.0, 10.0], 0.3)
    assert ratios[0] > ratios[1] > 0


def test_every_role_keeps_its_budget_and_the_floor_holds():
    units, profiles = model()
    budgets = SVDLLMV2(SVDLLMV2Options(floor=0.8)).allocate(units, profiles, 0.5)
    for role in SHAPES:
        members = [i for i, unit in enumerate(units) if unit[0].role == role]
        assert sum(budgets[i].values for i in members) == pytest.approx(0.5 * sum(profiles[i].dense for i in members))
        losses = [truncation_loss(profiles[i], 0.5) for i in members]
        kept = [budgets[i].values / profiles[i].dense for i in members]
        assert np.all(np.diff(np.array(kept)[np.argsort(losses)]) >= -1e-12)
        assert min(kept) >= 0.5 * 0.8 - 1e-12


def test_truncation_loss_is_the_tail_beyond_the_affordable_rank():
    costs = torch.tensor([0.0, 4, 8, 12])
    profile = Profile([], torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64), costs, 10)
    assert truncation_loss(profile, 0.5) == 5  # 5 values hold rank 1: sqrt(4² + 3²)


# --- D-Rank ----------------------------------------------------------------------------------------------------------


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    share = np.array([0.5, 0.3, 0.2])
    assert effective_rank(torch.from_numpy(share * 9)) == pytest.approx(math.exp(-(share * np.log(share)).sum()))
    assert effective_rank(torch.zeros(3)) == 1


def test_ranks_minimise_the_papers_objective():
    """sum erank / k under sum k cost = total: the Lagrangian's k beats its neighbours on the budget."""
    units, profiles = model()
    values = [b.values for b in DRank(DRankOptions(beta=0.0)).allocate(units, profiles, 0.6)]
    assert all(v < 0.999 * p.dense for v, p in zip(values, profiles, strict=True)), "no clamp is active"
    eranks = np.array([effective_rank(profile.spectrum) for profile in profiles])
    costs = np.array([unit[0].d_in + unit[0].d_out for unit in units])
    ranks = np.array(values) / costs
    np.testing.assert_allclose(ranks / np.sqrt(eranks / costs), ranks[0] / np.sqrt(eranks[0] / costs[0]), rtol=1e-9)
    step = np.random.default_rng(0).normal(size=len(costs))
    step -= costs * (step @ costs) / (costs @ costs)
    for moved in (ranks + 1e-2 * step, ranks - 1e-2 * step):
        assert (eranks / moved).sum() > (eranks / ranks).sum()


def test_queries_and_keys_give_to_the_values():
    units, profiles = model()
    before = [b.values for b in DRank(DRankOptions(beta=0.0)).allocate(units, profiles, 0.7)]
    after = [b.values for b in DRank(DRankOptions(beta=0.1)).allocate(units, profiles, 0.7)]
    for block in range(4):
        q, k, v, *rest = range(7 * block, 7 * block + 7)
        assert after[q] == pytest.approx(0.9 * before[q])
        assert after[k] == pytest.approx(0.9 * before[k])
        assert after[v] == pytest.approx(before[v] + 0.1 * (before[q] + before[k]))
        assert [after[i] for i in rest] == [before[i] for i in rest]


def test_values_take_no_more_than_their_dense_size():
    assert move_to_values(100, 50, 30, 0.3, 60, (0, 0)) == pytest.approx((70, 35, 75))
    assert move_to_values(100, 50, 30, 0.3, 9, (0, 0)) == pytest.approx((94, 47, 39))
    assert move_to_values(100, 50, 30, 0.3, 60, (95, 50)) == pytest.approx((95, 50, 35))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SVDLLMV2, DRank])
def test_missing_profiles_and_impossible_ratios_are_refused(kind):
    units, profiles = model(1)
    allocation = kind(kind.Options())
    with pytest.raises(InputError, match="needs a profile for each of the 7 units"):
        allocation.allocate(units, None, 0.3)
    with pytest.raises(InputError, match=r"ratio 0.99 leaves less than rank 1 a unit; at most 0\.9\d+ can be removed"):
        allocation.allocate(units, profiles, 0.99)
    profiles[2].spectrum[0] = math.nan
    with pytest.raises(InputError, match=r"layers\.0\.v: the spectrum is not finite"):
        allocation.allocate(units, profiles, 0.3)


def test_unknown_options_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        DRankOptions(gamma=1)

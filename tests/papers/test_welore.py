"""WeLore's allocation: the threshold is exact, the split never stores more than dense, and it beats uniform ranks."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from llmcompress_eval.perplexity import perplexity, windows
from transformers import LlamaConfig, LlamaForCausalLM

from llmcompress.api import compress
from llmcompress.backends.analysis.gradient_stability import (
    GradientRecorder,
    energy_rank,
    late_cosine,
    retained_ranks,
    stability_report,
    subspace_overlap,
)
from llmcompress.calibration import text
from llmcompress.compressors.allocation.welore import (
    WeLore,
    WeLoreOptions,
    fill_budget,
    global_threshold,
    normalize_spectrum,
    split_components,
    threshold_for_parameters,
)
from llmcompress.compressors.asvd import asvd_factorize
from llmcompress.compressors.low_rank import Whitened
from llmcompress.compressors.ranks import rank_costs, rank_for
from llmcompress.compressors.svd import svd_factorize
from llmcompress.compressors.svd_llm import svd_llm_factorize
from llmcompress.engine import Engine
from llmcompress.errors import InputError, RunError
from llmcompress.measurement import Settings
from llmcompress.models.load import load_model, locate
from llmcompress.models.runner import Runner
from llmcompress.models.structure import analyse
from llmcompress.plan import make_plan
from llmcompress.recipe import Recipe
from llmcompress.types import Profile, Site
from llmcompress.workspace import MemoryStore

SHAPES = [(40, 64), (47, 64), (54, 64), (61, 64), (68, 64), (75, 64)]
ERRS = [0.1, 0.3, 0.5, 0.7]


@pytest.fixture(scope="module")
def toy():
    """Spectra of six matrices (d_out, d_in) whose singular values decay at different rates."""
    rng = np.random.default_rng(0)
    spectra = []
    for decay, (d_out, d_in) in zip((0.5, 1, 1.5, 2, 3, 4), SHAPES, strict=True):
        left, right = (scipy.linalg.qr(rng.normal(size=(d, d)))[0] for d in (d_out, d_in))
        size = min(d_out, d_in)
        scale = np.exp(-decay * np.arange(size) / size) * (1 + 0.05 * rng.uniform(size=size))
        weight = left[:, :size] * scale @ right[:size] * 10 ** rng.uniform(-1, 1)
        spectra.append(torch.linalg.svdvals(torch.from_numpy(weight)))
    return spectra


def pooled(spectra, how="minmax"):
    """By numpy, straight from the definition."""
    low = (lambda s: s.min()) if how == "minmax" else (lambda s: 0)
    return np.sort(np.concatenate([(s.numpy() - low(s.numpy())) / (s.numpy().max() - low(s.numpy())) for s in spectra]))


# --- the threshold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["minmax", "max"])
@pytest.mark.parametrize("err", ERRS)
def test_exact_threshold_meets_the_attempted_reduction(toy, err, how):
    pool = pooled(toy, how)
    k = global_threshold(toy, err, how)
    assert abs((pool < k).mean() - err) <= 1 / len(pool)
    assert k in pool


@pytest.mark.parametrize("err", ERRS)
def test_grid_threshold_is_the_first_step_that_reaches_it(toy, err):
    pool = pooled(toy)
    k = global_threshold(toy, err, grid=0.005)
    assert (pool < k).mean() >= err
    assert (pool < k - 0.005).mean() < err
    assert k / 0.005 == pytest.approx(round(k / 0.005))


def test_evenly_spaced_spectra_have_the_threshold_at_the_reduction():
    spectra = [torch.linspace(3, 1, 50), torch.linspace(0.2, 0.1, 50)]
    for err in ERRS:
        assert global_threshold(spectra, err) == pytest.approx(err, abs=1 / 49 + 1e-6)


def test_normalised_spectra_run_from_zero_to_one():
    s = torch.tensor([8.0, 5.0, 2.0])
    assert normalize_spectrum(s).tolist() == [1, 0.5, 0]
    assert normalize_spectrum(s, "max").tolist() == [1, 0.625, 0.25]
    assert normalize_spectrum(torch.full((3,), 7.0)).tolist() == [1, 1, 1]
    assert normalize_spectrum(torch.zeros(3), "max").tolist() == [1, 1, 1]


def removed(spectra, k):
    ranks = [max(1, int((normalize_spectrum(s) >= k).sum())) for s in spectra]
    stored = sum(min(a * b, r * (a + b)) for r, (a, b) in zip(ranks, SHAPES, strict=True))
    return 1 - stored / sum(a * b for a, b in SHAPES)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
def test_parameter_threshold_is_the_smallest_that_meets_the_budget(toy, ratio):
    k, ranks = threshold_for_parameters(toy, SHAPES, ratio)
    pool = pooled(toy)
    scanned = next(value for value in pool if removed(toy, value) >= ratio)
    before = pool[np.flatnonzero(pool == scanned)[0] - 1]
    print(f"{removed(toy, k):.4f} removed, {removed(toy, before):.4f} one value earlier")
    assert k == pytest.approx(scanned, rel=1e-12)
    assert removed(toy, k) >= ratio > removed(toy, before)
    assert ranks == [max(1, int((normalize_spectrum(s) >= k).sum())) for s in toy]


def test_parameter_threshold_counts_what_the_method_stores(toy):
    """The pivot form stores less, so that the same budget holds higher ranks."""
    costs = [rank_costs(d_in, [d_out], True) for d_out, d_in in SHAPES]
    _, plain = threshold_for_parameters(toy, SHAPES, 0.3)
    _, pivoted = threshold_for_parameters(toy, SHAPES, 0.3, costs=costs)
    stored = sum(min(float(c[r]), a * b) for c, r, (a, b) in zip(costs, pivoted, SHAPES, strict=True))
    whole = 0.7 * sum(a * b for a, b in SHAPES)
    assert 0.98 * whole < stored <= whole
    assert all(more >= less for more, less in zip(pivoted, plain, strict=True))
    assert sum(pivoted) > 1.2 * sum(plain)


def test_split_by_storage_never_stores_more_than_dense():
    for shape in SHAPES:
        for rank in range(1, min(shape) + 1):
            low_rank = split_components([rank], [shape])[0]
            assert low_rank == (rank * sum(shape) < shape[0] * shape[1])
    assert split_components([418, 419], [(1536, 576)] * 2) == [True, False], "break-even at .727 of the rank"
    assert split_components([288, 289], [(576, 576)] * 2, "half") == [True, False]


# --- factors ---------------------------------------------------------------------------------------------------------


def test_factors_are_balanced_and_optimal():
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=(75, 64)))
    factors = svd_factorize(weight, 20)
    s = scipy.linalg.svdvals(weight.numpy())
    for product in (factors.A.T @ factors.A, factors.B @ factors.B.T):
        np.testing.assert_allclose(product, np.diag(s[:20]), atol=1e-12)
    missed = float((weight - factors.to_dense()).norm())
    assert missed == pytest.approx(np.sqrt((s[20:] ** 2).sum()), rel=1e-12)


def test_weighting_by_activations_lowers_the_output_error_in_order():
    """plain > ASVD > root mean square > whitened, which is its bound."""
    rng = np.random.default_rng(2)
    mix = scipy.linalg.qr(rng.normal(size=(64, 64)))[0]
    X = rng.normal(size=(512, 64)) * np.logspace(0, -1, 64) @ mix * np.exp(rng.normal(size=64))
    weight = torch.from_numpy(rng.normal(size=(75, 64)))
    inputs = torch.from_numpy(X)
    rms = inputs.square().mean(0).sqrt()
    column = rms[:, None]
    found = {
        "plain": svd_factorize(weight, 20),
        "asvd": asvd_factorize(weight, inputs.abs().mean(0), 20),
        "rms": Whitened(column * weight.T, undo=lambda a: a / column).factors(20),
        "whitened": svd_llm_factorize(weight, inputs.T @ inputs, 20),
    }
    outputs = X @ weight.numpy().T
    errors = [np.linalg.norm(outputs - X @ f.to_dense().numpy().T) / np.linalg.norm(outputs) for f in found.values()]
    print(dict(zip(found, errors, strict=True)))
    assert all(worse > 1.02 * better for worse, better in itertools.pairwise(errors))
    bound = np.sqrt((scipy.linalg.svdvals(outputs)[20:] ** 2).sum()) / np.linalg.norm(outputs)
    assert errors[-1] == pytest.approx(bound, rel=1e-9)


# --- the allocation --------------------------------------------------------------------------------------------------


def toy_units(spectra, pivoted=False):
    units = [[Site(f"layers.{i}.up", "up" if i < 4 else "gate", i, d_in, d_out, f"layers.{i}.up")]
             for i, (d_out, d_in) in enumerate(SHAPES)]  # fmt: skip
    profiles = [Profile(unit, s, rank_costs(unit[0].d_in, [unit[0].d_out], pivoted), unit[0].dense_values)
                for unit, s in zip(units, spectra, strict=True)]  # fmt: skip
    return units, profiles


def test_what_the_threshold_leaves_goes_to_the_next_values_that_fit():
    """Next come .9 (which stores 5 more), .8 and .6 (2 each); the third matrix is dense already."""
    spectra = [torch.tensor(s) for s in ([1.0, 0.9, 0.1], [1.0, 0.8, 0.6], [1.0, 1.0, 0.7, 0.2])]
    stored = [torch.tensor(c) for c in ([0.0, 5, 10, 15], [0.0, 2, 4, 6], [0.0, 2, 4, 4, 4])]
    assert fill_budget(spectra, stored, [1, 1, 2], 11) == [1, 1, 2]
    assert fill_budget(spectra, stored, [1, 1, 2], 13.5) == [1, 2, 2]
    assert fill_budget(spectra, stored, [1, 1, 2], 15) == [1, 3, 2]
    assert fill_budget(spectra, stored, [1, 1, 2], 18) == [2, 2, 2]


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("split", ["storage", "half"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_budgets_follow_the_threshold_and_use_the_ratio_up(toy, ratio, split, pivoted):
    units, profiles = toy_units(toy, pivoted)
    report = WeLore(WeLoreOptions(split=split)).report(units, profiles, ratio)
    budgets = [budget.values for budget in WeLore(WeLoreOptions(split=split)).allocate(units, profiles, ratio)]
    assert budgets == report.values
    dense = [profile.dense for profile in profiles]
    whole = (1 - ratio) * sum(dense)
    assert sum(budgets) <= whole
    for profile, rank, low_rank in zip(profiles, report.ranks, report.low_rank, strict=True):
        if split == "storage" and low_rank:  # half jumps from half the rank to dense
            step = min(float(profile.costs[rank + 1]), profile.dense) - float(profile.costs[rank])
            assert whole - sum(budgets) < step, "one more rank would fit"
    assert report.removed == pytest.approx(1 - sum(budgets) / sum(dense))
    for index, profile in enumerate(profiles):
        by_threshold = int((normalize_spectrum(toy[index]) >= report.threshold).sum())
        assert by_threshold <= report.ranks[index]
        assert split == "half" or report.ranks[index] <= by_threshold + 2, "the rest of the budget is small"
        expected = profile.costs[report.ranks[index]] if report.low_rank[index] else dense[index]
        assert budgets[index] == expected
    up = sum(budgets[:4]) / sum(dense[:4])
    assert report.by_role == pytest.approx({"up": up, "gate": sum(budgets[4:]) / sum(dense[4:])})


def test_attempted_reduction_in_place_of_the_ratio(toy):
    units, profiles = toy_units(toy)
    report = WeLore(WeLoreOptions(err=0.5, split="half")).report(units, profiles, 0.9)
    sizes = np.array([min(shape) for shape in SHAPES])
    gone = sizes - report.ranks
    assert report.threshold == global_threshold(toy, 0.5)
    assert report.attempted == pytest.approx(0.5, abs=2 / sizes.sum())
    assert report.low_rank == (gone / sizes > 0.4999).tolist()
    assert report.effective == pytest.approx(gone[report.low_rank].sum() / sizes.sum())
    assert 0 < report.effective < report.attempted
    assert all(v == p.dense for v, p, low in zip(report.values, profiles, report.low_rank, strict=True) if not low)


@pytest.mark.parametrize("spectrum", ["weight", "whitened"])
def test_the_pipeline_gives_the_spectra_that_are_asked_for(spectrum):
    """Of the weights, even for a method whose own spectra are whitened."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": 50, "num_hidden_layers": 2})).eval()
    step = {"method": "svd_llm", "ratio": 0.3, "allocation": {"name": "welore", "spectrum": spectrum}}
    plan = make_plan(analyse(model), Recipe.parse({"model": "-", "output": "-", "compress": [step]}).compress)
    tokens = torch.randint(50, (16, 32), generator=torch.Generator().manual_seed(1))
    engine = Engine(Runner(model, plan.structure), plan, tokens, MemoryStore(), Settings())
    results = {result.name: result for result in engine.run()}
    profiles = []
    for (site,) in plan.steps[0].units:
        s = torch.linalg.svdvals(model.get_submodule(site.name).weight.detach().double())
        profiles.append(Profile([site], s, rank_costs(site.d_in, [site.d_out], True), site.dense_values))
    expected = WeLore().allocate(plan.steps[0].units, profiles, 0.3)
    same = [results[unit[0].name].stored_values == pytest.approx(budget.values, rel=1e-3)
            for unit, budget in zip(plan.steps[0].units, expected, strict=True)]  # fmt: skip
    assert all(same) == (spectrum == "weight")


# --- a trained model -------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 256}  # fmt: skip


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def trained_llama(request, wikitext):
    """Linear weights of a small Llama trained on bytes, and the loss of that model with others in their place."""
    seed = request.param
    valid, test = (torch.tensor(list(wikitext[split].encode()), dtype=torch.long) for split in ("valid", "test"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**TINY))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    layers = {f"model.layers.{name}": module for name, module in model.model.layers.named_modules()
              if isinstance(module, torch.nn.Linear)}  # fmt: skip
    recorder = GradientRecorder(layers, q=8, seed=seed)
    elsewhere = torch.Generator().manual_seed(seed + 2)
    fixed = valid[torch.randint(len(valid) - 64, (32, 1), generator=elsewhere) + torch.arange(64)]
    for step in range(401):
        if step % 100 == 0:
            model.zero_grad()
            model(fixed, labels=fixed).loss.backward()
            recorder.snapshot()
        if step == 400:
            break
        starts = torch.randint(len(valid) - 64, (32, 1), generator=generator)
        batch = valid[starts + torch.arange(64)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()
    held_out = test[: 64 * 512].view(512, 64)
    weights = {f"{name}.weight": module.weight.detach() for name, module in layers.items()}

    def loss(replaced):
        with torch.no_grad():
            return float(torch.func.functional_call(model, replaced, (held_out,), {"labels": held_out}).loss)

    return weights, loss, recorder.records


def truncated(weights, ranks):
    """The weights that are cut, by plain SVD; a rank of None leaves one dense."""
    return {name: svd_factorize(weight, rank).to_dense().float()
            for (name, weight), rank in zip(weights.items(), ranks, strict=True) if rank is not None}  # fmt: skip


def test_equal_rank_reduction_costs_less_than_uniform(trained_llama):
    weights, loss, _ = trained_llama
    dense, spectra = loss({}), [torch.linalg.svdvals(weight) for weight in weights.values()]
    shares = []
    for err in (0.5, 0.6, 0.7, 0.8):
        k = global_threshold(spectra, err)
        ranks = [max(1, int((normalize_spectrum(s) >= k).sum())) for s in spectra]
        uniform = [round((1 - err) * len(s)) for s in spectra]
        assert sum(ranks) == pytest.approx(sum(uniform), rel=0.03)
        shares.append((loss(truncated(weights, ranks)) - dense) / (loss(truncated(weights, uniform)) - dense))
    print("loss increase over uniform's at err .5 .6 .7 .8:", [f"{share:.2f}" for share in shares])
    assert max(shares) <= 0.95
    assert np.mean(shares) <= 0.8


def test_equal_parameters_cost_less_than_uniform(trained_llama):
    weights, loss, _ = trained_llama
    dense, spectra = loss({}), [torch.linalg.svdvals(weight) for weight in weights.values()]
    shapes = [tuple(weight.shape) for weight in weights.values()]
    shares = []
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5):
        _, ranks = threshold_for_parameters(spectra, shapes, ratio)
        low_rank = split_components(ranks, shapes)
        found = truncated(weights, [r if low else None for r, low in zip(ranks, low_rank, strict=True)])
        uniform = truncated(weights, [rank_for(d_in, d_out, ratio) for d_out, d_in in shapes])
        shares.append((loss(found) - dense) / (loss(uniform) - dense))
    print("loss increase over uniform's at .1 .2 .3 .4 .5 removed:", [f"{share:.2f}" for share in shares])
    assert max(shares) <= 0.75


# --- a real model ----------------------------------------------------------------------------------------------------


# --- gradients -------------------------------------------------------------------------------------------------------


def recorded(gradients, q=6):
    """The record of one linear module that had these gradients (d_out, d_in)."""
    module = torch.nn.Linear(gradients[0].shape[1], gradients[0].shape[0], bias=False)
    recorder = GradientRecorder({"weight": module}, q=q)
    for gradient in gradients:
        module.weight.grad = gradient.float()
        recorder.snapshot()
    return recorder.records["weight"]


def test_overlap_finds_a_planted_subspace_and_nothing_in_noise():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(96, 6))[0], torch.linalg.qr(normal(64, 6))[0]
    planted = recorded([left @ normal(6, 6) @ right.T + 0.05 * normal(96, 64) / 8 for _ in range(6)])
    noise = recorded([normal(96, 64) for _ in range(6)])
    for record, expected, within in ((planted, 1.0, 0.03), (noise, 6 / 96, 0.03)):
        overlaps = [subspace_overlap(a, b) for a, b in itertools.pairwise(record.bases)]
        assert np.mean(overlaps) == pytest.approx(expected, abs=within)
    assert planted.cumulative_ranks[-1] <= 6 < noise.cumulative_ranks[-1]
    assert abs(late_cosine(noise)) < 0.1


def test_recorded_cosines_and_ranks_are_those_of_the_gradients():
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    gradients = [first + 0.7 * torch.randn(40, 30, generator=generator, dtype=torch.float64) for _ in range(4)]
    record = recorded(gradients)
    flat = np.stack([g.float().flatten().numpy() for g in gradients[2:]])
    assert late_cosine(record) == pytest.approx(np.corrcoef(flat)[0, 1], abs=0.06)
    values = np.linalg.svd(gradients[0].numpy(), compute_uv=False)
    np.testing.assert_allclose(record.spectra[0], values / values[0], atol=1e-6)
    share = np.cumsum(values**2) / np.sum(values**2)
    assert energy_rank(record.spectra[0]) == np.searchsorted(share, 0.9) + 1


def test_gradients_settle_as_a_model_trains(trained_llama):
    """Neighbouring snapshots share more of their subspace late than early, in every role, and more than by chance."""
    weights, _, records = trained_llama
    ranks = retained_ranks({name.removesuffix(".weight"): weight for name, weight in weights.items()}, 0.5)
    report = stability_report(records, ranks, {name: name.rpartition(".")[2] for name in records})
    early, late, chance = (report.column(name) for name in ("overlap, early", "late", "by chance"))
    assert all(b > a > c for a, b, c in zip(early, late, chance, strict=True))
    own = [late_cosine(record) for record in records.values()]
    expected = scipy.stats.spearmanr(own, list(ranks.values())).statistic
    assert f"{expected:.2f}" in report.findings[-1]


def test_stability_refuses_what_it_cannot_record():
    module = torch.nn.Linear(4, 3)
    recorder = GradientRecorder({"a": module}, q=2)
    with pytest.raises(RunError, match="a: no gradient"):
        recorder.snapshot()
    module.weight.grad = torch.full((3, 4), torch.nan)
    with pytest.raises(RunError, match="a: its gradient is not finite"):
        recorder.snapshot()
    with pytest.raises(InputError, match="needs modules"):
        GradientRecorder({})
    with pytest.raises(InputError, match="at least three snapshots"):
        stability_report(recorder.records, {"a": 2})
    with pytest.raises(InputError, match="of the same matrices"):
        stability_report(recorder.records, {"b": 2})
    with pytest.raises(InputError, match="one shape"):
        subspace_overlap(torch.eye(3)[:, :2], torch.eye(3)[:, :1])


@pytest.fixture(scope="module")
def smollm2_spectra(smollm2):
    sites = analyse(smollm2).sites
    weights = [smollm2.get_submodule(site.name).weight.detach() for site in sites]
    return [(site.d_out, site.d_in) for site in sites], [torch.linalg.svdvals(weight) for weight in weights]


def test_thresholds_of_a_real_model(smollm2_spectra):
    """No table serves all models: SmolLM2's thresholds are not LLaMA-2's."""
    shapes, spectra = smollm2_spectra
    sizes = np.array([min(shape) for shape in shapes])
    found, counts, effective = [], [], []
    for err in (0.1, 0.2, 0.3, 0.4, 0.5):
        k = global_threshold(spectra, err)
        ranks = [max(1, int((normalize_spectrum(s) >= k).sum())) for s in spectra]
        low_rank = np.array(split_components(ranks, shapes, "half"))
        found.append(k)
        counts.append(int(low_rank.sum()))
        effective.append(float((sizes - ranks)[low_rank].sum() / sizes.sum()))
    print(found, counts, effective)
    np.testing.assert_allclose(found, [0.0488, 0.0971, 0.1426, 0.1887, 0.2376], atol=1e-3)
    np.testing.assert_allclose(counts, [2, 7, 27, 64, 104], atol=1)
    assert effective[2] == pytest.approx(0.089, abs=0.005)
    assert effective[4] == pytest.approx(0.365, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("pivoted", [False, True])
def test_welore_beats_uniform_budgets_on_a_real_model(smollm2_name, smollm2_tokenizer, wikitext, pivoted):
    """20 % removed by whitened SVD, ranks from the weights' own spectra; without the pivot form as published."""
    stream = {split: text.tokenize(smollm2_tokenizer, [wikitext[split]]) for split in ("valid", "test")}
    tokens = text.pack(stream["valid"], 32, 512, "valid")
    found = {}
    for allocation in ("uniform", "welore"):
        model = load_model(locate(smollm2_name))
        compress(model, tokens=tokens, method="svd_llm", ratio=0.2, allocation=allocation, pivot=pivoted)
        found[allocation] = perplexity(model, windows(stream["test"], 1024, 8, "test")).perplexity
    print(found, f"{found['welore'] / found['uniform']:.2f}")
    assert found["welore"] <= 0.95 * found["uniform"]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_spectra_and_thresholds(toy):
    for bad in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match=r"err must be in \(0, 1\)"):
            global_threshold(toy, bad)
        with pytest.raises(InputError, match=r"ratio must be in \(0, 1\)"):
            threshold_for_parameters(toy, SHAPES, bad)
    with pytest.raises(InputError, match="no spectra"):
        global_threshold([], 0.5)
    with pytest.raises(InputError, match="finite and not negative"):
        global_threshold([-toy[0]], 0.5)
    with pytest.raises(InputError, match="finite and not negative"):
        global_threshold([toy[0] * torch.nan], 0.5)
    with pytest.raises(InputError, match=r"a matrix of shape \(40, 60\) has 40 singular values; got 47"):
        threshold_for_parameters(toy[1:2], [(40, 60)], 0.3)
    with pytest.raises(InputError, match="as many shapes as spectra"):
        threshold_for_parameters(toy, SHAPES[1:], 0.3)
    with pytest.raises(InputError, match=r"ratio 0\.99 cannot be reached .* at most 0\.9\d+ can be removed"):
        threshold_for_parameters(toy, SHAPES, 0.99)


def test_bad_options_and_profiles(toy):
    units, profiles = toy_units(toy)
    with pytest.raises(InputError, match="needs a profile for each of the 6 units"):
        WeLore().allocate(units, None, 0.3)
    with pytest.raises(ValueError, match="less than 1"):
        WeLoreOptions(err=1.0)
    with pytest.raises(ValueError, match="'weight' or 'whitened'"):
        WeLoreOptions(spectrum="raw")
    with pytest.raises(InputError, match=r"ratio 0\.99 leaves less than rank 1 a unit"):
        WeLore().allocate(units, profiles, 0.99)

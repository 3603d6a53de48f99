"""CoSpaDi: sizes, both solvers against textbook references, real layers, and the whole model."""

import math
import time

import numpy as np
import pytest
import torch
from llmcompress_eval.perplexity import perplexity
from safetensors import safe_open
from sklearn.linear_model import orthogonal_mp_gram
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmcompress
from llmcompress.calibration.collect import InputStatistics, capture_inputs
from llmcompress.checkpoint.install import install, structured_layers
from llmcompress.checkpoint.quantizer import attach
from llmcompress.compressors import dictionary_learning
from llmcompress.compressors.cospadi import (
    CoSpaDi,
    CoSpaDiOptions,
    cospadi,
    cospadi_shared,
    dictionary_sizes,
    hard_thresholding_pursuit,
    ksvd_sweep,
    learn_dictionary,
    mod_update,
    omp,
    sizes_within,
    stored_bits,
)
from llmcompress.compressors.dictionary_learning import initial_dictionary
from llmcompress.compressors.factors import pivot
from llmcompress.compressors.ranks import rank_costs, rank_for, rank_within
from llmcompress.compressors.svd_llm import svd_llm_factorize
from llmcompress.compressors.whitening import damped_cholesky
from llmcompress.errors import InputError
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.layers.sparse_dictionary import SparseDictionaryLinear
from llmcompress.models.structure import analyse
from llmcompress.types import Budget, Problem, Site, Statistics

DICTIONARY = CoSpaDi(CoSpaDiOptions(structure="cospadi"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def unit_atoms(*shape, seed=0, dtype=torch.float64):
    atoms = normal(*shape, seed=seed, dtype=dtype)
    return atoms / atoms.norm(dim=0)


def dense_codes(indices, values, k):
    return values.new_zeros(len(values), k).scatter_(1, indices, values)


def squared_error(y, dictionary, indices, values):
    return float((y - dictionary @ dense_codes(indices, values, dictionary.shape[1]).T).square().sum())


def correlated(n=400, d_in=48, seed=0):
    """Rows X (n, d_in) with scales over two decades in a rotated basis."""
    rotation = torch.linalg.qr(normal(d_in, d_in, seed=seed))[0]
    return normal(n, d_in, seed=seed + 1) * torch.logspace(0, -2, d_in, dtype=torch.float64) @ rotation


def relative(X, weight, layer):
    wanted = X @ weight.T
    return float((wanted - X @ layer.to_dense().detach().to(X).T).norm() / wanted.norm())


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "bits", "expected"),
    [
        ((4096, 12288), 14, (3932, 1966)),
        ((4096, 12288), 16, (3657, 1828)),
        ((576, 576), 14, (307, 153)),
        ((576, 192), 14, (131, 65)),
        ((576, 1536), 14, (526, 263)),
        ((1536, 576), 14, (388, 194)),
    ],
)
def test_sizes_are_the_papers_and_fill_the_budget(shape, bits, expected):
    assert dictionary_sizes(*shape, 0.2, value_bits=bits) == expected
    assert 0.99 <= stored_bits(*shape, *expected, bits) / (0.8 * 16 * math.prod(shape)) <= 1


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.55])
@pytest.mark.parametrize("rho", [1.0, 1.7, 2.0, 4.0])
def test_sizes_with_padding_are_the_largest_that_fit(ratio, rho):
    d_in, d_outs = 61, [90, 33]
    budget = (1 - ratio) * d_in * sum(d_outs)
    found = sizes_within(budget, d_in, d_outs, rho, 14)

    def cost(k, s):
        return 16 * d_in * k + 8 * sum(d_outs) * (math.ceil(k / 8) + math.ceil(14 * s / 8))

    assert found.values * 16 == cost(found.atoms, found.nonzeros) <= 16 * budget
    assert cost(found.atoms + 1, int((found.atoms + 1) / rho)) > 16 * budget
    assert found.nonzeros >= int(found.atoms / rho)
    assert found.nonzeros == found.atoms or cost(found.atoms, found.nonzeros + 1) > 16 * budget


# --- sparse coding ---------------------------------------------------------------------------------------------------


def textbook_omp(y, D, s):
    codes = np.zeros((y.shape[1], D.shape[1]))
    for column in range(y.shape[1]):
        chosen, residual = [], y[:, column]
        for _ in range(s):
            correlations = np.abs(D.T @ residual)
            correlations[chosen] = -1
            chosen.append(int(correlations.argmax()))
            solution = np.linalg.lstsq(D[:, chosen], y[:, column], rcond=None)[0]
            residual = y[:, column] - D[:, chosen] @ solution
        codes[column, chosen] = solution
    return codes


def test_omp_is_the_textbooks_and_scikit_learns():
    D, y = unit_atoms(20, 30), normal(20, 150, seed=1)
    indices, values = omp(y, D, 5)
    found = dense_codes(indices, values, 30).numpy()
    assert (indices.diff(dim=1) > 0).all()
    np.testing.assert_allclose(found, textbook_omp(y.numpy(), D.numpy(), 5), atol=1e-10)
    oracle = orthogonal_mp_gram((D.T @ D).numpy(), (D.T @ y).numpy(), n_nonzero_coefs=5)
    np.testing.assert_allclose(found, oracle.T, atol=1e-10)


def test_omp_fills_up_columns_that_are_exact_early_and_survives_twin_atoms():
    D = unit_atoms(20, 30)
    D[:, 7] = D[:, 3]
    y = torch.stack((2 * D[:, 3], torch.zeros(20, dtype=torch.float64), D[:, 3] + D[:, 9]), dim=1)
    indices, values = omp(y, D, 5)
    assert all(len(set(row)) == 5 for row in indices.tolist())
    assert torch.isfinite(values).all()
    torch.testing.assert_close(D @ dense_codes(indices, values, 30).T, y, rtol=0, atol=1e-10)


def test_pursuit_on_an_orthonormal_dictionary_is_the_hard_threshold():
    D = torch.linalg.qr(normal(40, 40, dtype=torch.float32))[0][:, :30].contiguous()
    y = normal(40, 300, seed=1, dtype=torch.float32)
    indices, values = hard_thresholding_pursuit(y, D, 8)
    products = (y.T @ D).numpy()
    expected = np.zeros_like(products)
    order = np.argsort(-np.abs(products), axis=1)[:, :8]
    np.put_along_axis(expected, order, np.take_along_axis(products, order, 1), 1)
    np.testing.assert_allclose(dense_codes(indices, values, 30), expected, atol=1e-5)


def test_pursuit_ends_at_least_squares_on_its_support_and_below_its_start():
    D, y = unit_atoms(40, 60), normal(40, 400, seed=1)
    start = omp(y, D, 6)
    for begun in (None, start):
        indices, values = hard_thresholding_pursuit(y, D, 6, begun)
        exact = torch.linalg.lstsq(D[:, indices].permute(1, 0, 2), y.T[..., None]).solution[..., 0]
        torch.testing.assert_close(values, exact, rtol=0, atol=1e-6)
        assert (indices.diff(dim=1) > 0).all()
    assert squared_error(y, D, indices, values) < squared_error(y, D, *start)
    thresholded = (y.T @ D).abs().topk(6).indices.sort(1).values
    solved = torch.linalg.lstsq(D[:, thresholded].permute(1, 0, 2), y.T[..., None]).solution[..., 0]
    pursued = hard_thresholding_pursuit(y, D, 6)
    assert squared_error(y, D, *pursued) < 0.95 * squared_error(y, D, thresholded, solved)


# --- dictionary updates ----------------------------------------------------------------------------------------------


def test_mod_is_least_squares_in_the_dictionary():
    y, D = normal(20, 400), unit_atoms(20, 30, seed=1)
    indices, values = omp(y, D, 4)
    codes = dense_codes(indices, values, 30)
    atoms, scaled, unused = mod_update(y, D, codes)
    expected = np.linalg.lstsq(codes.numpy(), y.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose((atoms @ scaled.T), expected @ codes.numpy().T, atol=1e-6)
    torch.testing.assert_close(atoms.norm(dim=0), torch.ones(30, dtype=torch.float64))
    assert unused == 0


def test_mod_keeps_and_counts_unused_atoms():
    y, D = normal(20, 100), unit_atoms(20, 30, seed=1)
    codes = dense_codes(*omp(y, D[:, :28], 4), 30)
    atoms, scaled, unused = mod_update(y, D, codes)
    assert unused >= 2
    assert torch.equal(atoms[:, 28:], D[:, 28:])
    assert not scaled[:, 28:].any()


def test_ksvd_sweeps_lower_the_error_at_a_fixed_support():
    y, D = normal(20, 600) @ torch.diag(torch.rand(600, generator=seeded(), dtype=torch.float64)), unit_atoms(20, 50)
    indices, values = omp(y, D, 3)
    errors = [squared_error(y, D, indices, values)]
    for _ in range(3):
        D, values, unused = ksvd_sweep(y, D, indices, values)
        errors.append(squared_error(y, D, indices, values))
        torch.testing.assert_close(D.norm(dim=0), torch.ones(50, dtype=torch.float64))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert unused == 0


def test_a_ksvd_step_is_the_best_rank_one_term():
    """One atom: a sweep is the power method on y itself, whose limit is numpy's first singular value."""
    y = normal(12, 30)
    D, indices = unit_atoms(12, 1, seed=1), torch.zeros(30, 1, dtype=torch.int64)
    values = (D.T @ y).T
    for _ in range(30):
        D, values, _ = ksvd_sweep(y, D, indices, values)
    singular = np.linalg.svd(y.numpy(), compute_uv=False)
    assert squared_error(y, D, indices, values) == pytest.approx(float((singular[1:] ** 2).sum()), rel=1e-9)


def test_ksvd_replaces_an_unused_atom_by_the_worst_column():
    y, D = normal(20, 100), unit_atoms(20, 30, seed=1)
    indices, values = omp(y, D[:, :29], 3)
    found, _, unused = ksvd_sweep(y, D, indices, values)
    codes = dense_codes(indices, values, 30)
    used = int((codes != 0).any(0).sum())
    assert unused == 30 - used
    rest = y - found[:, :29] @ dense_codes(indices, ksvd_sweep(y, D, indices, values)[1], 30)[:, :29].T
    worst = rest[:, rest.square().sum(0).argmax()]
    torch.testing.assert_close(found[:, 29], worst / worst.norm())


def planted(seed):
    D = unit_atoms(20, 50, seed=seed)
    generator = seeded(seed + 100)
    indices = torch.rand(1500, 50, generator=generator).topk(3).indices
    values = torch.randn(1500, 3, generator=generator, dtype=torch.float64)
    return D, D @ dense_codes(indices, values, 50).T


def recovered(planted_atoms, found):
    return float(((planted_atoms.T @ found).abs().max(1).values > 0.99).double().mean())


@pytest.mark.slow
def test_planted_dictionaries_are_recovered():
    ksvd, mod = [], []
    for seed in range(4):
        D, y = planted(seed)
        learnt = learn_dictionary(y, 50, 3, "ksvd", iterations=60, tolerance=0.0, generator=seeded(seed))
        ksvd.append(recovered(D, learnt.dictionary))
        atoms = y[:, torch.randperm(1500, generator=seeded(seed))[:50]]
        atoms = atoms / atoms.norm(dim=0)
        for _ in range(60):
            atoms = mod_update(y, atoms, dense_codes(*omp(y, atoms, 3), 50))[0]
        mod.append(recovered(D, atoms))
    print("recovered: K-SVD", ksvd, "MOD", mod)
    assert np.mean(ksvd) >= 0.80
    assert np.mean(mod) >= 0.80


@pytest.mark.parametrize("shape", [(40, 120), (40, 30), (120, 40)])
def test_start_is_the_singular_vectors(shape):
    y = normal(*shape) * torch.logspace(0, -2, shape[1], dtype=torch.float64)
    u = np.linalg.svd(y.numpy(), full_matrices=False)[0][:, :20]
    found = initial_dictionary(y, 20, 10, seeded())
    np.testing.assert_allclose(found @ found.T, u @ u.T, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 7, 40])
def test_start_beyond_the_rank_has_unit_atoms(rank):
    y = normal(40, rank) @ normal(rank, 200, seed=1)
    found = initial_dictionary(y, 55, 27, seeded())
    torch.testing.assert_close(found.norm(dim=0), torch.ones(55, dtype=torch.float64))


@pytest.mark.parametrize("k", [30, 60])
def test_history_falls_and_ends_at_the_error_of_the_result(k):
    y = (correlated(200, 48).T @ normal(200, 300, seed=5)).float()
    learnt = learn_dictionary(y, k, k // 2, iterations=12, tolerance=0.0)
    history = np.array(learnt.history)
    assert (history[1:] <= history[:-1] * (1 + 1e-5)).all()
    assert history[-1] < 0.9 * history[0]
    assert float((y - learnt.to_dense()).norm() / y.norm()) == pytest.approx(history[-1], rel=1e-3)
    assert learnt.indices.shape == learnt.values.shape == (300, k // 2)


def test_extrapolation_pays():
    """Against the same rounds without it: coding and MOD, from the same start."""
    y = (correlated(200, 48).T @ normal(200, 300, seed=5)).float()
    D = initial_dictionary(y, 36, 18, seeded())
    coded = hard_thresholding_pursuit(y, D, 18)
    for _ in range(8):
        D, codes, _ = mod_update(y, D, dense_codes(*coded, 36))
        coded = hard_thresholding_pursuit(y, D, 18, (coded[0], codes.gather(1, coded[0])))
    plain = math.sqrt(squared_error(y, D, *coded)) / float(y.norm())
    assert learn_dictionary(y, 36, 18, iterations=9, tolerance=0.0).history[-1] < 0.98 * plain


def test_a_round_that_overshoots_is_undone(monkeypatch):
    y = (correlated(200, 48).T @ normal(200, 300, seed=5)).float()
    monkeypatch.setattr(dictionary_learning, "MOMENTUM", 8.0)
    history = np.array(learn_dictionary(y, 36, 18, iterations=8, tolerance=0.0).history)
    assert (np.diff(history) <= 0).all()
    assert len(history) < 8


def test_tolerance_stops_early_and_seed_decides():
    y = (correlated(200, 48).T @ normal(200, 300, seed=5)).float()
    assert len(learn_dictionary(y, 30, 15, tolerance=0.5).history) < len(learn_dictionary(y, 30, 15).history)
    a, b, c = (learn_dictionary(y, 30, 4, "ksvd", iterations=2, generator=seeded(n)) for n in (1, 1, 2))
    assert torch.equal(a.dictionary, b.dictionary)
    assert not torch.equal(a.dictionary, c.dictionary)


# --- the compressor --------------------------------------------------------------------------------------------------


def sites_of(block=0, d=48):
    at = f"layers.{block}."
    return [Site(at + role, role, block, d, d_out, at + "q", bias=role == "q")
            for role, d_out in (("q", 48), ("k", 16), ("v", 16))] + [
            Site(at + "down", "down", block, 80, d, at + "down")]  # fmt: skip


def problem_for(unit, tokens=400, dtype=torch.float32):
    inputs = {site.input: correlated(tokens, site.d_in, seed=len(site.input) + 7 * site.block) for site in unit}
    grams = {name: X.T @ X for name, X in inputs.items()}
    weights = [normal(site.d_out, site.d_in, seed=i).to(dtype) for i, site in enumerate(unit)]
    biases = [normal(site.d_out).to(dtype) if site.bias else None for site in unit]
    statistics = []
    for i, site in enumerate(unit):
        g = normal(300, site.d_out, seed=20 + i) * torch.logspace(0, -2, site.d_out, dtype=torch.float64)
        gradients = Statistics(backward_tokens=300, output_gram=g.T @ g)
        statistics.append(Statistics(tokens=tokens, gram=grams[site.input]) + gradients)
    return Problem(list(unit), weights, biases, statistics), inputs


def output_error(problem, inputs, layers):
    missed = total = 0.0
    for site, weight, bias, layer in zip(problem.sites, problem.weights, problem.biases, layers, strict=True):
        X, W = inputs[site.input], weight.double()
        y = layer.double()(X).detach() - (0 if bias is None else bias.double())
        missed, total = missed + float((y - X @ W.T).square().sum()), total + float((X @ W.T).square().sum())
    return math.sqrt(missed / total)


@pytest.mark.parametrize("share", ["input", "none", "layers"])
@pytest.mark.parametrize("structure", ["cospadi", "low_rank", "auto"])
def test_budget_plan_storage_and_error_agree(share, structure):
    method = CoSpaDi(CoSpaDiOptions(share=share, structure=structure))
    sites = [site for block in range(2) for site in sites_of(block)]
    units = method.units(sites)
    assert sorted(site.name for unit in units for site in unit) == sorted(site.name for site in sites)
    for unit in units:
        problem, inputs = problem_for(unit)
        budget = Budget.for_ratio(unit, 0.3)
        done = method.compress(problem, budget, seeded())
        plan = method.plan(unit, budget)
        assert sum(layer.storage_values for layer in done.layers) <= budget.values
        assert all(t.is_contiguous() for layer in done.layers for t in layer.state_dict().values())
        owner = unit[0].name
        name = "A" if isinstance(done.layers[0], LowRankLinear) else "dictionary"
        assert [layer.shared for layer in done.layers] == [{}] + [{name: owner}] * (len(unit) - 1)
        assert len({id(getattr(layer, name)) for layer in done.layers}) == 1
        if name == "dictionary":
            assert sum(layer.storage_values for layer in done.layers) == plan["values"]
            assert all((layer.atoms, layer.nonzeros) == (plan["atoms"], plan["nonzeros"]) for layer in done.layers)
        assert done.error == pytest.approx(output_error(problem, inputs, done.layers), rel=1e-4)


def test_units_of_each_sharing():
    sites = [site for block in range(2) for site in sites_of(block)]
    names = {
        share: [[site.name for site in unit] for unit in CoSpaDi(CoSpaDiOptions(share=share)).units(sites)]
        for share in ("input", "none", "layers")
    }
    assert ["layers.0.q", "layers.0.k", "layers.0.v"] in names["input"]
    assert all(len(unit) == 1 for unit in names["none"])
    assert ["layers.0.k", "layers.1.k"] in names["layers"]


def test_output_error_is_whitened_error():
    """The identity that the method rests on: ||X E||_F = ||L E||_F."""
    X, E = correlated(), normal(48, 30, seed=9)
    upper, repair = damped_cholesky(X.T @ X)
    assert repair is None
    assert float((X @ E).norm()) == pytest.approx(float((upper @ E).norm()), rel=1e-9)


def test_layer_is_the_dictionary_of_the_whitened_weight():
    """Undone by hand: solve with the Cholesky factor, and the result has the error that the dictionary had."""
    problem, inputs = problem_for([sites_of()[3]])
    X, W = inputs["layers.0.down"], problem.weights[0].double()
    layer = cospadi(problem.weights[0], X.T @ X, 0.3, generator=seeded())
    y = torch.linalg.cholesky(X.T @ X).T @ W.T
    y = (y / (y.norm() / math.sqrt(48))).float()
    learnt = learn_dictionary(y, layer.atoms, layer.nonzeros, generator=seeded())
    assert relative(X, W, layer) == pytest.approx(learnt.history[-1], rel=0.03)
    assert relative(X, W, layer) >= learnt.history[-1]


def test_a_shared_dictionary_beats_private_ones_and_low_rank_and_weights():
    problem, inputs = problem_for(sites_of()[:3])
    X = inputs["layers.0.q"]
    gram = X.T @ X
    shared = cospadi_shared(problem.weights, [gram] * 3, 0.3)
    private = [cospadi(weight, gram, 0.3) for weight in problem.weights]
    assert isinstance(shared[0], SparseDictionaryLinear)
    assert shared[1].dictionary is shared[0].dictionary
    assert shared[0].atoms > private[1].atoms
    problem.biases = [None] * 3
    assert output_error(problem, inputs, shared) < output_error(problem, inputs, private)


def test_output_weights_lower_the_weighted_error():
    unit = sites_of()[:3]
    problem, inputs = problem_for(unit)

    def weighted(layers):
        total = 0.0
        for site, weight, layer, statistics in zip(unit, problem.weights, layers, problem.statistics, strict=True):
            h = statistics.output_gram.diagonal() / statistics.backward_tokens
            missed = inputs[site.input] @ (weight.double() - layer.to_dense().double()).T
            total += float((missed.square().sum(0) * h).sum())
        return total

    plain, aware = (CoSpaDi(CoSpaDiOptions(structure="cospadi", output_weights=kind)) for kind in ("none", "diagonal"))
    assert plain.needs == {"gram"}
    assert aware.needs == {"gram", "output_gram"}
    budget = Budget.for_ratio(unit, 0.3)
    found = {m: m.compress(problem, budget, seeded()) for m in (plain, aware)}
    assert weighted(found[aware].layers) < 0.7 * weighted(found[plain].layers)
    assert found[aware].error > found[plain].error


def test_equal_output_weights_change_nothing():
    unit = sites_of()[:3]
    problem, _ = problem_for(unit)
    for statistics, site in zip(problem.statistics, unit, strict=True):
        statistics.output_gram = 300 * torch.eye(site.d_out, dtype=torch.float64)
    plain, aware = (
        CoSpaDi(CoSpaDiOptions(structure="cospadi", output_weights=kind)).compress(
            problem, Budget.for_ratio(unit, 0.3), seeded()
        )
        for kind in ("none", "diagonal")
    )
    assert plain.error == pytest.approx(aware.error, rel=1e-3)


def test_auto_takes_the_lower_error_and_says_so():
    """A weight of low rank under white inputs is the one's, a weight without structure the other's."""
    site = Site("layers.0.gate", "gate", 0, 48, 200, "layers.0.gate")
    statistics = Statistics(tokens=400, gram=400 * torch.eye(48, dtype=torch.float64))
    method = CoSpaDi(CoSpaDiOptions(structure="auto"))
    kinds = {}
    for rank in (8, 48):
        weight = (normal(200, rank) @ normal(rank, 48, seed=1) + 1e-3 * normal(200, 48, seed=2)).float()
        problem = Problem([site], [weight], [None], [statistics])
        budget = Budget.for_ratio([site], 0.45)
        done = method.compress(problem, budget, seeded())
        kinds[rank] = done.layers[0].kind
        others = [
            CoSpaDi(CoSpaDiOptions(structure=structure)).compress(problem, budget, seeded())
            for structure in ("cospadi", "low_rank")
        ]
        assert done.error == min(other.error for other in others)
        assert "kept; calibration errors at equal size: dictionary" in done.notes[-1]
    assert kinds == {8: "low_rank", 48: "sparse_dictionary"}


def test_profile_is_the_whitened_spectrum_with_a_floor_under_its_costs():
    unit = sites_of()[:3]
    problem, inputs = problem_for(unit)
    profile = DICTIONARY.profile(problem)
    X, W = inputs["layers.0.q"].numpy(), torch.cat(problem.weights).double().numpy()
    np.testing.assert_allclose(profile.spectrum, np.linalg.svd(X @ W.T, compute_uv=False)[:48], rtol=1e-6)
    assert profile.dense == 48 * 80
    expected = rank_costs(48, [48, 16, 16], pivoted=True)
    np.testing.assert_allclose(profile.costs, expected.clamp_min(0.35 * 48 * 80), rtol=1e-12)
    aware = CoSpaDi(CoSpaDiOptions(structure="cospadi", output_weights="diagonal")).profile(problem)
    assert not np.allclose(aware.spectrum / aware.spectrum[0], profile.spectrum / profile.spectrum[0], rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_compute_in_the_weights_dtype_and_keep_the_bias(dtype):
    unit = sites_of()[:3]
    problem, _ = problem_for(unit, dtype=dtype)
    layers = DICTIONARY.compress(problem, Budget.for_ratio(unit, 0.3), seeded()).layers
    assert layers[0](torch.ones(2, 48, dtype=dtype)).dtype == dtype
    assert torch.equal(layers[0].bias, problem.biases[0])
    assert layers[0].dictionary.dtype == torch.bfloat16


# --- the checkpoint --------------------------------------------------------------------------------------------------


def tiny_llama(dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=120, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()  # not .to(): that rounds the rotary frequencies


def tensors_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_model_has_the_same_bits_and_the_file_holds_what_is_counted(dtype, tmp_path):
    model = tiny_llama(dtype)
    tokens = torch.randint(0, 120, (8, 32), generator=seeded())
    dense = {name: p.numel() for name, p in model.named_parameters() if "_proj" in name}
    llmcompress.compress(model, method="cospadi", structure="cospadi", ratio=0.3, tokens=tokens)
    model.save_pretrained(tmp_path / "one")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, back(tokens).logits)
    layers = structured_layers(back)
    assert len(layers) == len(dense) == 14
    held = {name: t for name, t in tensors_in(tmp_path / "one").items() if name.rpartition(".")[0] in layers}
    stored = sum(t.numel() * t.element_size() for t in held.values())
    assert 8 * stored == sum(layer.storage_bits for layer in layers.values())
    assert 0.95 * 0.7 <= stored / 2 / sum(dense.values()) <= 0.7
    back.save_pretrained(tmp_path / "two")
    again = tensors_in(tmp_path / "two")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors_in(tmp_path / "one").items())


def test_a_model_of_both_structures_reloads_bit_for_bit(tmp_path):
    model = tiny_llama()
    tokens = torch.randint(0, 120, (8, 32), generator=seeded())
    llmcompress.compress(model, method="cospadi", ratio=0.2, tokens=tokens)
    assert {layer.kind for layer in structured_layers(model).values()} == {"low_rank", "sparse_dictionary"}
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, back(tokens).logits)


def test_a_compressed_model_can_be_fine_tuned_saved_and_loaded(tmp_path):
    model = tiny_llama()
    tokens = torch.randint(0, 120, (8, 32), generator=seeded())
    llmcompress.compress(model, method="cospadi", structure="cospadi", ratio=0.3, tokens=tokens)
    with torch.no_grad():
        before = model(tokens).logits
    for layer in structured_layers(model).values():
        layer.unpack()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=1e-5)
    optimizer = torch.optim.AdamW(
        [p for n, p in model.named_parameters() if n.endswith(("values", "dictionary"))], 3e-3
    )
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path / "training")
    training = AutoModelForCausalLM.from_pretrained(tmp_path / "training")
    with torch.no_grad():
        assert torch.equal(training(tokens).logits, model(tokens).logits)
    for layer in structured_layers(model).values():
        layer.pack()
    model.save_pretrained(tmp_path / "stored")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    with torch.no_grad():
        assert torch.equal(stored(tokens).logits, model(tokens).logits)
        assert stored(tokens, labels=tokens).loss.item() == pytest.approx(losses[-1], abs=0.05)


# --- real layers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer_12(smollm2, smollm2_tokenizer, wikitext):
    """Weights of the block by role, and its inputs: 3072 calibration tokens and 1024 others. float64."""
    layer, inputs = smollm2.model.layers[12], {}
    modules = {
        **{role: getattr(layer.self_attn, f"{role}_proj") for role in ("q", "k", "v")},
        **{role: getattr(layer.mlp, f"{role}_proj") for role in ("gate", "up")},
    }
    hooks = [module.register_forward_pre_hook(lambda _, args, role=role: inputs.update({role: args[0].detach()}))
             for role, module in modules.items()]  # fmt: skip
    tokens = smollm2_tokenizer(wikitext["valid"][:60000], return_tensors="pt").input_ids[0, :4096]
    with torch.no_grad():
        smollm2.model(tokens.view(8, 512))
    for hook in hooks:
        hook.remove()
    rows = {role: inputs[role].flatten(0, 1).double() for role in modules}
    return {role: (module.weight.detach(), rows[role][:3072], rows[role][3072:]) for role, module in modules.items()}


def low_rank_errors(weight, seen, held_out, ratio):
    """Held-out errors of the whitened SVD, plain and in the pivot form of the same size."""
    d_out, d_in = weight.shape
    ranks = rank_for(d_in, d_out, ratio), rank_within(rank_costs(d_in, [d_out], True), (1 - ratio) * d_in * d_out)
    found = [svd_llm_factorize(weight.double(), seen.T @ seen, rank) for rank in ranks]
    return relative(held_out, weight.double(), found[0]), relative(held_out, weight.double(), pivot(found[1]))


@pytest.mark.parametrize(
    ("role", "limits"), [("k", {0.2: 0.83, 0.4: 0.90}), ("q", {0.2: 0.70, 0.4: 0.79}), ("gate", {0.2: 0.50, 0.4: 0.69})]
)
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_private_dictionaries_beat_the_whitened_svd_on_held_out_tokens(layer_12, role, limits, ratio):
    weight, seen, held_out = layer_12[role]
    layer = cospadi(weight, seen.T @ seen, ratio)
    error = relative(held_out, weight.double(), layer)
    whitened, pivoted = low_rank_errors(weight, seen, held_out, ratio)
    print(f"{role} {ratio}: dictionary {error:.4f}, whitened SVD {whitened:.4f}, pivoted {pivoted:.4f}")
    assert error <= limits[ratio] * whitened


def whitened_weight(weight, seen):
    y = damped_cholesky(seen.T @ seen)[0] @ weight.double().T
    return (y / (y.norm() / math.sqrt(y.shape[1]))).float()


@pytest.mark.slow
def test_fast_solver_is_better_than_twenty_ksvd_sweeps_in_a_third_of_the_time(layer_12):
    weight, seen, _ = layer_12["k"]
    y = whitened_weight(weight, seen)
    k, s = dictionary_sizes(576, 192, 0.2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processor time is then the work, not the waiting of threads for one another
    try:
        started = time.process_time()
        fast = learn_dictionary(y, k, s)
        between = time.process_time()
        reference = learn_dictionary(y, k, s, "ksvd", iterations=20, tolerance=0.0)
        ended = time.process_time()
    finally:
        torch.set_num_threads(threads)
    print(
        f"fast {fast.history[-1]:.4f} in {between - started:.2f} s, "
        f"K-SVD {reference.history[-1]:.4f} in {ended - between:.2f} s"
    )
    assert fast.history[-1] <= reference.history[-1]
    assert between - started <= (ended - between) / 3
    assert all(b <= a * (1 + 1e-5) for a, b in zip(fast.history, fast.history[1:], strict=False))


@pytest.mark.parametrize("role", ["k", "q", "gate"])
def test_stored_form_costs_at_most_three_percent(layer_12, role):
    weight, seen, held_out = layer_12[role]
    layer = cospadi(weight, seen.T @ seen, 0.2)
    y = whitened_weight(weight, seen)
    learnt = learn_dictionary(y, layer.atoms, layer.nonzeros)
    scale = float((damped_cholesky(seen.T @ seen)[0] @ weight.double().T).norm()) / math.sqrt(len(weight))
    exact = torch.linalg.solve_triangular(
        damped_cholesky(seen.T @ seen)[0], scale * learnt.to_dense().double(), upper=True
    )
    wanted = held_out @ weight.double().T
    unrounded = float((held_out @ exact - wanted).norm() / wanted.norm())
    rounded = relative(held_out, weight.double(), layer)
    print(f"{role}: {unrounded:.5f} -> {rounded:.5f}")
    assert rounded <= 1.03 * unrounded


def test_sparse_product_equals_the_dense_one(layer_12):
    weight, seen, held_out = layer_12["q"]
    layer = cospadi(weight, seen.T @ seen, 0.3)
    x = held_out[:64].float()
    packed = layer(x)
    layer.unpack()
    sparse = layer(x).detach()
    assert float((sparse - packed).norm() / packed.norm()) <= 1e-5


def test_sharing_by_input_pays_on_a_real_block(layer_12):
    for roles in (("q", "k", "v"), ("gate", "up")):
        weights, seen, held_out = zip(*(layer_12[role] for role in roles), strict=True)
        gram = seen[0].T @ seen[0]
        shared = cospadi_shared(weights, [gram] * len(roles), 0.2)
        for role, weight, rows, layer in zip(roles, weights, held_out, shared, strict=True):
            together = relative(rows, weight.double(), layer)
            alone = relative(rows, weight.double(), cospadi(weight, gram, 0.2))
            print(f"{role}: private {alone:.4f}, shared {together:.4f}")
            assert together <= (0.8 if role != "q" else 1.0) * alone


@pytest.fixture(scope="module")
def setting_r(smollm2, smollm2_tokenizer, wikitext):
    """Sites, their statistics on 64 x 512 tokens of the validation text, and 16 x 1,024 tokens of the test text."""
    tokens = {
        split: smollm2_tokenizer(wikitext[split], return_tensors="pt").input_ids[0, : rows * length].view(rows, length)
        for split, rows, length in (("valid", 64, 512), ("test", 16, 1024))
    }
    sites = analyse(smollm2).sites
    collected = InputStatistics(sites, frozenset({"gram"}), torch.device("cpu"))
    with torch.no_grad(), capture_inputs(smollm2, sites, collected.receive):
        for rows in tokens["valid"].split(4):
            smollm2.model(rows)
    return sites, collected.sums, tokens["test"]


def compressed_perplexity(smollm2, setting, options, ratio, folder):
    """Of the reloaded checkpoint, in its stored form."""
    import copy

    sites, statistics, test = setting
    method = CoSpaDi(options)
    layers, start = {}, time.process_time()
    for unit in method.units(sites):
        weights = [smollm2.get_parameter(f"{site.name}.weight").detach() for site in unit]
        problem = Problem(unit, weights, [None] * len(unit), [statistics[site.input] for site in unit])
        found = method.compress(problem, Budget.for_ratio(unit, ratio), seeded()).layers
        layers |= {site.name: layer for site, layer in zip(unit, found, strict=True)}
    print(f"{options.structure}, share {options.share}, {ratio:.0%} removed: {time.process_time() - start:.0f} CPU s")
    kept = sum(layer.storage_values for layer in layers.values()) / sum(site.dense_values for site in sites)
    assert 0.98 * (1 - ratio) <= kept <= 1 - ratio
    model = copy.deepcopy(smollm2)
    install(model, layers)
    attach(model)
    model.save_pretrained(folder)
    return perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), test).perplexity


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "ratio", "limit"),
    [
        ("none", 0.2, 31), ("none", 0.3, 39), ("none", 0.4, 53),
        ("input", 0.2, 25.0), ("input", 0.3, 29.5), ("input", 0.4, 40.0),
    ],
)  # fmt: skip
def test_whole_model_from_its_stored_form(smollm2, setting_r, tmp_path, share, ratio, limit):
    found = compressed_perplexity(
        smollm2, setting_r, CoSpaDiOptions(structure="cospadi", share=share), ratio, tmp_path / "model"
    )
    print(f"share {share}, {ratio:.0%} removed: perplexity {found:.2f}")
    assert found <= limit


@pytest.mark.slow
def test_auto_beats_both_of_its_structures_on_the_whole_model(smollm2, setting_r, tmp_path):
    found = {
        structure: compressed_perplexity(
            smollm2, setting_r, CoSpaDiOptions(structure=structure), 0.3, tmp_path / structure
        )
        for structure in ("auto", "cospadi", "low_rank")
    }
    print("30% removed, shared by input:", found)
    assert found["auto"] <= min(found["cospadi"], found["low_rank"])


# --- bad and odd input -----------------------------------------------------------------------------------------------


def test_few_tokens_shift_the_gram_and_are_named():
    unit = sites_of()[:3]
    problem, _ = problem_for(unit, tokens=30)
    done = DICTIONARY.compress(problem, Budget.for_ratio(unit, 0.3), seeded())
    assert "30 calibration tokens for 48 inputs: Gram singular (rank 30 of 48)" in done.notes[0]
    assert all(torch.isfinite(layer.to_dense()).all() for layer in done.layers)


@pytest.mark.parametrize("solver", ["fast", "ksvd"])
def test_zero_weights_give_zero(solver):
    unit = sites_of()[:3]
    problem, _ = problem_for(unit)
    problem.weights = [torch.zeros_like(weight) for weight in problem.weights]
    done = CoSpaDi(CoSpaDiOptions(structure="cospadi", solver=solver, iterations=2)).compress(
        problem, Budget.for_ratio(unit, 0.3), seeded()
    )
    assert not any(layer.to_dense().any() for layer in done.layers)
    assert done.error == 0
    assert "atoms are used by no column" in done.notes[-1]


@pytest.mark.parametrize("solver", ["fast", "ksvd"])
def test_duplicated_zero_and_few_distinct_columns(solver):
    weight = normal(3, 48).repeat(20, 1).float()
    weight[7] = 0
    X = correlated()
    layer = cospadi(weight, X.T @ X, 0.3, CoSpaDiOptions(structure="cospadi", solver=solver, iterations=5))
    assert not layer.to_dense()[7].any()
    assert relative(X, weight.double(), layer) < 0.05  # dependent atoms, whose values cancel, feel the rounding
    y = (X @ weight.double().T).float()
    assert learn_dictionary(y, 25, 12, solver, iterations=5).history[-1] < 1e-3


def test_a_generous_budget_leaves_the_weights_dense():
    unit = sites_of()[:1]
    problem, _ = problem_for(unit)
    done = DICTIONARY.compress(problem, Budget(48 * 48), seeded())
    assert done.layers == [None]
    assert "left dense" in done.notes[0]
    assert DICTIONARY.plan(unit, Budget(48 * 48))["values"] == 48 * 48


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2])
def test_ratio_outside_the_unit_interval(ratio):
    with pytest.raises(InputError, match=r"ratio must be in \(0, 1\)"):
        dictionary_sizes(60, 90, ratio)


def test_impossible_sizes():
    with pytest.raises(InputError, match=r"rho, atoms for each non-zero of a column, must be at least 1; got 0\.5"):
        dictionary_sizes(60, 90, 0.3, rho=0.5)
    with pytest.raises(InputError, match="value bits must be between 10 and 16; got 9"):
        dictionary_sizes(60, 90, 0.3, value_bits=9)
    with pytest.raises(InputError, match="below the smallest dictionary"):
        dictionary_sizes(60, 90, 0.99)
    with pytest.raises(InputError, match=r"non-zeros a column must be between 1 and the number of atoms, 9; got 10"):
        learn_dictionary(normal(20, 30), 9, 10)
    with pytest.raises(InputError, match=r"layers\.0\.q: the budget of 10 values is below"):
        DICTIONARY.plan(sites_of()[:1], Budget(10))
    for options in ({"rho": 0.9}, {"value_bits": 17}, {"iterations": 0}, {"tolerance": -1}, {"share": "all"}, {"x": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            CoSpaDiOptions(**options)


def test_bad_weights_grams_and_gradients_name_the_site():
    unit = sites_of()[:1]
    budget = Budget.for_ratio(unit, 0.3)

    def refused(message, change):
        problem, _ = problem_for(unit)
        change(problem)
        with pytest.raises(InputError, match="layers.0.q: " + message):
            CoSpaDi(CoSpaDiOptions(structure="cospadi", output_weights="diagonal")).compress(problem, budget, seeded())

    def set_statistic(name, value):
        return lambda problem: setattr(problem.statistics[0], name, value)

    gram = torch.eye(48, dtype=torch.float64)
    refused("the weight is not finite", lambda problem: problem.weights[0].fill_(torch.inf))
    refused(r"the Gram must be \(48, 48\); got \(47, 47\)", set_statistic("gram", gram[1:, 1:]))
    refused("the Gram is not symmetric", set_statistic("gram", gram + normal(48, 48)))
    refused("the statistic 'gram' is not finite", set_statistic("gram", gram * torch.nan))
    refused("this method needs the statistic 'output_gram'", set_statistic("output_gram", None))
    refused("the output-gradient Gram is zero", set_statistic("output_gram", 0 * gram))
    refused("the output-gradient Gram must have 48 rows; got 47", set_statistic("output_gram", gram[1:, 1:]))


def test_weights_that_share_must_have_one_d_in():
    gram = torch.eye(48, dtype=torch.float64)
    with pytest.raises(InputError, match="as many Grams as weights"):
        cospadi_shared([normal(20, 48)], [], 0.3)
    with pytest.raises(InputError, match=r"weight 1: .*same d_in; got 40, weight 0 has 48"):
        cospadi_shared([normal(20, 48), normal(20, 40)], [gram, gram], 0.3)


def test_a_matrix_that_is_not_finite_is_refused():
    y = normal(20, 30)
    y[3, 4] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        learn_dictionary(y, 10, 5)

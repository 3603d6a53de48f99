"""One-connections: covariances of cyclic models, counts, identifiability, vanishing ideals, and a residual stream."""

import itertools
import math

import networkx as nx
import numpy as np
import pytest
import sympy
import torch
from scipy.stats import spearmanr

from llmcompress.backends.graphs.one_connection import (
    MixedGraph,
    OneConnection,
    OneConnectionOptions,
    covariance_symbolic,
    disjoint_cycle_sets,
    fit_lsem,
    implied_covariance,
    is_generically_finite,
    jacobian_rank,
    one_connections,
    path_decomposition,
    residual_stream_report,
    vanishing_polynomials,
)
from llmcompress.backends.ports import Subject
from llmcompress.errors import InputError
from tests.tiny import tiny_model


def random_graph(n, directed, bidirected, seed):
    generator = np.random.default_rng(seed)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    D = [pairs[k] for k in generator.choice(len(pairs), directed, replace=False)]
    pairs = list(itertools.combinations(range(n), 2))
    B = [pairs[k] for k in generator.choice(len(pairs), bidirected, replace=False)]
    return MixedGraph(n, D, B)


def parameters(G, largest, seed):
    """Weights up to `largest` and a positive definite Omega, float64."""
    generator = np.random.default_rng(seed)
    Lambda = np.zeros((G.n, G.n))
    for i, j in G.directed:
        Lambda[i, j] = generator.uniform(-largest, largest)
    Omega = np.diag(generator.uniform(1, 3, G.n))
    for i, j in G.bidirected:
        Omega[i, j] = Omega[j, i] = generator.uniform(-0.3, 0.3)
    return torch.tensor(Lambda), torch.tensor(Omega)


# --- the rule --------------------------------------------------------------------------------------------------------


def test_the_rule_is_the_determinant_and_the_adjugate():
    """Six cyclic graphs: denominator and all numerators against sympy's own."""
    for seed in range(6):
        G = random_graph(4, 6, 2, seed)
        L, W = sympy.zeros(4, 4), sympy.zeros(4, 4)
        for i, j in G.directed:
            L[i, j] = sympy.Symbol(f"l{i}_{j}")
        for i, j in [(i, i) for i in range(4)] + list(G.bidirected):
            W[i, j] = W[j, i] = sympy.Symbol(f"w{i}_{j}")
        M = sympy.eye(4) - L
        determinant, numerators = covariance_symbolic(G)
        assert sympy.expand(determinant - M.det()) == 0
        adjugate = M.adjugate()
        assert (numerators - adjugate.T * W * adjugate).applyfunc(sympy.expand) == sympy.zeros(4, 4)


def test_paths_add_up_where_walks_diverge():
    worst_rule, worst_walks = 0.0, 0.0
    for seed in range(20):
        G = random_graph(6, 11, 2, seed)
        Lambda, Omega = parameters(G, 3.0, seed)
        inverse = np.linalg.inv(np.eye(6) - Lambda.numpy())
        exact = inverse.T @ Omega.numpy() @ inverse
        found = implied_covariance(G, Lambda, Omega).numpy()
        assert np.abs(found - exact).max() / np.abs(exact).max() <= 1e-10
        for i, j in ((0, 0), (1, 4), (5, 2)):
            table = path_decomposition(G, Lambda, Omega, i, j)
            worst_rule = max(worst_rule, abs(table.total - exact[i, j]) / np.abs(exact).max())
            assert table.remainder == 0
        walks = sum(np.linalg.matrix_power(Lambda.numpy(), k) for k in range(41))
        worst_walks = max(worst_walks, np.abs(walks.T @ Omega.numpy() @ walks - exact).max() / np.abs(exact).max())
    print(f"rule {worst_rule:.1e}, 41 terms of the series over walks {worst_walks:.1e}")
    assert worst_rule <= 1e-10
    assert worst_walks > 1e3


def test_a_short_table_says_what_it_leaves_out():
    G = MixedGraph(4, list(itertools.combinations(range(4), 2)))
    Lambda, Omega = parameters(G, 1.0, 0)
    whole = path_decomposition(G, Lambda, Omega, 2, 3)
    short = path_decomposition(G, Lambda, Omega, 2, 3, top_k=2)
    assert len(short.rows) == 2
    assert short.total == whole.total
    assert short.remainder == pytest.approx(sum(row.value for row in whole.rows[2:]))
    assert abs(short.rows[0].value) == max(abs(row.value) for row in whole.rows)


def test_counts_of_complete_graphs():
    for n in (3, 4, 5):
        G = MixedGraph(n, list(itertools.permutations(range(n), 2)))
        assert len(disjoint_cycle_sets(G)) == math.factorial(n)
        assert len(one_connections(G, 0, 1)) == math.factorial(n - 1)
        assert len(one_connections(G, 0, 0)) == math.factorial(n - 1)
    G = MixedGraph(5, list(itertools.combinations(range(5), 2)), [(0, 2)])
    determinant, numerators = covariance_symbolic(G)
    assert determinant == 1
    ones = dict.fromkeys(numerators[3, 4].free_symbols, 1)
    assert numerators[3, 4].subs(ones) == 59  # the number of treks; some of them have the same weights
    assert len(path_decomposition(G, *parameters(G, 1.0, 0), 3, 4).rows) == 59


# --- identifiability -------------------------------------------------------------------------------------------------


def test_every_simple_graph_of_four_is_generically_finite():
    pairs = list(itertools.combinations(range(4), 2))
    cyclic = 0
    for kinds in itertools.product(range(4), repeat=6):
        forward = [pair for pair, kind in zip(pairs, kinds, strict=True) if kind == 1]
        backward = [pair[::-1] for pair, kind in zip(pairs, kinds, strict=True) if kind == 2]
        joined = [pair for pair, kind in zip(pairs, kinds, strict=True) if kind == 3]
        G = MixedGraph(4, forward + backward, joined)
        assert G.is_simple
        assert is_generically_finite(G), kinds
        cyclic += not G.is_acyclic
    assert cyclic == 488


def test_two_cycles_and_bows_are_not():
    for G in (MixedGraph(2, [(0, 1), (1, 0)]), MixedGraph(2, [(0, 1)], [(0, 1)])):
        assert not G.is_simple
        assert jacobian_rank(G) == 3
        assert not is_generically_finite(G)


def test_a_cycle_of_three_has_a_second_preimage():
    G = MixedGraph(3, [(0, 1), (1, 2), (2, 0)])

    def sigma(a, b, c, omega):
        Lambda = torch.zeros(3, 3, dtype=torch.float64)
        Lambda[0, 1], Lambda[1, 2], Lambda[2, 0] = a, b, c
        return implied_covariance(G, Lambda, torch.diag(omega))

    given = sigma(1 / 2, -2 / 3, 3 / 4, torch.tensor([1.0, 2, 3], dtype=torch.float64))
    a, b, c = sympy.symbols("a b c")
    S = sympy.Matrix(3, 3, [sympy.nsimplify(float(v), rational=True, tolerance=1e-13) for v in given.flatten()])
    M = sympy.eye(3) - sympy.Matrix([[0, a, 0], [0, 0, b], [c, 0, 0]])
    omega = M.T * S * M
    solutions = sympy.solve([omega[0, 1], omega[1, 2], omega[0, 2]], [a, b, c], dict=True)
    points = sorted(tuple(float(s[v]) for v in (a, b, c)) for s in solutions)
    assert len(points) == 2
    expected = sorted([(1 / 2, -2 / 3, 3 / 4), (57 / 34, -128 / 57, 17 / 16)])
    np.testing.assert_allclose(points, expected, rtol=1e-6)


# --- vanishing ideals ------------------------------------------------------------------------------------------------

VERMA = MixedGraph(4, [(0, 1), (0, 2), (1, 2), (2, 3)], [(1, 3)])
IDEALS = {
    "chain": (MixedGraph(3, [(0, 1), (1, 2)]), 3, [(2, (1, 2, 1))]),
    "verma": (VERMA, 4, [(4, (3, 2, 2, 1))]),
    "cycle with a tail": (MixedGraph(4, [(0, 1), (1, 2), (2, 3), (3, 1)]), 3, [(3, (1, 2, 1, 2)), (3, (2, 1, 2, 1))]),
    "two sources": (MixedGraph(4, [(0, 1), (2, 3), (1, 3), (3, 1)]), 3, None),
}


@pytest.mark.parametrize("name", IDEALS)
def test_minimal_generators(name):
    G, degree, expected = IDEALS[name]
    found = vanishing_polynomials(G, degree)
    print(name, [(p.degree, p.multidegree, len(p.terms)) for p in found])
    if expected is None:
        assert [p.degree for p in found] == [1, 3]
        assert found[0].terms == {((0, 2),): 1}
    else:
        assert sorted((p.degree, p.multidegree) for p in found) == sorted(expected)
    if name == "verma":
        assert len(found[0].terms) == 8
    generator = np.random.default_rng(0)
    for polynomial in found:

        def size(sigma, polynomial=polynomial):
            terms = [c * np.prod([sigma[i, j] for i, j in m]) for m, c in polynomial.terms.items()]
            return abs(sum(terms)) / max(np.abs(terms).max(), 1e-300)

        on_model = [size(implied_covariance(G, *parameters(G, 0.7, seed)).numpy()) for seed in range(20)]
        off = []
        for _ in range(50):
            root = generator.standard_normal((G.n, G.n + 2))
            off.append(size(root @ root.T))
        assert max(on_model) <= 1e-12
        assert np.median(off) >= 0.05


def test_products_of_generators_vanish_too_and_are_left_out():
    G = MixedGraph(3, [(0, 1), (1, 2)])
    everything = vanishing_polynomials(G, 3, minimal=False)
    assert len([p for p in everything if p.degree == 3]) == 6  # the generator times each of six entries


# --- fitting ---------------------------------------------------------------------------------------------------------


def samples(G, seed, N=20000):
    Lambda, Omega = parameters(G, 0.6, seed)
    sigma = implied_covariance(G, Lambda, Omega).numpy()
    Y = np.random.default_rng(seed).multivariate_normal(np.zeros(G.n), sigma, N)
    return torch.tensor(Y), Lambda, Omega


def test_least_squares_recovers_an_acyclic_model():
    G = MixedGraph(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    Y, Lambda, Omega = samples(G, 0)
    fit = fit_lsem(Y, G)
    assert float((fit.Lambda - Lambda).abs().max()) <= 0.05
    assert float((fit.Omega - Omega).abs().max()) <= 0.1
    again = fit_lsem(Y, G, "ml")
    torch.testing.assert_close(again.Lambda, fit.Lambda, rtol=1e-3, atol=1e-3)
    assert again.loglik == pytest.approx(fit.loglik, abs=1e-6)


def test_likelihood_recovers_a_cyclic_model_with_a_bow_free_pair():
    G = MixedGraph(4, [(0, 1), (1, 2), (2, 3), (3, 1)], [(0, 2)])
    Y, Lambda, Omega = samples(G, 1)
    fit = fit_lsem(Y, G, "ml")
    truth = implied_covariance(G, Lambda, Omega)
    found = implied_covariance(G, fit.Lambda, fit.Omega)
    assert float((found - truth).abs().max() / truth.abs().max()) <= 0.05
    S = torch.cov(Y.T, correction=0)
    at_truth = -0.5 * float(torch.logdet(truth) + (S @ torch.linalg.inv(truth)).diagonal().sum())
    assert fit.loglik >= at_truth - 1e-6


# --- a residual stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", ["target_logit", "pc1", "given"])
def test_the_shares_of_a_tiny_models_parts_sum_to_one(feature):
    model = tiny_model("llama")
    tokens = torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(0))
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0) if feature == "given" else feature
    report = residual_stream_report(model, tokens, direction)
    assert report.column("part") == ["embedding", "blocks 0 to 0", "blocks 1 to 1", "blocks 2 to 2"]
    assert sum(report.column("innovation share")) == pytest.approx(1, abs=1e-8)
    empirical, implied = (
        float(part.split()[-1]) for part in report.title.replace(",", "").split("output ")[1].split("implied")
    )
    assert implied == pytest.approx(empirical, rel=1e-3)
    assert "embedding > blocks" in report.findings[1]


def test_the_real_models_variance_is_explained(smollm2, smollm2_tokenizer):
    text = "The covariance of a linear model is a sum over its paths, and so is the variance of what it adds up. " * 12
    tokens = torch.tensor([smollm2_tokenizer(text)["input_ids"][:256]])
    subject = Subject([], {}, {}, {}, model=smollm2, tokens=tokens)
    report = OneConnection(OneConnectionOptions(blocks=6, top_paths=3)).analyze(subject)
    assert len(report.rows) == 7
    assert sum(report.column("innovation share")) == pytest.approx(1, abs=1e-8)
    gap = float(report.findings[0].split("differ by ")[1].split(";")[0])
    print(report.title, report.findings)
    assert gap <= 1e-3


@pytest.mark.slow
def test_the_shares_do_not_rank_what_can_be_dropped(smollm2, smollm2_tokenizer, wikitext):
    """Rank correlation with the loss that dropping each of the 30 blocks costs: a part's plain variance does better."""
    tokens = torch.tensor([smollm2_tokenizer(wikitext["test"][:12_000])["input_ids"][:1504]]).view(4, 376)
    report = residual_stream_report(smollm2, tokens, "target_logit", top_paths=5)
    assert sum(report.column("innovation share")) == pytest.approx(1, abs=1e-8)
    assert float(report.findings[0].split("differ by ")[1].split(";")[0]) <= 1e-3

    @torch.no_grad()
    def loss():
        return float(smollm2(input_ids=tokens, labels=tokens).loss)

    dense, costs = loss(), []
    for block in smollm2.model.layers:
        hook = block.register_forward_hook(lambda _, inputs, output: inputs[0])
        costs.append(loss() - dense)
        hook.remove()
    found = {
        name: spearmanr(report.column(name)[1:], costs).statistic for name in ("innovation share", "variance")
    }  # fmt: skip
    print(report.title, report.findings[0], found)
    assert found["innovation share"] < found["variance"]


def test_the_heaviest_paths_are_those_of_a_full_enumeration():
    model = tiny_model("llama", num_hidden_layers=5)
    tokens = torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(0))
    listed = residual_stream_report(model, tokens, "pc1", top_paths=4).findings[1].split("shares: ")[1].split("; ")
    everything = (
        residual_stream_report(model, tokens, "pc1", top_paths=1000).findings[1].split("shares: ")[1].split("; ")
    )
    assert len(everything) == 2**6 - 1
    assert listed == everything[:4]
    total = sum(float(path.rsplit(" ", 1)[1].rstrip("%")) for path in everything)
    assert total == pytest.approx(100, abs=0.1 * len(everything))


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_graphs():
    with pytest.raises(InputError, match="self-loop"):
        MixedGraph(3, [(1, 1)])
    with pytest.raises(InputError, match="no such vertex"):
        MixedGraph(3, [(0, 3)])
    with pytest.raises(InputError, match="no vertex 5"):
        one_connections(MixedGraph(3, [(0, 1)]), 0, 5)
    named = MixedGraph.from_networkx(nx.DiGraph([("a", "b"), ("b", "c")]), [("a", "c")])
    assert named.names == ["a", "b", "c"]
    assert (named.directed, named.bidirected) == (((0, 1), (1, 2)), ((0, 2),))


def test_bad_parameters():
    G = MixedGraph(2, [(0, 1)])
    L, W = torch.tensor([[0.0, 0.5], [0, 0]]), torch.eye(2)
    for Lambda, Omega, message in (
        (L.T, W, r"weight at \(1, 0\), outside"),
        (L, torch.tensor([[1.0, 0.2], [0.2, 1]]), r"value at \(0, 1\), outside"),
        (L, -W, "positive definite"),
        (L, torch.tensor([[1.0, 0.2], [0, 1]]), "symmetric positive definite"),
        (L * math.nan, W, "finite"),
    ):
        with pytest.raises(InputError, match=message):
            implied_covariance(G, Lambda, Omega)
    circle = MixedGraph(2, [(0, 1), (1, 0)])
    with pytest.raises(InputError, match="singular"):
        implied_covariance(circle, torch.tensor([[0.0, 1], [1, 0]]), W)
    with pytest.raises(InputError, match="top_k must be at least 1"):
        path_decomposition(G, L, W, 0, 1, top_k=0)
    complete = MixedGraph(4, list(itertools.permutations(range(4), 2)))
    with pytest.raises(InputError, match="24 terms exceed max_terms = 10"):
        disjoint_cycle_sets(complete, max_terms=10)


def test_bad_samples():
    circle = MixedGraph(2, [(0, 1), (1, 0)])
    with pytest.raises(InputError, match="acyclic"):
        fit_lsem(torch.randn(10, 2), circle)
    with pytest.raises(InputError, match="more than 2 samples"):
        fit_lsem(torch.randn(2, 2), MixedGraph(2, [(0, 1)]))
    with pytest.raises(InputError, match="max_degree"):
        vanishing_polynomials(circle, 0)
    with pytest.raises(InputError, match="unknown feature"):
        residual_stream_report(tiny_model("llama"), torch.ones(2, 8, dtype=torch.long), "loss")
    with pytest.raises(InputError, match="top_paths"):
        residual_stream_report(tiny_model("llama"), torch.ones(2, 8, dtype=torch.long), top_paths=0)

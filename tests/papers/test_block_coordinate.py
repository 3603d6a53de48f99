"""Block coordinate descent: exact progress, ranked rules, message passing, active sets; scipy, scikit-learn."""

import itertools
import math
import time

import networkx
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg
import torch
from sklearn.linear_model import Lasso, LogisticRegression

from llmcompress.backends.regression.block_coordinate import (
    GramLeastSquares,
    LeastSquares,
    Logistic,
    Softmax,
    SparseQuadratic,
    bcd,
    forest_solve,
    greedy_forest,
    label_propagation,
    partition,
    select_block,
    solve_gram,
    update_block,
)
from llmcompress.backends.regression.block_problems import prox
from llmcompress.backends.regression.forests import block_update, label_problem
from llmcompress.errors import InputError


def sparse_data(n, p, seed=0):
    """The paper's A and b: columns of very different scale, about 10 log n entries a column."""
    rng = np.random.default_rng(seed)
    A = (rng.normal(size=(n, p)) + 1) * 10 * rng.normal(size=p) * (rng.random((n, p)) < 10 * math.log(n) / n)
    w = rng.normal(size=p) * (rng.random(p) < 0.1)
    return torch.from_numpy(A), torch.from_numpy(A @ w + rng.normal(size=n))


def logistic_data(n, p, seed=0):
    A, _ = sparse_data(n, p, seed)
    A = A / A.norm(dim=0).clamp_min(1) * 10
    rng = np.random.default_rng(seed + 1)
    y = torch.from_numpy(np.where(rng.random(n) < 1 / (1 + np.exp(-(A.numpy() @ rng.normal(size=p)))), 1.0, -1.0))
    return A, y


# --- identities ------------------------------------------------------------------------------------------------------


def test_progress_is_exact_on_all_pairs():
    A, b = torch.randn(12, 8, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    problem = LeastSquares(A, b)
    x = torch.randn(8, dtype=torch.float64)
    g, value = problem.grad(x), problem.value(x)
    np.testing.assert_allclose(g, A.T @ (A @ x - b))
    for pair in itertools.combinations(range(8), 2):
        block = torch.tensor(pair)
        H = problem.hess_bound(block)
        gain = 0.5 * float(g[block] @ torch.linalg.solve(H, g[block]))
        assert value - problem.value(update_block(problem, x, g, block, "matrix")) == pytest.approx(gain, rel=1e-10)
        L = float(torch.linalg.eigvalsh(H)[-1])
        least = float(g[block].square().sum()) / (2 * L)
        assert value - problem.value(update_block(problem, x, g, block, "gradient")) >= least * (1 - 1e-12)


def test_gsq_finds_the_largest_true_decrease():
    for seed in range(20):
        torch.manual_seed(seed)
        problem = LeastSquares(torch.randn(12, 8, dtype=torch.float64), torch.randn(12, dtype=torch.float64))
        x = torch.randn(8, dtype=torch.float64)
        pairs = [torch.tensor(pair) for pair in itertools.combinations(range(8), 2)]
        chosen = [select_block(problem, x, problem.grad(x), rule, 2, pairs) for rule in ("gsq", "mi")]
        assert chosen[0].tolist() == chosen[1].tolist()


def numeric_gradient(problem, x, h=1e-6):
    steps = h * torch.eye(len(x), dtype=torch.float64)
    return torch.tensor([(problem.smooth(x + e) - problem.smooth(x - e)) / (2 * h) for e in steps])


def softmax_problem(n=40, d=5, k=3, seed=0):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, d))
    labels = (A @ rng.normal(size=(d, k)) + rng.gumbel(size=(n, k))).argmax(1)
    return Softmax(torch.from_numpy(A), torch.eye(k, dtype=torch.float64)[labels])


def test_bounds_are_above_the_hessians_and_gradients_are_gradients():
    A, y = logistic_data(40, 9)
    generator = torch.Generator().manual_seed(0)
    for problem in (Logistic(A, y, l2=0.1), softmax_problem()):
        for _ in range(50):
            x = 3 * torch.randn(problem.size, dtype=torch.float64, generator=generator)
            block = torch.randperm(problem.size, generator=generator)[:5]
            bound = problem.hess_bound(block)
            gap = torch.linalg.eigvalsh(bound - problem.hess(x, block))
            assert float(gap[0]) >= -1e-10 * float(torch.linalg.eigvalsh(bound)[-1])
        g = problem.grad(x)
        assert float((g - numeric_gradient(problem, x)).abs().max()) <= 1e-7 * max(1.0, float(g.abs().max()))
        torch.testing.assert_close(problem.hess_bound().diagonal(), problem.lipschitz)


def test_the_hessian_is_the_gradients_derivative():
    problem = softmax_problem()
    x = torch.randn(15, dtype=torch.float64)
    block = torch.arange(15)
    steps = 1e-6 * torch.eye(15, dtype=torch.float64)
    numeric = torch.stack([(problem.grad(x + e) - problem.grad(x - e)) / 2e-6 for e in steps])
    torch.testing.assert_close(problem.hess(x, block), numeric, rtol=0, atol=1e-6)


# --- rules -----------------------------------------------------------------------------------------------------------


def ratio(problem, steps, **arguments):
    found = bcd(problem, block_size=5, max_iter=steps, tol=1e-15, **arguments)
    assert all(after <= before for before, after in itertools.pairwise(found.history))
    return found.fun / found.history[0]


@pytest.fixture(scope="module")
def least_squares():
    return LeastSquares(*sparse_data(150, 600))


def test_gradient_updates_on_variable_blocks(least_squares):
    run = {rule: ratio(least_squares, 300, rule=rule, update="gradient") for rule in ("gsl", "gs", "random")}
    assert run["gsl"] <= 2e-4
    assert run["gs"] <= 2e-3
    assert run["random"] >= 1e-2


def test_gradient_updates_on_sorted_blocks(least_squares):
    run = {rule: ratio(least_squares, 300, rule=rule, update="gradient", blocks="sort") for rule in ("gsl", "gs")}
    assert run["gsl"] <= 2e-4
    assert run["gs"] >= 5e-4


def test_matrix_updates_on_sorted_blocks():
    run = {rule: [] for rule in ("gsq", "gsd", "gs")}
    for seed in range(4):
        problem = LeastSquares(*sparse_data(150, 600, seed))
        for rule in ("gsq", "gsd", "gs") if seed == 0 else ("gsq", "gsd"):
            run[rule].append(ratio(problem, 300, rule=rule, blocks="sort"))
    assert max(run["gsq"]) <= 1e-7
    assert np.log(run["gsq"]).mean() <= np.log(run["gsd"]).mean()  # instance by instance either may lead
    assert min(run["gs"]) >= 3e-5


def test_matrix_updates_on_variable_blocks(least_squares):
    run = {rule: ratio(least_squares, 300, rule=rule) for rule in ("gsd", "gsq", "random")}
    assert run["gsd"] <= 5e-9
    assert run["gsq"] <= 5e-9
    assert run["random"] >= 1e-4


@pytest.mark.parametrize("rule", ["cyclic", "lipschitz"])
@pytest.mark.parametrize("blocks", ["variable", "avg", "order"])
def test_blind_rules_descend(least_squares, rule, blocks):
    assert ratio(least_squares, 40, rule=rule, blocks=blocks) < 1


def test_estimated_constants_descend(least_squares):
    assert ratio(least_squares, 60, rule="gsd", update="la") < 0.5


def test_logistic_rules():
    A, b = sparse_data(100, 300)
    problem = Logistic(A, torch.where(b > 0, 1.0, -1.0))
    assert ratio(problem, 150, rule="gsd", update="newton") <= 1e-5
    assert ratio(problem, 150, rule="gsd", update="matrix") <= 0.05
    assert ratio(problem, 150, rule="random", update="gradient") >= 0.08


def test_the_logistic_optimum_is_scikit_learns():
    problem = Logistic(*logistic_data(100, 30), l2=1.0)
    best = bcd(problem, rule="gsd", update="newton", block_size=30, max_iter=50, tol=1e-9)
    assert best.converged
    fit = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=5000)
    theirs = fit.fit(problem.A.numpy(), problem.y.numpy()).coef_[0]
    np.testing.assert_allclose(best.x, theirs, atol=1e-5)


def test_softmax_rules():
    problem = softmax_problem(100, 60, 10)
    run = {rule: ratio(problem, 300, rule=rule, update="gradient") for rule in ("gsl", "gs", "random")}
    assert run["gsl"] < run["gs"] < 0.65 * run["random"]


# --- message passing -------------------------------------------------------------------------------------------------


def lattice(N=40, labels=60, seed=0):
    rng = np.random.default_rng(seed)
    line = scipy.sparse.diags([1, 1], [-1, 1], shape=(N, N))
    W = scipy.sparse.csr_matrix(scipy.sparse.kron(line, np.eye(N)) + scipy.sparse.kron(np.eye(N), line))
    labelled = torch.from_numpy(rng.choice(N * N, labels, replace=False))
    return W, torch.from_numpy(10 * rng.normal(size=labels)), labelled


def test_the_forest_step_is_the_dense_solve_and_the_block_is_a_forest():
    problem, _ = label_problem(*lattice(20, 20))
    order = torch.randperm(problem.size, generator=torch.Generator().manual_seed(0))
    block = greedy_forest(order, problem.H)
    assert len(block) >= 0.6 * problem.size
    graph = networkx.from_scipy_sparse_array(problem.H[block.numpy()][:, block.numpy()])
    graph.remove_edges_from(networkx.selfloop_edges(graph))
    assert networkx.is_forest(graph)
    g = torch.randn(problem.size, dtype=torch.float64)
    exact = torch.linalg.solve(problem.hess_bound(block), -g[block])
    assert float((block_update(problem, g, block) - exact).abs().max()) <= 1e-10


def test_forests_beat_colours_combs_and_small_blocks():
    W, labels, labelled = lattice()
    problem, free = label_problem(W, labels, labelled)
    exact = torch.from_numpy(scipy.sparse.linalg.spsolve(problem.H.tocsc(), problem.b.numpy()))
    least, n = problem.value(exact), problem.size
    row, column = free // 40, free % 40
    even = [torch.nonzero((row + column) % 2 == c)[:, 0] for c in (0, 1)]
    combs = [_comb(row, column, problem, parity) for parity in (0, 1)]

    def gap(**arguments):
        found = bcd(problem, block_size=round(n ** (1 / 3)), max_iter=60, tol=1e-15, **arguments)
        return (found.fun - least) / (found.history[0] - least)

    greedy = gap(rule="gsl", blocks="forest")
    assert greedy <= 3e-3
    assert greedy <= 0.5 * gap(rule="random", blocks="forest", generator=torch.Generator().manual_seed(0))
    assert _alternate(problem, combs, 60, least) <= 3e-3
    assert _alternate(problem, even, 60, least) >= 3 * greedy
    assert gap(rule="gsd") >= 0.1


def _comb(row, column, problem, parity):
    """A spine column and alternate rows: a tree, one of two that cover the lattice."""
    spine = 0 if parity == 0 else 39
    inside = (column == spine) | ((row % 2 == parity) & (column != 39 - spine))
    block = torch.nonzero(inside)[:, 0]
    return greedy_forest(block, problem.H)


def _alternate(problem, blocks, steps, least):
    x = torch.zeros(problem.size, dtype=torch.float64)
    start = problem.value(x)
    for step in range(steps):
        block = blocks[step % len(blocks)]
        x[block] += block_update(problem, problem.grad(x), block)
    return (problem.value(x) - least) / (start - least)


def test_a_chain_is_solved_in_linear_time():
    seconds = []
    for n in (2000, 16000):
        edges = torch.stack((torch.arange(n - 1), torch.arange(1, n)), 1)
        rhs = torch.randn(n, dtype=torch.float64)
        spent = []
        for _ in range(3):
            start = time.process_time()
            d = forest_solve(torch.arange(n), torch.full((n,), 2.5), edges, -torch.ones(n - 1), rhs)
            spent.append(time.process_time() - start)
        seconds.append(min(spent))
        product = 2.5 * d
        product[1:] -= d[:-1]
        product[:-1] -= d[1:]
        torch.testing.assert_close(product, rhs)
    assert seconds[1] <= 30 * seconds[0]


def test_label_propagation_is_harmonic():
    W, labels, labelled = lattice(12, 9)
    values, result = label_propagation(W, labels, labelled, tol=1e-10)
    assert result.converged
    free = np.setdiff1d(np.arange(144), labelled.numpy())
    neighbours = (W @ values.numpy()) / np.asarray(W.sum(1)).ravel()
    np.testing.assert_allclose(values.numpy()[free], neighbours[free], atol=1e-7)


# --- active sets -----------------------------------------------------------------------------------------------------


def nonneg_problem(n, p, share, seed=0):
    A, b = sparse_data(n, p, seed)
    return LeastSquares(A, b, l1=share * float((A.T @ b).abs().max()), nonneg=True)


def oracle(problem):
    A, n = problem.A.numpy(), len(problem.A)
    fit = Lasso(alpha=problem.l1 / n, fit_intercept=False, positive=True, tol=1e-14, max_iter=100000)
    return torch.from_numpy(fit.fit(A, problem.b.numpy()).coef_)


def test_newton_steps_fix_the_support_early():
    problem = nonneg_problem(150, 400, 0.03, seed=1)
    exact = oracle(problem)
    assert 51 <= int((exact > 1e-9).sum()) <= 70
    least = min(problem.value(exact), bcd(problem, rule="prox", update="prox_newton", block_size=60, tol=1e-14).fun)

    def run(update, steps):
        found = bcd(problem, rule="prox", update=update, block_size=60, max_iter=steps, tol=1e-15)
        return found, [(value - least) / least for value in found.history]

    for update in ("prox_newton", "tmp"):
        found, gaps = run(update, 30)
        assert found.active_set_iter <= 15
        assert gaps[-1] <= 1e-12
        assert ((found.x > 0) == (exact > 1e-9)).all()
    assert run("prox_gradient", 200)[1][-1] >= 5e-4


def test_prox_gradient_finds_the_zeros_within_the_bound():
    problem = nonneg_problem(120, 40, 0.1)
    exact = oracle(problem)
    H = problem.hess_bound()
    values = torch.linalg.eigvalsh(H)
    L, kappa = float(values[-1]), float(values[-1] / values[0])
    zero = exact <= 1e-12
    delta = float((problem.grad(exact) + problem.l1)[zero].min())
    x, last = torch.zeros(40, dtype=torch.float64), 0
    distance = float(exact.norm())
    for step in range(1, 400):
        x = prox(problem, x - problem.grad(x) / L, torch.tensor(1 / L))
        if (x[zero] != 0).any():
            last = step
    assert last <= kappa * math.log(2 * L * distance / delta)


def test_convergence_is_superlinear_on_the_support():
    A, y = logistic_data(200, 80)
    A = A / A.norm(dim=0).clamp_min(1e-9) * math.sqrt(200)
    split = torch.cat((A, -A), 1)
    l1 = 0.1 * float((A.T @ y).abs().max()) / 2
    problem = Logistic(split, y, l1=l1, nonneg=True)
    best = bcd(problem, rule="prox", update="tmp", block_size=60, max_iter=200, tol=1e-14).fun

    def ratios(update, steps):
        history = bcd(problem, rule="prox", update=update, block_size=60, max_iter=steps, tol=1e-14).history
        gaps = [value - best for value in history if value - best > 1e-11 * abs(best)]
        return [after / before for before, after in itertools.pairwise(gaps)]

    newton = ratios("tmp", 60)
    assert newton[-1] <= 0.01
    assert newton[-1] < newton[-2] < newton[0]
    assert ratios("prox_gradient", 60)[-1] >= 0.9
    theirs = (
        LogisticRegression(l1_ratio=1, C=1 / l1, solver="liblinear", fit_intercept=False, tol=1e-8, max_iter=5000)
        .fit(A.numpy(), y.numpy())
        .coef_[0]
    )
    value = problem.value(torch.from_numpy(np.concatenate((np.maximum(theirs, 0), np.maximum(-theirs, 0)))))
    assert best <= value * (1 + 1e-6)


# --- many columns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["gsd", "gs", "random", "cyclic"])
def test_masked_columns_reach_their_least_squares(rule):
    torch.manual_seed(0)
    X, Y = torch.randn(60, 20, dtype=torch.float64), torch.randn(60, 7, dtype=torch.float64)
    mask = torch.rand(20, 7) < 0.5
    problem = GramLeastSquares(X.T @ X, X.T @ Y, mask)
    W, history, converged = solve_gram(problem, rule, 6, 2000, 1e-10, torch.Generator().manual_seed(0))
    assert converged
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(history))
    assert not W[~mask].any()
    for j in range(7):
        exact = torch.linalg.lstsq(X[:, mask[:, j]], Y[:, j]).solution
        torch.testing.assert_close(W[mask[:, j], j], exact, rtol=0, atol=1e-7)
    assert history[-1] == pytest.approx(float(problem.value(W).sum()))


def test_nnls_is_scipys():
    torch.manual_seed(1)
    A, b = torch.randn(30, 8, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    found = bcd(LeastSquares(A, b, nonneg=True), rule="prox", update="prox_newton", block_size=8, tol=1e-12)
    np.testing.assert_allclose(found.x, scipy.optimize.nnls(A.numpy(), b.numpy())[0], atol=1e-8)


# --- bad input -------------------------------------------------------------------------------------------------------

A0, B0 = torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeastSquares(A0, B0[:3]), "A has 4 rows and b 3"),
        (lambda: LeastSquares(A0 * math.nan, B0), "A is not finite"),
        (lambda: LeastSquares(A0, B0, l1=-1), "l1 must not be negative"),
        (lambda: Logistic(A0, 2 * B0), r"y must hold \+1 and -1"),
        (lambda: Softmax(A0, A0 * 2), "Y must be one-hot"),
        (lambda: SparseQuadratic(torch.tensor([[1.0, 2], [0, 1]]), B0[:2]), "H must be symmetric"),
        (lambda: SparseQuadratic(torch.tensor([[1.0, 2], [2, 1]]), B0[:2]), "least eigenvalue is -1"),
        (lambda: bcd(LeastSquares(A0, B0), block_size=5), "block_size must be between 1 and the 4"),
        (lambda: bcd(LeastSquares(A0, B0), block_size=0), "block_size must be between"),
        (lambda: bcd(LeastSquares(A0, B0), rule="best", block_size=1), "unknown rule 'best'"),
        (lambda: bcd(LeastSquares(A0, B0), update="leap", block_size=1), "unknown update 'leap'"),
        (lambda: bcd(LeastSquares(A0, B0), update="tmp", block_size=1), "needs nonneg"),
        (lambda: bcd(LeastSquares(A0, B0, l1=0.1), block_size=1), "no place for a penalty"),
        (lambda: update_block(LeastSquares(A0, B0), B0, B0, torch.tensor([1, 1]), "matrix"), "repeat a coordinate"),
        (lambda: forest_solve(torch.arange(3), torch.full((3,), 5.0), torch.tensor([[0, 1], [1, 2], [2, 0]]),
                              torch.ones(3), torch.ones(3)), "block is not a forest"),
        (lambda: label_problem(-scipy.sparse.eye(3), B0[:1], torch.tensor([0])), "not negative"),
        (lambda: label_problem(scipy.sparse.eye(3), B0[:1], torch.tensor([0])), "vertex 1 has no label"),
        (lambda: GramLeastSquares(A0, A0[:3]), r"G must be \(3, 3\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_stopping_at_the_cap_is_no_convergence_and_zero_columns_stay():
    A, b = sparse_data(30, 60)
    A[:, 3] = 0
    found = bcd(LeastSquares(A, b), rule="gsd", block_size=5, max_iter=2)
    assert not found.converged
    assert found.n_iter == 2
    assert float(bcd(LeastSquares(A, b), rule="gsd", block_size=60, max_iter=4).x[3]) == 0
    assert [len(block) for block in partition(torch.arange(7.0), 3, "avg")] == [3, 3, 1]

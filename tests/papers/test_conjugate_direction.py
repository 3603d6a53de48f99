"""The deep conjugate direction method: identities, Poisson domains never trained on, and dense Grams."""

import itertools
import math

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from llmcompress.backends.regression.conjugate_direction import (
    PoissonDirectionNet,
    cg,
    dcdm,
    deflated_pcg,
    energy_loss,
    fit_gram_direction,
    ic0,
    lanczos_ritz,
    pcg,
    residual_loss,
    ritz_samples,
    train_direction,
)
from llmcompress.errors import InputError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def spd(n=60, condition=10.0, seed=0):
    q = torch.linalg.qr(randn(n, n, seed=seed))[0]
    A = q @ torch.diag(torch.linspace(1, condition, n, dtype=torch.float64)) @ q.T
    return (A + A.T) / 2


# --- identities ------------------------------------------------------------------------------------------------------


def _iterates(solve, count=30):
    return torch.stack([solve(i).x for i in range(1, count + 1)])


def test_the_identity_map_is_cg_and_a_diagonal_one_is_pcg():
    A, b = spd(), randn(60, 2, seed=1)
    diagonal = 0.5 + torch.rand(60, 1, dtype=torch.float64, generator=generator(2))
    for direction in (lambda r: r, lambda r: diagonal * r):
        ours = _iterates(lambda i, f=direction: dcdm(A, b, f, tol=1e-30, max_iter=i))
        theirs = _iterates(lambda i, f=direction: pcg(A, b, f, tol=1e-30, max_iter=i))
        assert float((ours - theirs).abs().max()) <= 1e-10


def test_cg_is_scipys():
    A, b = spd(), randn(60, seed=1)
    ours = cg(A, b, tol=1e-30, max_iter=8).x
    theirs = scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=1e-30, maxiter=8)[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_the_inverse_up_to_a_factor_converges_at_once():
    A, b = spd(), randn(60, 3, seed=1)
    found = dcdm(A, b, lambda r: -3.7 * torch.linalg.solve(A, r))
    assert found.n_iter.tolist() == [1, 1, 1]
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=0, atol=1e-12)


def random_net(n, seed=0):
    w, v = randn(80, n, seed=seed), randn(n, 80, seed=seed + 1)
    return lambda r: v @ torch.relu(w @ r) / 20 + 0.3 * r


def test_scale_and_sign_of_the_proposal_do_not_matter():
    A, b, net = spd(), randn(60, 2, seed=1), random_net(60)
    factors = iter((randn(200, seed=4) * 10).tolist())
    plain = dcdm(A, b, net, tol=1e-30, max_iter=30).x
    scaled = dcdm(A, b, lambda r: next(factors) * net(r), tol=1e-30, max_iter=30).x
    assert float((plain - scaled).abs().max()) <= 1e-10


@pytest.mark.parametrize("n_ortho", [0, 2, 7])
def test_the_energy_of_the_error_never_grows(n_ortho):
    A, b = spd(), randn(60, 1, seed=1)
    exact = torch.linalg.solve(A, b)
    errors = [exact] + [
        exact - x for x in _iterates(lambda i: dcdm(A, b, random_net(60), n_ortho=n_ortho, tol=1e-30, max_iter=i))
    ]
    energies = [float((e * (A @ e)).sum()) for e in errors]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(energies))


def test_columns_are_searches_of_their_own():
    A, b, net = spd(), randn(60, 4, seed=1), lambda r: r + 0.3 * torch.relu(r)
    b[:, 2] = 0
    together = dcdm(A, b, net, tol=1e-6, max_iter=200)
    for j in range(4):
        alone = dcdm(A, b[:, j], net, tol=1e-6, max_iter=200)
        assert int(alone.n_iter[0]) == int(together.n_iter[j])
        torch.testing.assert_close(alone.x, together.x[:, j], rtol=0, atol=1e-9)
    assert int(together.n_iter[2]) == 0
    assert together.converged
    assert float((b - A @ together.x).norm(dim=0).max()) <= 1e-6 * float(b.norm(dim=0).max())


# --- data and losses -------------------------------------------------------------------------------------------------


def test_full_lanczos_gives_the_eigenvalues():
    A = spd(condition=50)
    R = lanczos_ritz(A, randn(60, seed=3), 60)
    torch.testing.assert_close(R.theta, torch.linalg.eigvalsh(A), rtol=0, atol=1e-10)
    torch.testing.assert_close(A @ R.vectors, R.vectors * R.theta, rtol=0, atol=1e-8)


def test_lanczos_says_where_it_breaks_down():
    A = torch.diag(torch.tensor([1.0, 1, 1, 2, 2, 3], dtype=torch.float64))
    assert lanczos_ritz(A, torch.ones(6, dtype=torch.float64), 6).theta.tolist() == pytest.approx([1, 2, 3])


def test_samples_weigh_the_low_end():
    R = lanczos_ritz(spd(condition=50), randn(60, seed=3), 60)
    samples = ritz_samples(R, 4000, 3, generator=generator())
    torch.testing.assert_close(samples.norm(dim=0), torch.ones(4000, dtype=torch.float64))
    shares = (R.vectors.T @ samples).square().mean(1)
    assert 72 <= float(shares[:33].mean() / shares[33:].mean()) <= 90


def test_losses_vanish_at_the_solution_and_forget_the_scale():
    A, b = spd(), randn(60, 3, seed=5)
    b = b / b.norm(dim=0)
    q = 5 * torch.linalg.solve(A, b)
    energy = (b * torch.linalg.solve(A, b)).sum(0)
    assert float(residual_loss(q, b, A @ q)) <= 1e-20
    assert abs(float(energy_loss(q, b, A @ q, energy))) <= 1e-14
    other = randn(60, 3, seed=6)
    assert float(residual_loss(other, b, A @ other)) == pytest.approx(
        float(residual_loss(-7 * other, b, -7 * A @ other))
    )
    assert 0 < float(energy_loss(other, b, A @ other, energy)) < 1


# --- Poisson ---------------------------------------------------------------------------------------------------------


def domain(N, kind):
    """1 in the fluid, 0 in solids."""
    y, x = np.mgrid[:N, :N] / N
    mask = np.ones((N, N))
    if kind != "open":
        mask[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.15**2] = 0
    if kind == "bar":
        mask[int(0.7 * N) : int(0.78 * N), int(0.2 * N) : int(0.6 * N)] = 0
    return torch.from_numpy(mask)


def poisson(mask):
    """The five-point Laplacian with Dirichlet boundaries on the fluid cells, as a product."""
    N = len(mask)

    def product(x):
        g = x.T.reshape(-1, N, N) * mask.to(x)
        y = 4 * g
        y[:, 1:] -= g[:, :-1]
        y[:, :-1] -= g[:, 1:]
        y[:, :, 1:] -= g[:, :, :-1]
        y[:, :, :-1] -= g[:, :, 1:]
        return (y * mask.to(x)).reshape(-1, N * N).T

    return product


def sparse_poisson(mask):
    N = len(mask)
    line = scipy.sparse.diags([-1, 2, -1], [-1, 0, 1], shape=(N, N))
    whole = scipy.sparse.csr_matrix(scipy.sparse.kron(line, np.eye(N)) + scipy.sparse.kron(np.eye(N), line))
    inside = mask.numpy().ravel() > 0
    return whole[inside][:, inside], inside


def right_hand_sides(mask):
    N = len(mask)
    noise = randn(N * N, 1, seed=7)
    dipole = torch.zeros(N, N, dtype=torch.float64)
    dipole[N // 8, N // 8], dipole[-N // 8, -N // 4] = 1, -1
    return torch.cat((noise, dipole.reshape(-1, 1)), 1) * mask.reshape(-1, 1)


@pytest.fixture(scope="module")
def trained():
    net = PoissonDirectionNet(2, filters=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in net.parameters():
            torch.nn.init.kaiming_uniform_(p, a=math.sqrt(5))
    product = poisson(domain(32, "open"))
    R = lanczos_ritz(product, product(randn(1024, 1))[:, 0], 300)
    losses = train_direction(net, product, R, steps=250, batch=16, lr=3e-3, generator=generator())
    return net.requires_grad_(False), losses


def iterations(net, N, kind, tol=1e-4, n_ortho=2, max_iter=200):
    mask = domain(N, kind)
    found = dcdm(poisson(mask), right_hand_sides(mask), net.on(mask), tol=tol, n_ortho=n_ortho, max_iter=max_iter)
    assert found.converged
    return int(found.n_iter.max())


def test_it_trains(trained):
    assert np.mean(trained[1][-20:]) <= 0.06


@pytest.mark.parametrize(
    ("kind", "limit", "plain", "incomplete"), [("open", 16, 60, 19), ("disc", 26, 50, 15), ("bar", 28, 47, 14)]
)
def test_domains_never_trained_on(trained, kind, limit, plain, incomplete):
    mask = domain(32, kind)
    A, inside = sparse_poisson(mask)
    b = right_hand_sides(mask)
    assert iterations(trained[0], 32, kind) <= limit
    assert int(cg(poisson(mask), b).n_iter.max()) >= plain
    preconditioner = ic0(A)
    reduced = torch.from_numpy(A.toarray())
    assert int(pcg(reduced, b[inside], preconditioner).n_iter.max()) >= incomplete
    assert iterations(trained[0], 32, kind, tol=1e-8) <= 60


def test_deflation_helps_less(trained):
    mask = domain(32, "open")
    values, vectors = scipy.sparse.linalg.eigsh(sparse_poisson(mask)[0].tocsc(), 16, sigma=0)
    assert values.min() > 0
    found = deflated_pcg(poisson(mask), right_hand_sides(mask), torch.from_numpy(vectors))
    assert found.converged
    assert iterations(trained[0], 32, "open") < int(found.n_iter.max()) < 60


@pytest.mark.parametrize(("kind", "limit"), [("open", 24), ("disc", 34), ("bar", 34)])
def test_iterations_do_not_grow_with_the_grid(trained, kind, limit):
    mask = domain(64, kind)
    assert iterations(trained[0], 64, kind) <= limit
    if kind == "open":
        small = int(cg(poisson(domain(32, kind)), right_hand_sides(domain(32, kind))).n_iter.max())
        assert int(cg(poisson(mask), right_hand_sides(mask)).n_iter.max()) >= 1.8 * small


def test_without_orthogonalisation_it_needs_more(trained):
    kinds = ("open", "disc", "bar")
    with_two = sum(iterations(trained[0], 32, kind) for kind in kinds)
    without = sum(iterations(trained[0], 32, kind, n_ortho=0, max_iter=400) for kind in kinds)
    assert without >= 1.25 * with_two


def test_incomplete_cholesky_is_exact_without_fill():
    chain = scipy.sparse.diags([-1, 2.5, -1], [-1, 0, 1], shape=(30, 30)).tocsr()
    b = randn(30, 2)
    np.testing.assert_allclose(ic0(chain)(b), np.linalg.solve(chain.toarray(), b.numpy()), atol=1e-12)


# --- dense Grams -----------------------------------------------------------------------------------------------------


def gram(sc, sg, seed, scales_seed=0, n=2048, d=256):
    """X = N(0, 30 i^-1.5) rotated + s_j N(0, 1), s_j = sc exp(sg N(0, 1)); Gram over n, damped by 1e-4."""
    rotation = torch.linalg.qr(randn(d, d, seed=100 + scales_seed))[0]
    s = sc * (sg * randn(d, seed=200 + scales_seed)).exp()
    spectrum = (30 * torch.arange(1, d + 1, dtype=torch.float64) ** -1.5).sqrt()
    X = randn(n, d, seed=seed) * spectrum @ rotation + s * randn(n, d, seed=seed + 1000)
    G = X.T @ X / n
    return G + 1e-4 * G.diagonal().mean() * torch.eye(d)


@pytest.mark.parametrize(("sc", "sg", "limit", "fresh"), [(0.05, 1, 35, 42), (1, 1.2, 22, 24)])
def test_a_direction_learned_on_a_gram(sc, sg, limit, fresh):
    G, again, b = gram(sc, sg, 1), gram(sc, sg, 2), randn(256, 4, seed=9)

    def count(found):
        assert found.converged
        return float(found.n_iter.double().mean())

    learned = fit_gram_direction(G, 32, generator=generator())
    needed = count(dcdm(G, b, learned, max_iter=1000))
    assert needed <= limit
    assert count(dcdm(again, b, learned, max_iter=1000)) <= fresh
    assert count(cg(G, b)) >= 2 * needed
    by_residual = fit_gram_direction(G, 32, loss="residual", generator=generator())
    assert count(dcdm(G, b, by_residual, max_iter=1000)) > needed
    if sg == 1:
        assert count(dcdm(G, b, learned, n_ortho=0, max_iter=2000)) >= 2.5 * needed
    else:
        jacobi = pcg(G, b, lambda r: r / G.diagonal()[:, None])
        assert count(jacobi) >= 1.5 * needed
        assert count(deflated_pcg(G, b, learned.V)) >= 2 * needed


# --- bad input -------------------------------------------------------------------------------------------------------

A5, B5 = spd(6), randn(6)


@pytest.mark.parametrize(
    ("A", "b", "arguments", "message"),
    [
        (A5[:5], B5, {}, "A must be square"),
        (A5 + torch.triu(torch.ones(6, 6), 1), B5, {}, "A must be symmetric"),
        (-A5, B5, {}, "A is not positive definite"),
        (A5, B5[:5], {}, "b has 5 rows and A 6"),
        (A5 * math.nan, B5, {}, "A is not finite"),
        (A5, B5 * math.inf, {}, "b is not finite"),
        (A5, B5, {"tol": 0}, "tol must be positive"),
        (A5, B5, {"n_ortho": -1}, "n_ortho not negative"),
    ],
)
def test_bad_input_is_named(A, b, arguments, message):
    with pytest.raises(InputError, match=message):
        dcdm(A, b, lambda r: r, **arguments)


def test_bad_grids_masks_and_sizes():
    net = PoissonDirectionNet(2, 4)
    with pytest.raises(InputError, match="pooling factor 2"):
        net(randn(25, 1))
    with pytest.raises(InputError, match=r"the mask must be \(4, 4\)"):
        net(randn(16, 1), torch.ones(4, 5))
    with pytest.raises(InputError, match="m must be between 1 and n = 6"):
        lanczos_ritz(A5, B5, 7)
    with pytest.raises(InputError, match="rank must be between"):
        fit_gram_direction(A5, 7)


def test_zero_is_solved_at_once_and_a_cap_is_no_convergence():
    assert not dcdm(A5, 0 * B5, lambda r: r).x.any()
    assert int(dcdm(A5, 0 * B5, lambda r: r).n_iter[0]) == 0
    assert not dcdm(spd(), randn(60), lambda r: r, tol=1e-12, max_iter=3).converged


def test_a_useless_proposal_falls_back_to_the_residual():
    found = dcdm(A5, B5, lambda r: torch.full_like(r, math.nan), tol=1e-8, max_iter=200)
    assert found.converged
    torch.testing.assert_close(found.x, torch.linalg.solve(A5, B5), rtol=0, atol=1e-6)


def test_three_dimensions():
    assert PoissonDirectionNet(3, 4, 1)(randn(64, 2)).shape == (64, 2)

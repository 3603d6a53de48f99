"""Matrix sensing by gradient descent: two rates, the step between them, identities, layers from their outputs."""

import math

import numpy as np
import pytest
import torch

from llmcompress.backends.recovery.matrix_sensing import (
    ActivationOperator,
    DenseOperator,
    EntriesOperator,
    IdentityOperator,
    MatrixSensing,
    MatrixSensingOptions,
    WhitenedActivationOperator,
    effective_rank,
    rescale_factors,
    sense_asymmetric,
    sense_symmetric,
)
from llmcompress.errors import InputError, RunError

N, R, K = 30, 2, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def truth(seed, symmetric=False):
    """Rank 2, singular values 1 and 0.5."""
    U, V = (torch.linalg.qr(randn(N, R, seed=10 * seed + i))[0] for i in (1, 2))
    return (U * torch.tensor([1, 0.5], dtype=torch.float64)) @ (U if symmetric else V).T


def gaussian(m, seed):
    return DenseOperator(randn(m, N, N, seed=seed) / math.sqrt(m))


IDENTITY = IdentityOperator(N, N)


def asymmetric(M, alpha, op=IDENTITY, seed=0, tol=1e-13, **arguments):
    return sense_asymmetric(op, op.forward(M), K, alpha, tol=tol, generator=generator(seed), **arguments)


def rate(losses):
    """Slope of log L between 1e-4 and 1e-18."""
    L = np.array(losses)
    inside = np.flatnonzero((L < 1e-4) & (L > 1e-18))
    inside = inside[inside > np.argmax(L < 1e-4)]
    return np.polyfit(inside, np.log(L[inside]), 1)[0]


# --- the rates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_symmetric_factors_of_too_many_columns_slow_down(seed):
    M = truth(seed, symmetric=True)
    found = sense_symmetric(IDENTITY, M.flatten(), K, 0.3, 0.25, 4000, 1e-14, generator(seed))
    assert not found.converged
    assert found.n_iter == 4000
    T = np.arange(500, 4001)
    slope = np.polyfit(np.log(T), np.log(np.array(found.losses)[500:4001]), 1)[0]
    assert -2.2 <= slope <= -1.7
    assert found.losses[-1] >= 1e-8
    exact = sense_symmetric(IDENTITY, M.flatten(), R, 0.3, 0.25, 400, 8e-13, generator(seed))
    assert exact.losses[-1] < 1e-24
    assert exact.converged
    torch.testing.assert_close(exact.X @ exact.X.T, M, atol=1e-11, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_asymmetric_rate_is_alpha_squared(seed):
    M = truth(seed)
    wide, narrow = (asymmetric(M, alpha, seed=seed, rescale=None, max_iter=20000, tol=1e-10) for alpha in (0.6, 0.3))
    assert 3.2 <= rate(wide.losses) / rate(narrow.losses) <= 5
    for found in (wide, narrow):
        assert found.switched_at is None
        assert np.abs(np.array(found.imbalance) / found.imbalance[0] - 1).max() <= 0.1


def test_the_rate_holds_with_fewer_measurements_than_unknowns():
    M, op = truth(0), gaussian(600, 5)
    rates = [rate(asymmetric(M, a, op, rescale=None, step=0.2, max_iter=20000, tol=1e-10).losses) for a in (0.6, 0.3)]
    assert 3.2 <= rates[0] / rates[1] <= 5


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_one_step_takes_alpha_out_of_the_rate(seed):
    for op, limit in ((IDENTITY, 400), (gaussian(600, 5), 1200)):
        M, spent = truth(seed), []
        for alpha in (0.6, 0.3, 0.03):
            found = asymmetric(M, alpha, op, seed, max_iter=4000, step=0.25 if op is IDENTITY else 0.2)
            spent.append(int(np.argmax(np.array(found.losses) < 1e-16)) - found.switched_at)
            assert found.converged
            values = torch.linalg.svdvals(found.product())
            assert values[R] / values[R - 1] < 1e-8
            assert effective_rank(found.F, found.G, 1e-6) == R
        print(op, spent)
        assert max(spent) / min(spent) <= 1.4
        assert max(spent) <= limit


@pytest.mark.parametrize("seed", range(2))
def test_asymmetric_factors_are_the_faster_ones_on_semidefinite_matrices_too(seed):
    M = truth(seed, symmetric=True)
    symmetric = sense_symmetric(IDENTITY, M.flatten(), K, 0.3, 0.25, 1500, 1e-16, generator(seed)).losses[-1]
    plain = asymmetric(M, 0.3, seed=seed, rescale=None, max_iter=1500, tol=1e-16).losses[-1]
    freed = asymmetric(M, 0.3, seed=seed, max_iter=1500, tol=1e-16).losses[-1]
    assert plain <= 1e-5 * symmetric
    assert freed <= 1e-24


def test_a_given_step_switches_once_there():
    found = asymmetric(truth(0), 0.3, rescale=100, max_iter=300)
    assert found.switched_at == 100
    assert found.imbalance[101] > 2 * found.imbalance[100]


def test_single_precision():
    M = truth(1).float()
    found = sense_asymmetric(IDENTITY, M.flatten(), K, 0.3, tol=1e-6, generator=generator())
    assert found.F.dtype == torch.float32
    assert float((found.product() - M).norm() / M.norm()) <= 5e-6


# --- identities ------------------------------------------------------------------------------------------------------


def test_rescaled_factors_have_the_same_product_and_equal_orthogonal_columns():
    F, G = randn(40, 6, seed=1), randn(25, 6, seed=2)
    for beta in (None, 0.7):
        A, B = rescale_factors(F, G, beta)
        size = math.sqrt(np.linalg.norm(F @ G.T, 2)) if beta is None else beta
        torch.testing.assert_close(A @ B.T, F @ G.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(A.T @ A, size**2 * torch.eye(6, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    F[:, 3] = 0
    A, B = rescale_factors(F, G)
    torch.testing.assert_close(A @ B.T, F @ G.T, rtol=1e-12, atol=1e-12)


def operators():
    X = randn(50, 12, seed=3)
    return [
        DenseOperator(randn(40, 12, 9, seed=4)),
        IdentityOperator(12, 9),
        EntriesOperator(randn(12, 9, seed=5) > 0, torch.float64),
        ActivationOperator(X, 9),
        WhitenedActivationOperator(X, 9),
        WhitenedActivationOperator(X[:5], 9, ridge=0.1),
    ]


@pytest.mark.parametrize("op", operators(), ids=lambda op: type(op).__name__)
def test_adjoints_and_gradients(op):
    M, v = randn(12, 9, seed=6), None
    v = randn(len(op.forward(M)), seed=7)
    assert float(op.forward(M) @ v) == pytest.approx(float((M * op.adjoint(v)).sum()), rel=1e-12)
    F, G = randn(12, 3, seed=8).requires_grad_(), randn(9, 3, seed=9).requires_grad_()
    y = op.forward(M)
    (0.5 * (op.forward(F @ G.T) - y).square().sum()).backward()
    with torch.no_grad():
        residual = op.adjoint(op.forward(F @ G.T) - y)
        torch.testing.assert_close(residual @ G, F.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(residual.T @ F, G.grad, rtol=1e-10, atol=1e-10)


def test_both_factors_move_at_once():
    op, M = IdentityOperator(5, 4), randn(5, 4)
    found = sense_asymmetric(op, op.forward(M), 2, 0.5, step=0.1, max_iter=1, rescale=None, generator=generator(3))
    draw = generator(3)
    F = 0.5 / math.sqrt(5) * torch.randn(5, 2, dtype=torch.float64, generator=draw)
    G = 0.5 / 3 / math.sqrt(4) * torch.randn(4, 2, dtype=torch.float64, generator=draw)
    residual = F @ G.T - M
    torch.testing.assert_close(found.F, F - 0.1 * residual @ G)
    torch.testing.assert_close(found.G, G - 0.1 * residual.T @ F)


# --- layers ----------------------------------------------------------------------------------------------------------


def test_a_layer_is_found_from_its_outputs_once_its_inputs_are_whitened():
    u, v = torch.linalg.qr(randn(400, 40, seed=1))[0], torch.linalg.qr(randn(40, 40, seed=2))[0]
    X = math.sqrt(400) * (u * torch.logspace(0, -1.5, 40, dtype=torch.float64)) @ v.T
    W = randn(40, 3, seed=3) @ randn(3, 30, seed=4) / 40
    white, raw = WhitenedActivationOperator(X, 30), ActivationOperator(X, 30)
    torch.testing.assert_close(white.forward(white.whiten(W)), raw.forward(W))
    errors = {}
    for name, op in (("white", white), ("raw", raw)):
        y = op.forward(white.whiten(W) if name == "white" else W)
        size = 0.1 * math.sqrt(float(torch.linalg.matrix_norm(op.adjoint(y), 2)))
        found = sense_asymmetric(op, y, 6, size, max_iter=3000, tol=1e-12, generator=generator())
        product = white.unwhiten(found.product()) if name == "white" else found.product()
        errors[name] = float((product - W).square().sum() / W.square().sum())
    print(errors)
    assert errors["white"] <= 1e-8
    assert errors["raw"] > 1e-3


def test_a_weight_of_full_rank_is_approached_and_never_switches(smollm2):
    weight = smollm2.get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    op = IdentityOperator(*weight.shape)
    size = 0.1 * math.sqrt(float(torch.linalg.matrix_norm(weight, 2)))
    found = sense_asymmetric(op, weight.flatten(), 64, size, max_iter=400, generator=generator())
    squares = torch.linalg.svdvals(weight).square()
    loss = math.sqrt(found.losses[-1] / float(squares.sum()))
    best = math.sqrt(float(squares[64:].sum() / squares.sum()))
    print(loss, best)
    assert best <= loss <= 1.02 * best
    assert found.switched_at is None


def test_the_port_recovers_entries():
    M = truth(0)
    port = MatrixSensing(MatrixSensingOptions(max_iter=3000, tol=1e-10))
    for observed in (None, torch.rand(N, N, generator=generator(1)) < 0.8):
        A, B = port.recover(M, observed, K, generator())
        torch.testing.assert_close(A @ B, M, atol=1e-6, rtol=0)
    square = MatrixSensing(MatrixSensingOptions(parameterization="symmetric", max_iter=3000))
    M = truth(0, symmetric=True)
    A, B = square.recover(M, None, R, generator())
    torch.testing.assert_close(A @ B, M, atol=1e-4, rtol=0)


# --- bad input -------------------------------------------------------------------------------------------------------

Y = truth(0).flatten()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"rank must be between 1 and min\(n1, n2\) = 30; got 0"),
        ({"rank": 31}, "got 31"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"step": -1.0}, "step must be positive"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"y": Y[1:]}, r"y must have the operator's 900 measurements; got shape \(899,\)"),
        ({"y": Y * math.inf}, "y is not finite"),
        ({"y": Y * 0}, "y is zero"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(InputError, match=message):
        sense_asymmetric(**{"op": IDENTITY, "y": Y, "rank": K, "alpha": 0.3, **change})


def test_bad_operators_and_steps():
    with pytest.raises(InputError, match=r"a symmetric descent needs square matrices; got \(30, 20\)"):
        sense_symmetric(IdentityOperator(30, 20), torch.ones(600), 2, 0.1)
    with pytest.raises(InputError, match="A is empty"):
        DenseOperator(torch.ones(0, 3, 3))
    with pytest.raises(InputError, match=r"A must be \(m, n1, n2\)"):
        DenseOperator(torch.ones(3, 3))
    with pytest.raises(InputError, match="out must be at least 1"):
        ActivationOperator(torch.ones(3, 3), 0)
    with pytest.raises(InputError, match="give a positive ridge"):
        WhitenedActivationOperator(torch.ones(3, 5), 2)
    with pytest.raises(InputError, match="as many columns"):
        rescale_factors(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(RunError, match="the residual is above 10 times its start; give a smaller step"):
        asymmetric(truth(0), 0.3, step=20.0)
    with pytest.raises(RunError, match="give a smaller step"):
        sense_symmetric(IDENTITY, truth(0, symmetric=True).flatten(), K, 0.3, 20.0)

"""Perturb-then-diagonalise: exact deviations, bounds, robustness, layers against dense systems, adapters in models."""

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from transformers import AutoModelForCausalLM

from llmcompress.backends.sequence.ptd import (
    PTD,
    DiagonalSSM,
    PTDOptions,
    frequency_report,
    hippo,
    perturb_then_diagonalize,
    psi,
    s4d_init,
    transfer_function,
)
from llmcompress.checkpoint.quantizer import attach
from llmcompress.errors import InputError
from tests.tiny import tiny_model


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def unit_read_out(n):
    _, B = hippo("legs", n)
    return B / B.norm()


def gap(system, n, omega):
    """|G - G_LegS| at omega with C = B / ||B||."""
    A, B = hippo("legs", n)
    return (system - transfer_function(A, B, unit_read_out(n), 1j * omega)).abs()


def s4d_response(n, omega):
    values, half, V = s4d_init(n)
    return transfer_function(values, half, unit_read_out(n).to(V) @ V, 1j * omega)


def ptd_response(n, omega, eps, method="ginibre"):
    A, B = hippo("legs", n)
    found = perturb_then_diagonalize(A, method, eps)
    B, C = torch.linalg.solve(found.V, B.to(found.V)), unit_read_out(n).to(found.V) @ found.V
    return transfer_function(found.eigenvalues, B, C, 1j * omega), found


# --- systems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 32])
def test_the_deviation_of_s4d_is_exact(n):
    A, B = hippo("legs", n)
    normal = A + torch.outer(B, B) / 2 + torch.eye(n) / 2
    assert float((normal + normal.T).abs().max()) <= 1e-12
    s = 1j * torch.logspace(-1, 4, 60, dtype=torch.float64)
    C = torch.nn.functional.normalize(randn(n), dim=0)
    values, half, V = s4d_init(n)
    exact = transfer_function(A, B, C, s)
    product = transfer_function(values, half, C.to(V) @ V, s) * (1 + psi(s, n))
    assert float(((product - exact).abs() / exact.abs()).max()) <= 1e-10


def test_hippo_is_the_published_matrix():
    for kind in ("legs", "legt"):
        A, B = hippo(kind, 5)
        for i in range(5):
            assert float(B[i]) == pytest.approx(math.sqrt(2 * i + 1))
            for j in range(5):
                root = math.sqrt((2 * i + 1) * (2 * j + 1))
                legs = -root if i > j else -(i + 1) if i == j else 0.0
                legt = -root if i >= j else -root * (-1) ** (i - j)
                assert float(A[i, j]) == pytest.approx(legs if kind == "legs" else legt)


def test_s4d_never_converges_and_ptd_stays_within_its_bound():
    for n in (16, 32, 64, 128):
        A, B = hippo("legs", n)
        values = s4d_init(n)[0]
        last = float(values.imag.max())
        assert 0.98 <= last * math.pi / n**2 <= 1.01
        omega = torch.cat((torch.logspace(-1, 4.3, 150, dtype=torch.float64), values.imag[values.imag > 0]))
        worst = float(gap(s4d_response(n, omega), n, omega).max() / B.norm())
        response, found = ptd_response(n, omega, 1e-2)
        small = float(gap(response, n, omega).max())
        print(f"n = {n}: S4D {worst:.4f}, PTD {small:.1e}, kappa {found.kappa:.0f}")
        assert 0.38 <= worst <= 0.42
        assert small <= 2 * 0.01 / (1 - 0.02)
        assert small <= 1e-3
        columns = torch.linalg.solve(
            1j * omega[:40, None, None] * torch.eye(n) - A.to(torch.complex128), B.to(response)
        )
        exact = n**2 / (n**2 + omega[:40] ** 2)
        assert float((columns.abs().square().sum(1) - exact).abs().max()) <= 1e-9


def test_at_a_fixed_frequency_s4d_converges_with_one_over_n():
    s = torch.tensor([0.5, 1, 2, 4], dtype=torch.float64)
    sizes = (16, 32, 64, 128, 256)
    errors = []
    for n in sizes:
        exact = transfer_function(*hippo("legs", n), unit_read_out(n), 1j * s)
        errors.append(float((gap(s4d_response(n, s), n, s) / exact.abs()).mean()))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    print(f"slope {slope:.3f}")
    assert -1.1 <= slope <= -0.8


def test_error_and_condition_follow_the_perturbation():
    sizes = (1e-4, 1e-3, 1e-2, 1e-1)
    omega = torch.logspace(-1, 4, 80, dtype=torch.float64)
    runs = [ptd_response(64, omega, eps) for eps in sizes]
    errors = [float(gap(response, 64, omega).max()) for response, _ in runs]
    slopes = [np.polyfit(np.log(sizes), np.log(y), 1)[0] for y in (errors, [found.kappa for _, found in runs])]
    print(f"error slope {slopes[0]:.3f}, condition slope {slopes[1]:.3f}")
    assert slopes[0] == pytest.approx(1, abs=0.05)
    assert slopes[1] == pytest.approx(-1, abs=0.15)
    found = runs[-1][1]
    assert found.eps == pytest.approx(0.1, rel=1e-9)
    B = hippo("legs", 64)[1]
    V = found.V.to(torch.complex64)
    turned = torch.linalg.solve(V, B.to(V)), unit_read_out(64).to(V) @ V
    single = ((turned[0] * turned[1]) / (1j * omega[:, None].float() - found.eigenvalues.to(V))).sum(1)
    error = float(gap(single.to(torch.complex128), 64, omega).max())
    values, own = torch.linalg.eig(hippo("legs", 32)[0])
    B = hippo("legs", 32)[1]
    naive = transfer_function(values, torch.linalg.solve(own, B.to(own)), unit_read_out(32).to(own) @ own, 1j * omega)
    worst = float(gap(naive, 32, omega).max())
    print(f"float32 with PTD {error:.1e}, float64 without {worst:.1e}")
    assert error <= 1e-2
    assert worst > 1e3


@pytest.mark.parametrize("gamma", [10.0, 100.0, 1000.0])
def test_an_optimised_perturbation_is_better_conditioned(gamma):
    A, _ = hippo("legs", 32)
    found = perturb_then_diagonalize(A, "optimised", gamma=gamma)
    random = perturb_then_diagonalize(A, "ginibre", eps=found.eps)
    print(f"gamma {gamma:g}: kappa {found.kappa:.0f} against {random.kappa:.0f}, ||E|| {found.eps:.2f}")
    assert found.kappa <= random.kappa / 3
    assert min(found.phi_history) <= found.phi_history[0] / 5
    limited = perturb_then_diagonalize(A, "optimised", gamma=gamma, max_eps=0.05, eps=0.05, steps=5)
    assert limited.eps <= 0.05 * (1 + 1e-9)


def test_well_conditioned_systems_are_left_alone():
    A = -torch.eye(6, dtype=torch.float64) + 0.3 * randn(6, 6)
    found = perturb_then_diagonalize(A)
    assert found.eps == 0
    rebuilt = found.V @ torch.diag(found.eigenvalues) @ torch.linalg.inv(found.V)
    torch.testing.assert_close(rebuilt.real, A)


def test_a_sine_at_s4ds_last_spike_destroys_it_and_not_ptd():
    """States read out by ridge regression for a delayed smooth signal, then a tenth of a sine at the spike is added."""
    n, steps = 32, 4000
    A, B = hippo("legs", n)
    last = float(s4d_init(n)[0].imag.max())
    dt = 2 * math.pi / (16 * last)
    t = dt * torch.arange(steps, dtype=torch.float64)
    generator = np.random.default_rng(0)
    freq, phase, height = generator.uniform(0.5, 12, 12), generator.uniform(0, 2 * np.pi, 12), generator.normal(size=12)

    def signal(time):
        return sum(a * torch.sin(w * time + p) for a, w, p in zip(height, freq, phase, strict=True)) / math.sqrt(12)

    u, target, noise = signal(t), signal(t - 0.2), 0.1 * torch.sin(last * t)

    def states(values, gain, driven):
        a = (values * dt).exp()
        gain = (a - 1) / values * gain
        x, found = torch.zeros_like(gain), []
        for value in driven:
            x = a * x + gain * value
            found.append(x)
        x = torch.stack(found)
        return torch.cat((x.real, x.imag), 1)

    found = perturb_then_diagonalize(A, "ginibre", 0.05)
    systems = {
        "S4D": s4d_init(n)[:2],
        "PTD": (found.eigenvalues, torch.linalg.solve(found.V, B.to(found.V))),
    }
    error = {}
    for name, (values, gain) in systems.items():
        clean, noisy = states(values, gain, u), states(values, gain, u + noise)
        kept = slice(500, None)
        gram = clean[kept].T @ clean[kept]
        ridge = gram + 1e-10 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        read = torch.linalg.solve(ridge, clean[kept].T @ target[kept])
        error[name] = [float((x[kept] @ read - target[kept]).square().mean().sqrt()) for x in (clean, noisy)]
    print(error)
    assert error["PTD"][1] <= 0.01
    assert error["S4D"][1] >= 0.2


# --- layers ----------------------------------------------------------------------------------------------------------


def dense_outputs(layer, A, V, u, dt):
    """The layer's system in the coordinates of HiPPO, discretised by scipy's matrix exponential."""
    B = (V @ torch.view_as_complex(layer.B.detach().double().contiguous())).real.numpy()
    C = torch.linalg.solve(V.T, torch.view_as_complex(layer.C.detach().double().contiguous()).T).T.real.numpy()
    n = len(A)
    step = scipy.linalg.expm(dt * np.block([[A.numpy(), np.eye(n)], [np.zeros((n, 2 * n))]]))
    a, b = step[:n, :n], step[:n, n:] @ B
    x, outputs = np.zeros((u.shape[0], n)), []
    for t in range(u.shape[1]):
        x = x @ a.T + u[:, t].double().numpy() @ b.T
        outputs.append(x @ C.T)
    return torch.tensor(np.stack(outputs, 1)) + u * layer.D.detach()


def relative(found, exact):
    return float((found - exact).norm() / exact.norm())


def test_a_layer_is_the_dense_system_to_its_perturbation():
    torch.manual_seed(0)
    u = torch.randn(2, 512, 8)
    A, _ = hippo("legs", 64)
    options = {"method": "ginibre", "eps": 0.1}
    layer = DiagonalSSM(8, 64, "s5-ptd", 0.01, 0.01, **options, generator=torch.Generator().manual_seed(3))
    V = perturb_then_diagonalize(A, "ginibre", 0.1, generator=torch.Generator().manual_seed(3)).V
    with torch.no_grad():
        layer.D.zero_()
        fft, state = layer(u)
        scan, last = layer(u, mode="scan")
        exact = dense_outputs(layer, A, V, u, 0.01)
        gaps = relative(scan, fft), relative(fft.double(), exact)
        values, _, normal = s4d_init(64)
        B = torch.linalg.solve(normal, V @ torch.view_as_complex(layer.B.double().contiguous()))
        C = torch.linalg.solve(V.T, torch.view_as_complex(layer.C.double().contiguous()).T).T @ normal
        s4d = copy.deepcopy(layer)
        s4d.log_decay.copy_((-values.real).log())
        s4d.frequency.copy_(values.imag)
        s4d.B.copy_(torch.view_as_real(B))
        s4d.C.copy_(torch.view_as_real(C))
        lost = relative(s4d(u)[0].double(), exact)
    print(f"scan against FFT {gaps[0]:.1e}, against dense {gaps[1]:.1e}, S5's own start {lost:.2f}")
    assert gaps[0] <= 1e-2
    assert gaps[1] <= 2e-2
    assert lost >= 0.5
    torch.testing.assert_close(state, last, rtol=1e-2, atol=1e-2 * float(last.abs().max()))


def test_an_optimised_layer_is_accurate_in_single_precision():
    layer = DiagonalSSM(4, 64, "s5-ptd", 0.01, 0.01)
    u = randn(1, 512, 4, dtype=torch.float32)
    with torch.no_grad():
        error = relative(layer(u, mode="scan")[0], layer(u)[0])
    print(f"scan against FFT {error:.1e}")
    assert error <= 1e-3


@pytest.mark.parametrize("init", ["s5-ptd", "s4-ptd", "s4d"])
def test_steps_halves_and_modes_agree(init):
    layer = DiagonalSSM(6, 16, init, method="ginibre").double()
    u = randn(3, 40, 6)
    with torch.no_grad():
        whole, last = layer(u)
        for mode in ("fft", "scan"):
            first, state = layer(u[:, :13], mode=mode)
            second, end = layer(u[:, 13:], state, mode=mode)
            torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(end, last, rtol=1e-6, atol=1e-6)
        state, steps = None, []
        for t in range(40):
            y, state = layer.step(u[:, t], state)
            steps.append(y)
        torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", ["s5-ptd", "s4-ptd"])
def test_the_frequency_response_is_that_of_the_system(init):
    """A slow sine through many small steps comes out as the response says."""
    layer = DiagonalSSM(2, 8, init, 1e-3, 1e-3, method="ginibre").double()
    omega = 3.0
    t = 1e-3 * torch.arange(20000, dtype=torch.float64)
    u = torch.stack((torch.sin(omega * t), torch.zeros_like(t)), 1)[None]
    with torch.no_grad():
        y = layer(u)[0][0, -4000:, 0]
        response = layer.frequency_response(torch.tensor([omega], dtype=torch.float64))[0]
    response = complex(response[0, 0] if init == "s5-ptd" else response[0])
    expected = (response * np.exp(1j * omega * t[-4000:].numpy())).imag
    assert np.abs(y.numpy() - expected).max() <= 0.02 * abs(response)


def test_it_learns():
    """Gradients reach every parameter, and a delay is fitted."""
    layer = DiagonalSSM(1, 32, "s5-ptd", 0.02, 0.02, method="ginibre")
    u = randn(8, 64, 1, dtype=torch.float32)
    target = torch.nn.functional.pad(u, (0, 0, 5, 0))[:, :64]
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    losses = []
    for _ in range(200):
        loss = (layer(u)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] <= 0.35 * losses[0]


# --- adapters --------------------------------------------------------------------------------------------------------

TOKENS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(input_ids=tokens, use_cache=False).logits


@pytest.fixture(scope="module")
def adapted():
    model = tiny_model("llama")
    names = PTD(PTDOptions(layers=[0, 2], d_state=8)).convert(model, torch.Generator().manual_seed(0))
    assert names == ["model.layers.0", "model.layers.2"]
    return model


def test_an_adapter_changes_nothing_until_it_is_trained(adapted):
    assert torch.equal(logits(adapted), logits(tiny_model("llama")))


def test_adapters_train_save_reload_and_decode(adapted, tmp_path):
    model = copy.deepcopy(adapted)
    with torch.no_grad():
        for index in (0, 2):
            model.model.layers[index].ssm_adapter.out.weight.normal_(
                std=0.2, generator=torch.Generator().manual_seed(1)
            )
    expected = logits(model)
    assert float((expected - logits(adapted)).abs().max()) > 1e-2
    attach(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
    steps, cache = [], None
    with torch.no_grad():
        for part in TOKENS.split([5, 1, 1, 1, 1, 1, 1, 1], dim=1):
            output = loaded(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)
    greedy = loaded.generate(TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for t in range(4):
        following = logits(loaded, greedy[:, : 12 + t])[:, -1].argmax(-1)
        assert torch.equal(following, greedy[:, 12 + t])


def test_bad_blocks(adapted):
    with pytest.raises(InputError, match=r"layers: 9 is no block of this model; it has 0\.\.2"):
        PTD(PTDOptions(layers=[9])).convert(tiny_model("llama"), torch.Generator())
    with pytest.raises(InputError, match=r"model\.layers\.0 has an adapter already"):
        PTD(PTDOptions(layers=[0], d_state=4)).convert(adapted, torch.Generator())


def test_the_report_compares_gaps():
    report = frequency_report(32)
    assert report.column("states") == [8, 16, 32]
    assert min(report.column("S4D gap")) >= 0.3
    assert max(report.column("PTD gap")) <= 1e-2
    assert report.curves


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("A", "options", "message"),
    [
        (torch.zeros(3, 4), {}, "A must be square"),
        (torch.zeros(0, 0), {}, "of size 1 at least"),
        (torch.full((3, 3), math.nan), {}, "A is not finite"),
        (-torch.eye(3), {"eps": 0.0}, "eps and max_eps must be positive"),
        (-torch.eye(3), {"gamma": -1.0}, "gamma not negative"),
        (torch.eye(3), {}, "unstable"),
        (-torch.eye(3), {"method": "random"}, "unknown method"),
    ],
)
def test_bad_systems(A, options, message):
    with pytest.raises(InputError, match=message):
        perturb_then_diagonalize(A, **options)


def test_singular_eigenvectors_are_never_returned():
    jordan = -torch.eye(4, dtype=torch.float64) + torch.diag(torch.ones(3, dtype=torch.float64), 1)
    found = perturb_then_diagonalize(jordan, "ginibre", 0.01)
    assert math.isfinite(found.kappa)
    assert found.eps == pytest.approx(0.01)


def test_what_a_dtype_does_not_resolve_is_told():
    A, _ = hippo("legs", 32)
    with pytest.warns(UserWarning, match="are not resolved in torch.float16"):
        perturb_then_diagonalize(A.half(), "ginibre", 1e-3)


def test_bad_layers():
    with pytest.raises(InputError, match="n must be at least 1"):
        hippo("legs", 0)
    with pytest.raises(InputError, match="at most dt_max"):
        DiagonalSSM(4, 4, dt_min=0.1, dt_max=0.01)
    with pytest.raises(InputError, match="at least 1"):
        DiagonalSSM(4, 0)
    with pytest.raises(InputError, match="unknown init"):
        DiagonalSSM(4, 4, init="s6")
    layer = DiagonalSSM(4, 4, method="ginibre")
    with pytest.raises(InputError, match=r"u must be \(batch, L, 4\)"):
        layer(torch.zeros(2, 3, 5))

"""Spectral-mixture Gaussian processes: kernels against their spectra, equations of high frequency, hidden series."""

import logging
import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.integrate import quad
from transformers import LlamaConfig, LlamaForCausalLM

from llmcompress.analyze import gather
from llmcompress.backends.analysis.gp_hm import GPHM, _derivatives
from llmcompress.backends.analysis.gp_pde import GPPDE, GPPDEOptions, fit_series, mean_attention_logits, spectral_kernel
from llmcompress.backends.analysis.spectral_kernels import KINDS, cholesky, initial_params
from llmcompress.calibration.text import pack, tokenize
from llmcompress.compressors.ranks import rank_for
from llmcompress.compressors.svd_llm import svd_llm_factorize
from llmcompress.errors import InputError, RunError
from llmcompress.models.structure import analyse
from tests.tiny import save_tiny

sin, cos = torch.sin, torch.cos


def line(a, b, n):
    return torch.linspace(a, b, n, dtype=torch.float64)


def ends(n):
    mask = torch.zeros(n, dtype=torch.bool)
    mask[[0, -1]] = True
    return mask


def relative(found, exact):
    return float((found - exact).norm() / exact.norm())


def some_params(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = 3 if kind in ("stm", "gm") else 1
    drawn = torch.randn(3, q, generator=generator, dtype=torch.float64)
    return {"log_w": drawn[0], "log_a": drawn[1], "mu": 3 * drawn[2].abs()}


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stm", "gm"])
def test_a_kernel_is_the_transform_of_its_spectrum(kind):
    params = some_params(kind)
    for tau in (0.05, 0.3, 1.1):
        total = 0.0
        for w, a, mu in zip(params["log_w"].exp(), params["log_a"].exp(), params["mu"], strict=True):
            scale = float(a) / (2 * math.pi) if kind == "stm" else math.sqrt(float(a) / (2 * math.pi**2))
            spectrum = scipy.stats.t(5, scale=scale) if kind == "stm" else scipy.stats.norm(scale=scale)
            symmetric = quad(spectrum.pdf, 0, np.inf, weight="cos", wvar=2 * math.pi * tau, epsabs=1e-11, limlst=200)
            total += float(w) * 2 * symmetric[0] * math.cos(2 * math.pi * float(mu) * tau)
        (found,) = spectral_kernel(torch.tensor([tau], dtype=torch.float64), params, kind, 0)
        assert float(found) == pytest.approx(total, rel=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_autograd(kind):
    params = some_params(kind, 1)
    tau = torch.tensor([-1.3, -0.2, 0.07, 0.9], dtype=torch.float64, requires_grad=True)
    value, first, second = spectral_kernel(tau, params, kind)
    (slope,) = torch.autograd.grad(value.sum(), tau, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), tau)
    torch.testing.assert_close(first, slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, curvature, rtol=1e-12, atol=1e-12)


def test_kronecker_structure_is_the_dense_computation():
    x, t = line(0, 1, 6), line(0, 2, 8)
    process = GPHM([x, t], "stm", 3, 2.0, jitter=1e-3)
    process.params = [some_params("stm", 2), some_params("stm", 3)]
    u = torch.randn(6, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    process.solution = u

    def dense(axis, params, order, others=None):
        others = axis if others is None else others
        lag = (others[:, None] - axis).flatten()
        return spectral_kernel(lag, params, "stm")[order].view(len(others), len(axis))

    identity = [torch.eye(6, dtype=torch.float64), torch.eye(8, dtype=torch.float64)]
    covariances = [dense(a, p, 0) + 1e-3 * i for a, p, i in zip((x, t), process.params, identity, strict=True)]
    whole = torch.kron(*covariances)
    inverse = torch.linalg.solve(whole, u.flatten())
    kernels = process._kernels()
    quadratic = float(u.flatten() @ inverse)
    log_det = sum(48 / n * float(k.log_det) for n, k in zip((6, 8), kernels, strict=True))
    assert log_det == pytest.approx(float(torch.linalg.slogdet(whole)[1]), rel=1e-10)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[0] = True
    first, second = _derivatives(kernels, u)
    for found, orders in ((first[0], (1, 0)), (first[1], (0, 1)), (second[0], (2, 0)), (second[1], (0, 2))):
        # jitter counts where the axis is not differentiated: there the matrix and its inverse cancel
        parts = [dense(a, p, o) if o else c for a, p, o, c in
                 zip((x, t), process.params, orders, covariances, strict=True)]  # fmt: skip
        torch.testing.assert_close(found, (torch.kron(*parts) @ inverse).view(6, 8), rtol=1e-9, atol=1e-10)
    to_x, to_t = line(0.1, 0.9, 5), line(0.2, 1.7, 4)
    cross = torch.kron(dense(x, process.params[0], 0, to_x), dense(t, process.params[1], 0, to_t))
    torch.testing.assert_close(process.predict([to_x, to_t]), (cross @ inverse).view(5, 4), rtol=1e-9, atol=1e-10)
    residual = second[0] + second[1]
    process.log_tau.fill_(0.3)
    process.log_v.fill_(-0.2)
    from llmcompress.backends.analysis.gp_hm import _Problem

    problem = _Problem(lambda u, f, s: s[0] + s[1], mask, torch.ones(8).double(), torch.ones(8).double())
    expected = (
        0.5 * log_det + 0.5 * quadratic + 200 * 0.5 * (math.exp(0.3) * float((u[0] - 1).square().sum()) - 8 * 0.3)
        + 0.5 * math.exp(-0.2) * float(residual.square().sum()) + 0.5 * 48 * 0.2
    )  # fmt: skip
    assert float(process._loss(problem)) == pytest.approx(expected, rel=1e-9)


# --- equations -------------------------------------------------------------------------------------------------------


def test_a_published_run_comes_out_to_the_last_digit():
    """Joint mode, sin 100x on [0, 2 pi]: the authors' log has 0.27562065 at its last evaluation."""
    x, to = line(0, 2 * math.pi, 400), line(0, 2 * math.pi, 300)
    process = GPHM([x], "stm", 30, 20.0)
    log = process.fit("poisson", -1e4 * sin(100 * x), ends(400), sin(100 * x)[ends(400)], mode="joint", steps=96)
    assert len(log.loss) == 96
    assert relative(process.predict([to]), sin(100 * to)) == pytest.approx(0.27562, abs=1e-4)


@pytest.mark.slow
def test_a_published_run_in_two_dimensions():
    """400 x 400, corners counted twice."""
    x, to = line(0, 2 * math.pi, 400), line(0, 2 * math.pi, 300)
    u = sin(100 * x)[:, None] * sin(100 * x)
    counts = torch.zeros(400, 400, dtype=torch.int64)
    for side in (counts[0], counts[-1], counts[:, 0], counts[:, -1]):
        side += 1
    process = GPHM([x, x], "stm", 30, 20.0)
    process.fit("poisson", -2e4 * u, counts, u[counts > 0], mode="joint", steps=96)
    exact = sin(100 * to)[:, None] * sin(100 * to)
    assert relative(process.predict([to, to]), exact) == pytest.approx(0.46759, abs=5e-4)


def smooth(x):
    return sin(6 * x) * cos(100 * x)


#: solution, source of the equation, points, true frequencies in cycles
PROBLEMS = {
    "poisson": ("poisson", lambda x: sin(100 * x), lambda x: -1e4 * sin(100 * x), 100, [100]),
    "mix": (
        "poisson", lambda x: sin(x) + 0.1 * sin(20 * x) + 0.05 * sin(100 * x),
        lambda x: -sin(x) - 40 * sin(20 * x) - 500 * sin(100 * x), 150, [1, 20, 100],
    ),
    "allen_cahn": (
        "allen_cahn", smooth,
        lambda x: -10036 * smooth(x) - 1200 * cos(6 * x) * sin(100 * x) + smooth(x) * (smooth(x) ** 2 - 1), 120,
        [94, 106],
    ),
}  # fmt: skip


def solved(problem, kind, start=0.0):
    name, u, source, n, _ = PROBLEMS[problem]
    x, to = line(0, 1, n), line(0, 1, 300)
    process = GPHM([x], kind, 20, 20.0, start_log_a=start)
    log = process.fit(name, source(x), ends(n), u(x)[ends(n)], steps=150)
    return relative(process.predict([to]), u(to)), process, log


@pytest.mark.parametrize(("problem", "limit"), [("poisson", 5e-4), ("mix", 1e-3), ("allen_cahn", 1e-3)])
def test_equations_of_high_frequency(problem, limit):
    errors = []
    for kind in ("stm", "gm"):
        error, process, _ = solved(problem, kind)
        print(problem, kind, error)
        errors.append(error)
        assert error <= limit
        heaviest = [mu for mu, _ in process.frequencies(0.0)[0][:6]]
        for omega in PROBLEMS[problem][4]:
            assert min(abs(mu - omega / (2 * math.pi)) for mu in heaviest) <= 0.1
        if problem == "poisson":
            assert len(process.frequencies(0.01)[0]) <= 3
    if problem == "poisson":
        assert min(solved(problem, "se", start)[0] for start in (0.0, 2.0, 4.0)) >= 10 * max(errors)
        assert solved(problem, "matern")[0] >= 100 * max(errors)
    elif problem == "allen_cahn":
        assert solved(problem, "matern")[0] >= 1e-2
        assert solved(problem, "se")[0] >= 1e-2


def test_a_poisson_equation_in_two_dimensions():
    x, to = line(0, 1, 22), line(0, 1, 60)
    u, exact = (sin(30 * axis)[:, None] * sin(30 * axis) for axis in (x, to))
    mask = torch.ones(22, 22, dtype=torch.bool)
    mask[1:-1, 1:-1] = False
    errors = {}
    for kind in KINDS:
        process = GPHM([x, x], kind, 12, 8.0)
        process.fit("poisson", -1800 * u, mask, u[mask], steps=60)
        errors[kind] = relative(process.predict([to, to]), exact)
    print(errors)
    assert errors["stm"] <= 5e-4
    assert errors["gm"] <= 2e-3
    assert min(errors["se"], errors["matern"]) >= 20 * errors["stm"]


def test_an_advection_equation():
    """Values where it flows in and at the start; the frequency in time is found."""
    x, t = line(0, 1, 12), line(0, 1, 40)
    to = line(0, 1, 40), line(0, 1, 120)
    u, exact = (sin(a[:, None] - 20 * b) for a, b in ((x, t), to))
    mask = torch.zeros(12, 40, dtype=torch.bool)
    mask[0], mask[:, 0] = True, True
    errors = {}
    for kind in ("stm", "se", "matern"):
        process = GPHM([x, t], kind, 10, 8.0)
        process.fit("advection", None, mask, u[mask], steps=200, beta=20.0)
        errors[kind] = relative(process.predict(to), exact)
        if kind == "stm":
            assert min(abs(mu - 20 / (2 * math.pi)) for mu, _ in process.frequencies()[1]) <= 0.05
    print(errors)
    assert errors["stm"] <= 3e-2
    assert min(errors["se"], errors["matern"]) >= 0.5


def test_an_equation_of_ones_own_is_that_of_its_name():
    name, u, source, n, _ = PROBLEMS["allen_cahn"]
    x = line(0, 1, n)
    own, named = GPHM([x], "gm", 20, 20.0), GPHM([x], "gm", 20, 20.0)
    named.fit(name, source(x), ends(n), u(x)[ends(n)], steps=10)
    own.fit(lambda v, _, second: second[0] + v**3 - v - source(x), None, ends(n), u(x)[ends(n)], steps=10)
    torch.testing.assert_close(own.solution, named.solution, rtol=1e-6, atol=1e-8)


# --- series ----------------------------------------------------------------------------------------------------------


def rotary_series(seed, n=256):
    """Four sums of three rotary cosines with noise .05; 64 positions seen; their frequencies in cycles a window."""
    generator = torch.Generator().manual_seed(seed)
    rotary = 10000 ** (-torch.arange(0, 32, dtype=torch.float64) / 32)
    usable = [i for i in range(32) if 1.5 <= float(rotary[i]) * n / (2 * math.pi) <= 42]
    position, rows, frequencies = torch.arange(n, dtype=torch.float64), [], []
    for _ in range(4):
        chosen = [usable[i] for i in torch.randperm(len(usable), generator=generator)[:3]]
        phases, sizes = torch.rand(2, 3, generator=generator, dtype=torch.float64)
        row = sum((s + 0.5) * cos(rotary[i] * position + 2 * math.pi * p)
                  for i, p, s in zip(chosen, phases, sizes, strict=True))  # fmt: skip
        rows.append(row + 0.05 * torch.randn(n, generator=generator, dtype=torch.float64))
        frequencies.append([float(rotary[i]) * n / (2 * math.pi) for i in chosen])
    seen = torch.zeros(n, dtype=torch.bool)
    seen[torch.randperm(n, generator=generator)[:64]] = True
    return torch.stack(rows), seen, frequencies


@pytest.mark.parametrize("seed", [0, 1])
def test_hidden_entries_and_planted_frequencies_are_found(seed):
    values, seen, planted = rotary_series(seed)

    def missed(found):
        hidden = values[:, ~seen]
        return float(((found[:, ~seen] - hidden).norm(dim=1) / hidden.norm(dim=1)).mean())

    hidden = torch.where(seen, values, torch.nan)  # entries that are not seen are not read
    fits = {kind: fit_series(hidden, seen, kind, max_frequency=45.0) for kind in KINDS}
    errors = {kind: missed(fit.mean) for kind, fit in fits.items()}
    position = np.arange(256)
    straight = [np.interp(position, position[seen], row[seen]) for row in values.numpy()]
    errors["linear"] = missed(torch.tensor(np.stack(straight)))
    print(errors)
    assert errors["stm"] <= 0.85 * min(errors["se"], errors["matern"], errors["linear"])
    params = fits["gm"].params
    found = 0
    for row, frequencies in enumerate(planted):
        heaviest = params["mu"][row][params["log_w"][row].argsort(descending=True)[:6]].abs()
        found += sum(float((heaviest - f).abs().min()) <= 0.3 for f in frequencies)
    assert found >= 11


def test_one_series_is_fitted_as_in_a_batch():
    values, seen, _ = rotary_series(0)
    alone = fit_series(values[1], seen, "gm", max_frequency=45.0, steps=20)
    batch = fit_series(values, seen, "gm", max_frequency=45.0, steps=20)
    torch.testing.assert_close(alone.mean[0], batch.mean[1], rtol=1e-6, atol=1e-8)


# --- a model ---------------------------------------------------------------------------------------------------------


def test_mean_logits_are_those_that_the_model_computes(tmp_path):
    """Against attention weights: logits differ from their logarithms by a constant a row."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=60, attn_implementation="eager")  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    tokens = torch.randint(60, (1, 24), generator=torch.Generator().manual_seed(1))
    subject = gather(model, tokens)
    sites = {site.role: site for site in analyse(model).in_block(0)}
    x = subject.inputs[sites["q"].name].view(1, 24, 32)
    found = mean_attention_logits(model, sites, x, 2)
    with torch.no_grad():
        weights = model(tokens, output_attentions=True).attentions[0][0].double()
    # the difference of neighbouring distances is free of the softmax's constants, for rows that hold both
    logs = weights.log()
    step = torch.stack([logs[:, i, i] - logs[:, i, i - 1] for i in range(1, 24)]).mean(0)
    own = x[0]
    q, k = (model.get_submodule(sites[role].name)(own).view(24, -1, 8) for role in ("q", "k"))
    first_row = (q[0].double() * k[0].repeat_interleave(2, 0).double()).sum(-1) / math.sqrt(8)  # position 0: not turned
    expected = (found[:, 0] * 24 - first_row) / 23 - found[:, 1]
    torch.testing.assert_close(step, expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_spectrum_fills_in_positional_attention_and_the_models_own_frequencies_do_better(
    smollm2, smollm2_tokenizer, wikitext
):
    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"][:20_000]]), 2, 512, "valid")
    subject = gather(smollm2, tokens, ["model.layers.1.self_attn.q_proj"])
    subject.model, subject.tokens = smollm2, tokens
    report = GPPDE(GPPDEOptions()).analyze(subject)
    mean = {name: float(np.mean(report.column(name))) for name in report.columns[1:]}
    print(mean)
    assert mean["stm"] <= 0.6 * mean["linear"]
    assert mean["rotary ridge"] <= min(mean[kind] for kind in KINDS)
    assert "use that one" in report.findings[0]
    assert report.curves[0].label == "measured"


def test_a_depth_profile_is_best_measured(smollm2, smollm2_tokenizer, wikitext):
    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"][:20_000]]), 2, 512, "valid")
    subject = gather(smollm2, tokens, ["gate"])
    report = GPPDE(GPPDEOptions(signal="depth_profile")).analyze(subject)
    print(report.findings)
    assert report.column("block") == list(range(30))
    assert [value is None for value in report.column("stm")] == [block % 2 == 0 for block in range(30)]
    values, filled = (np.array(report.column(name)[1::2], float) for name in ("measured", "linear"))
    assert f"linear {np.sqrt(np.mean((filled - values) ** 2)):.3f}" in report.findings[0]
    assert "measure every block" in report.findings[0]
    site = subject.sites[7]
    x, weight = subject.inputs[site.name].double(), subject.weights[site.name].double()
    factors = svd_llm_factorize(weight, x.T @ x, rank_for(576, 1536, 0.3), "eigh")
    error = float((x @ (weight.T - factors.A @ factors.B)).norm() / (x @ weight.T).norm())
    assert report.column("measured")[7] == pytest.approx(math.log10(error), abs=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_depth_profile_needs_a_site_in_each_of_many_blocks(smollm2, smollm2_tokenizer, wikitext):
    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"][:2000]]), 1, 64, "valid")
    for targets, count in ((["model.layers.3.mlp.gate_proj"], 1), (["model.layers.0.mlp.(gate|up)_proj"], 2)):
        with pytest.raises(InputError, match=rf"one site in each of 8 blocks or more, got {count} sites"):
            GPPDE(GPPDEOptions(signal="depth_profile")).analyze(gather(smollm2, tokens, targets))


def test_bad_axes_and_options(caplog):
    for axis in (
        line(0, 1, 3),
        torch.tensor([0.0, 1, 2, 4]),
        torch.tensor([0.0, 1, math.nan, 3]),
        line(0, 1, 9).flip(0),
    ):
        with pytest.raises(InputError, match="axis must be"):
            GPHM([axis])
    with pytest.raises(InputError, match="one or two axes; got 3"):
        GPHM([line(0, 1, 5)] * 3)
    with pytest.raises(InputError, match="unknown kind 'rbf'; known: stm, gm, matern, se"):
        GPHM([line(0, 1, 9)], "rbf")
    with pytest.raises(InputError, match="a component at least"):
        initial_params("stm", 0, 20.0)
    with caplog.at_level(logging.WARNING, "llmcompress"):
        GPHM([line(0, 1, 21)], "stm", 4, 30.0)
    assert "max_frequency 30 is above the grid's Nyquist frequency 10" in caplog.text


def test_bad_problems(caplog):
    x = line(0, 1, 12)
    process = GPHM([x], "gm", 4, 4.0)
    zeros, two = torch.zeros(12), torch.zeros(2)
    with pytest.raises(InputError, match="unknown equation 'heat'; known: poisson, allen_cahn, advection"):
        process.fit("heat", zeros, ends(12), two)
    with pytest.raises(InputError, match="advection needs beta"):
        process.fit("advection", None, ends(12), two)
    with pytest.raises(InputError, match="holds 0 entries"):
        process.fit("poisson", zeros, torch.zeros(12, dtype=torch.bool), torch.zeros(0))
    with pytest.raises(InputError, match="holds 2 entries and needs as many values"):
        process.fit("poisson", zeros, ends(12), torch.zeros(3))
    for source, values in ((zeros * math.nan, two), (zeros, two + math.inf)):
        with pytest.raises(InputError, match="must be finite"):
            process.fit("poisson", source, ends(12), values)
    with pytest.raises(InputError, match=r"the grid's shape \(12,\); got \(11,\)"):
        process.fit("poisson", torch.zeros(11), ends(12), two)
    with pytest.raises(InputError, match="unknown mode 'both'"):
        process.fit("poisson", zeros, ends(12), two, mode="both")
    with pytest.raises(InputError, match="at most 2500 grid points; got 2601: use mode joint"):
        GPHM([line(0, 1, 51)] * 2, "gm", 4, 4.0).fit("poisson", None, torch.eye(51) > 0, torch.zeros(51))
    with pytest.raises(RunError, match="step 1: the loss is not finite"):
        process.fit(lambda u, _, second: second[0] * math.inf, None, ends(12), two, mode="joint", steps=2)
    edge = GPHM([x], "gm", 4, 4.0)
    edge.params[0]["log_w"][-1] += 3
    edge._warn_of_edge()
    assert "the heaviest frequency 4 is at max_frequency 4: raise it" in caplog.text


def test_a_failing_factorisation_is_retried_and_told(caplog):
    singular = torch.ones(3, 3, dtype=torch.float64) - 1e-7 * torch.eye(3, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "llmcompress"):
        cholesky(singular, 1e-9)
    assert "needed a jitter of 1e-06" in caplog.text
    with pytest.raises(RunError, match="not positive definite with a jitter of 1e-06"):
        cholesky(-singular, 1e-9)


def test_bad_series_and_models(tmp_path):
    seen = torch.arange(10) < 6
    with pytest.raises(InputError, match="at least 4 seen entries"):
        fit_series(torch.zeros(10), torch.arange(10) < 3)
    with pytest.raises(InputError, match=r"values must be \(b, n\)"):
        fit_series(torch.zeros(9), seen)
    with pytest.raises(InputError, match="seen values are not finite"):
        fit_series(torch.full((10,), math.nan), seen)
    with pytest.raises(InputError, match="unknown kind"):
        fit_series(torch.arange(10.0), seen, "rbf")
    from llmcompress.models.load import load_model, locate

    model = load_model(locate(str(save_tiny(tmp_path / "gpt2", "gpt2"))))
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    subject = gather(model, tokens)
    subject.model, subject.tokens = model, tokens
    with pytest.raises(InputError, match="no query and key projections of its own"):
        GPPDE(GPPDEOptions(distances=8, seen=4)).analyze(subject)
    with pytest.raises(InputError, match="seen < distances <= the sequences' 16 tokens"):
        GPPDE(GPPDEOptions(distances=32)).analyze(subject)

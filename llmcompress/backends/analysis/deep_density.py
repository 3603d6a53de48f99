"""Likelihood of data near a low-dimensional structure by a deep generative model, fitted to perturbed rows.

X = f(Z) + noise with f a ReLU network, fitted by an importance-weighted bound on the likelihood; fresh noise is added
to every minibatch (arXiv 2105.04046: without it, maximum likelihood may fail where the law is singular). The estimate
of the law is the push-forward of f alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from scipy.stats.qmc import Sobol
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from llmcompress.backends.checks import choose
from llmcompress.errors import InputError, RunError

log = logging.getLogger("llmcompress")

START_LOG_SIGMA = -0.7
LOG_VARIANCES = (-14.0, 6.0)  # of the encoder
SCORED_AT_ONCE = 32768  # rows times particles


class DeepDensity(nn.Module):
    """p(x | z) = N(f(z), sigma² I), z ~ N(0, I): latent_dim at or a little above the data's own dimension.

    noise: sigma is `learned`, or `fixed` at sqrt(sigma_star² + perturbation²). linear: f and the encoder are affine,
    which makes it probabilistic PCA. InputError for dimensions below 1, an unknown noise.
    """

    def __init__(
        self,
        latent_dim: int,
        data_dim: int,
        hidden: int = 64,
        noise: Literal["learned", "fixed"] = "learned",
        sigma_star: float = 1e-2,
        sigma_floor: float = 1e-4,
        linear: bool = False,
    ) -> None:
        super().__init__()
        choose("noise", noise, ("learned", "fixed"))
        if min(latent_dim, data_dim, hidden) < 1:
            raise InputError(
                f"latent_dim, data_dim and hidden must be at least 1; got {latent_dim}, {data_dim}, {hidden}"
            )
        if latent_dim > data_dim:
            log.warning("latent_dim %d is above the data's %d dimensions", latent_dim, data_dim)
        self.latent_dim, self.data_dim, self.noise = latent_dim, data_dim, noise
        self.sigma_star, self.sigma_floor = sigma_star, sigma_floor
        self.decoder = _network([latent_dim, *([] if linear else [hidden, hidden]), data_dim])
        self.encoder = _network([data_dim, *([] if linear else [hidden, hidden]), 2 * latent_dim])
        self.log_sigma = nn.Parameter(torch.tensor(START_LOG_SIGMA), requires_grad=noise == "learned")
        _initialise(self, 0.0, torch.Generator().manual_seed(0))

    def forward(self, x: Tensor, draws: Tensor) -> Tensor:
        """log p(x, z) - log q(z | x), in nats, at z drawn by the encoder: x (b, D), draws (K, b, d) -> (K, b)."""
        mean, log_variance = self.posterior(x)
        z = mean + (0.5 * log_variance).exp() * draws
        log_sigma = self.log_sigma.clamp_min(math.log(self.sigma_floor))
        missed = ((x - self.decoder(z)) / log_sigma.exp()).square().sum(-1)
        log_two_pi = math.log(2 * math.pi)
        data = -0.5 * missed - self.data_dim * (log_sigma + 0.5 * log_two_pi)
        # the constants of prior and posterior cancel
        return data - 0.5 * z.square().sum(-1) + 0.5 * (draws.square() + log_variance).sum(-1)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x), each (..., d)."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return mean, log_variance.clamp(*LOG_VARIANCES)

    def fit(
        self,
        x: Tensor,
        perturbation: float,
        steps: int = 1500,
        particles: int = 5,
        batch: int = 128,
        lr: float = 4e-3,
        seed: int = 0,
    ) -> DeepDensity:
        """From new weights drawn with `seed`, Adam with a cosine schedule, noise of size `perturbation` on every row.

        x (n, D) float32. The global random state is left alone. InputError for bad rows or options, RunError naming the
        step whose loss is not finite.
        """
        return fit_together([self], [x], [perturbation], steps, particles, batch, lr, [seed])[0]

    @torch.no_grad()
    def bound(self, x: Tensor, particles: int = 64, seed: int = 0) -> Tensor:
        """The importance-weighted bound on log p(x), in nats, (n,): it rises to it with the particles."""
        _check_rows(x, self.data_dim)
        if particles < 1:
            raise InputError(f"particles must be at least 1; got {particles}")
        generator = torch.Generator(device=x.device).manual_seed(seed)
        found = []
        for part in x.split(max(1, SCORED_AT_ONCE // particles)):
            draws = torch.randn(particles, len(part), self.latent_dim, generator=generator, device=x.device)
            found.append(self(part, draws).logsumexp(0) - math.log(particles))
        return torch.cat(found)

    def score(
        self, x: Tensor, perturbation: float = 0.0, particles: int = 64, repeats: int = 4, seed: int = 0
    ) -> Tensor:
        """The bound of rows with noise of size `perturbation`, (n,), averaged over `repeats` draws of it.

        A density of perturbed rows: scores at different perturbations or scales do not compare.
        """
        _check_rows(x, self.data_dim)
        if perturbation < 0 or repeats < 1:
            raise InputError(f"perturbation must not be negative, repeats at least 1; got {perturbation}, {repeats}")
        generator = torch.Generator(device=x.device).manual_seed(seed)
        total = torch.zeros(len(x), device=x.device)
        for repeat in range(repeats):
            noised = x + perturbation * torch.randn(x.shape, generator=generator, device=x.device)
            total += self.bound(noised, particles, seed + repeat) / repeats
        return total

    @torch.no_grad()
    def push(self, m: int, seed: int = 0) -> Tensor:
        """m points f(z), (m, D), without noise: z from a scrambled Sobol sequence through the normal quantile."""
        uniform = Sobol(self.latent_dim, seed=seed).random(1 << max(0, (m - 1).bit_length()))[:m]
        z = torch.special.ndtri(torch.tensor(uniform).clamp(1e-6, 1 - 1e-6)).float()
        found: Tensor = self.decoder(z.to(self.log_sigma.device))
        return found

    def sigma(self) -> float:
        """The size of the noise around f(z)."""
        return max(float(self.log_sigma.detach().exp()), self.sigma_floor)


def fit_together(
    models: Sequence[DeepDensity],
    data: Sequence[Tensor],
    perturbations: Sequence[float],
    steps: int = 1500,
    particles: int = 5,
    batch: int = 128,
    lr: float = 4e-3,
    seeds: Sequence[int] | None = None,
) -> list[DeepDensity]:
    """`DeepDensity.fit` of models of one shape side by side, as batched products: the same in a fraction of the time.

    data: rows (n, D) of each. Errors as in `fit`.
    """
    seeds = list(seeds or [0] * len(models))
    if not models or not len(models) == len(data) == len(perturbations) == len(seeds):
        raise InputError("as many models as data, perturbations and seeds are needed, at least one")
    if min(particles, steps, batch) < 1:
        raise InputError(f"particles, steps and batch must be at least 1; got {particles}, {steps}, {batch}")
    for model, x, perturbation in zip(models, data, perturbations, strict=True):
        _check_rows(x, model.data_dim)
        if len(x) < 2 * batch:
            raise InputError(f"{len(x)} rows are fewer than two batches of {batch}")
        if not (math.isfinite(perturbation) and perturbation >= 0):
            raise InputError(f"perturbation must not be negative; got {perturbation}")
        if model.noise == "fixed" and math.hypot(model.sigma_star, perturbation) == 0:
            raise InputError("noise fixed needs a positive sigma_star or perturbation: the likelihood has no bound")
        if bool((x.std(0) == 0).any()):
            log.warning("axis %d has no variance", int((x.std(0) == 0).nonzero()[0]))
    generators = [torch.Generator(device=x.device).manual_seed(seed) for x, seed in zip(data, seeds, strict=True)]
    for model, perturbation, generator in zip(models, perturbations, generators, strict=True):
        _initialise(model, perturbation, generator)
    stacked, _ = stack_module_state(list(models))
    trained = {name: p.detach().requires_grad_(name != "log_sigma" or models[0].noise == "learned")
               for name, p in stacked.items()}  # fmt: skip
    optimizer = torch.optim.Adam([p for p in trained.values() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss_of(parameters: dict[str, Tensor], x: Tensor, draws: Tensor) -> Tensor:
        weights = functional_call(models[0], parameters, (x, draws))
        return math.log(particles) - weights.logsumexp(0).mean()

    for step in range(steps):
        drawn = [_minibatch(x, tilde, batch, particles, models[0].latent_dim, generator)
                 for x, tilde, generator in zip(data, perturbations, generators, strict=True)]  # fmt: skip
        rows, draws = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        optimizer.zero_grad()
        with torch.enable_grad():
            losses = vmap(loss_of)(trained, rows, draws)
            losses.sum().backward()
        if not torch.isfinite(losses).all():
            raise RunError(f"step {step + 1}: the loss is not finite; lower lr, or perturb the data")
        optimizer.step()
        schedule.step()
    for index, model in enumerate(models):
        model.load_state_dict({name: p[index].detach() for name, p in trained.items()})
        if model.noise == "learned" and model.sigma() <= model.sigma_floor:
            log.warning("sigma is at its floor of %g: the likelihood is degenerate, its scores have no bound",
                        model.sigma_floor)  # fmt: skip
    return list(models)


def _minibatch(
    x: Tensor, tilde: float, batch: int, particles: int, latent: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    rows = x[torch.randint(len(x), (batch,), generator=generator, device=x.device)]
    noise = torch.randn(rows.shape, generator=generator, device=x.device)
    return rows + tilde * noise, torch.randn(particles, batch, latent, generator=generator, device=x.device)


def _network(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.utils.skip_init(nn.Linear, d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def _initialise(model: DeepDensity, perturbation: float, generator: torch.Generator) -> None:
    """Weights and biases uniform within 1 / sqrt(d_in), as torch's layers have them, drawn from the generator."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for parameter in (layer.weight, layer.bias):
                drawn = torch.rand(parameter.shape, generator=generator, device=parameter.device)
                parameter.copy_((2 * drawn - 1) / math.sqrt(layer.in_features))
    fixed = math.log(max(math.hypot(model.sigma_star, perturbation), model.sigma_floor))
    model.log_sigma.fill_(START_LOG_SIGMA if model.noise == "learned" else fixed)


def _check_rows(x: Tensor, data_dim: int) -> None:
    if x.ndim != 2 or x.shape[1] != data_dim:
        raise InputError(f"rows must be (n, {data_dim}); got {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise InputError("the rows are not finite")

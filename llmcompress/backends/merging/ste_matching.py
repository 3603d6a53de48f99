"""Straight-through search for the permutation whose midpoint has the least loss.

Source: Git Re-Basin, arXiv 2209.04836, section 3.3 (straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmcompress.backends.merging.permutations import Permutation, PermutationSpec, State, check_states
from llmcompress.backends.merging.weight_matching import weight_matching


def ste_matching(
    spec: PermutationSpec,
    a: State,
    b: State,
    loss: Callable[[dict[str, Tensor], int], Tensor],
    start: State,
    steps: int = 150,
    lr: float = 3.0,
    momentum: float = 0.9,
    seed: int = 0,
) -> Permutation:
    """The permutation of b with the least loss at the midpoint to a, of all that the search meets.

    A latent state, from `start` (a random initialisation), is matched by b at every step; the loss is that of the
    midpoint of a and the matched b, its gradient is handed straight to the latent state, which SGD moves.
    loss(state, step): differentiable, on that step's batch. InputError as in `weight_matching`.
    """
    check_states([a, b, start])
    latent = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.SGD(latent.values(), lr=lr, momentum=momentum)
    best, least = spec.identity(a), float("inf")
    permutation = None
    for step in range(steps):
        fixed = {name: tensor.detach() for name, tensor in latent.items()}
        permutation = weight_matching(spec, fixed, b, seed, init=permutation).permutation
        matched = spec.apply(b, permutation)
        through = {name: latent[name] + (matched[name] - fixed[name]) for name in latent}
        value = loss({name: (a[name] + through[name]) / 2 for name in a}, step)
        if value.item() < least:
            best, least = dict(permutation), value.item()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return best

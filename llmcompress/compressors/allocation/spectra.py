"""In which space an allocation sees a unit's singular values."""

from __future__ import annotations

from typing import Literal

from llmcompress.compressors.kfac_svd import KFACSVD
from llmcompress.compressors.low_rank import Space, Whitened, joint_statistics, naming, stacked_weight
from llmcompress.types import Compressor, Problem, Profile

#: the method's own; the weights' (which takes no statistics); or that whitened on both sides, where squares are losses
#: and those of different units add up
Spectra = Literal["own", "weight", "loss"]

LOSS_NEEDS = frozenset({"gram", "output_gram"})


def profile(compressor: Compressor, problem: Problem, spectra: Spectra) -> Profile:
    """The unit's profile with the costs of the compressor and the spectrum of the wanted space.

    A method that reads output gradients measures losses itself, with its own options; so does one whose units are no
    one matrix, in any space.
    """
    itself = getattr(compressor, "profiles_itself", False)
    if spectra == "own" or itself or (spectra == "loss" and "output_gram" in compressor.needs):
        return compressor.profile(problem)
    with naming(problem.name):
        weight = stacked_weight(problem)
        space: Space = Whitened(weight)
        if spectra == "loss":
            space = KFACSVD().space(weight, joint_statistics(problem), problem.name)
        spectrum = space.spectrum().cpu()
    sites = problem.sites
    return Profile(sites, spectrum, compressor.costs(sites), sum(site.dense_values for site in sites))

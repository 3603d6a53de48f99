"""The error that truncation makes block by block, and whether half of the blocks tell the others'."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmcompress.backends.analysis.gp_series import fit_series
from llmcompress.backends.analysis.spectral_kernels import KINDS
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Curve, Report
from llmcompress.compressors.ranks import rank_for
from llmcompress.compressors.svd_llm import whitened
from llmcompress.errors import InputError

MIN_BLOCKS = 8


def truncation_error(x: Tensor, weight: Tensor, ratio: float) -> float:
    """Relative output error of the best low-rank weight with `ratio` of the values removed: x (n, d_in), weight
    (d_out, d_in)."""
    squares = whitened(weight.double(), x.double().T @ x.double(), "eigh").spectrum().square()
    rank = rank_for(weight.shape[1], weight.shape[0], ratio)
    return float((squares[rank:].sum() / squares.sum()).sqrt())


def depth_profile(subject: Subject, ratio: float) -> Report:
    """log10 of the truncation error by block; every other block hidden, and filled in from the rest.

    InputError unless the subject has one site in each of 8 blocks or more.
    """
    sites = sorted(subject.sites, key=lambda site: site.block)
    if len(sites) < MIN_BLOCKS or len({site.block for site in sites}) < len(sites):
        raise InputError(
            f"a depth profile needs one site in each of {MIN_BLOCKS} blocks or more, got {len(sites)} sites: for "
            "instance --site down"
        )
    errors = [truncation_error(subject.inputs[site.name], subject.weights[site.name], ratio) for site in sites]
    values = torch.tensor(errors, dtype=torch.float64).log10()
    seen = torch.arange(len(values)) % 2 == 0
    filled = {kind: fit_series(values, seen, kind).mean[0] for kind in KINDS}
    places = np.arange(len(values))
    filled["linear"] = torch.tensor(np.interp(places, places[seen], values[seen]))
    filled["mean"] = values[seen].mean().expand(len(values))
    report = Report(
        f"log10 output error of {sites[0].role} by block, {ratio:.0%} removed: {int((~seen).sum())} blocks from "
        f"{int(seen.sum())} others",
        ["block", "measured", *filled],
    )
    for place, site in enumerate(sites):
        hidden = [None if seen[place] else float(fit[place]) for fit in filled.values()]
        report.add(site.block, float(values[place]), *hidden)
    off = {name: float((fit - values)[~seen].square().mean().sqrt()) for name, fit in filled.items()}
    listed = ", ".join(f"{name} {value:.3f}" for name, value in off.items())
    report.findings.append(
        f"error in decades: {listed}; a block's own error costs one decomposition: measure every block"
    )
    report.x_label, report.y_label = "block", "log10 output error"
    blocks = [float(site.block) for site in sites]
    report.curves = [Curve("measured", blocks, values.tolist())]
    report.curves += [Curve(name, blocks, filled[name].tolist()) for name in ("stm", "linear")]
    return report

"""Which weights have gradients that settle into a subspace? Those of one fixed batch, taken while a model trains.

Source: WeLore, arXiv 2407.11239, section 2 (gradients of a fixed batch at checkpoints; matrices whose gradients become
parallel are those of low rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import scipy.stats
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Curve, Report
from llmcompress.compressors.allocation.welore import global_threshold, normalize_spectrum
from llmcompress.errors import InputError, RunError

ENERGY = 0.9  # of the squared spectrum, that the counted rank holds


class GradientStabilityOptions(BaseModel, extra="forbid"):
    snapshots: int = Field(default=6, ge=3, description="times that the fixed batch's gradients are taken")
    steps: int = Field(default=4, ge=1, description="AdamW steps on other text between two of them")
    lr: float = Field(default=1e-4, gt=0, description="learning rate of these steps")
    q: int = Field(default=16, ge=1, description="left singular vectors that span a gradient's subspace")
    err: float = Field(default=0.5, gt=0, lt=1, description="rank reduction at which retained ranks are read off")
    by: Literal["role", "block", "site"] = Field(default="role", description="what a row of the table sums up")


@dataclass
class GradientRecord:
    """What is kept of one matrix's gradients: no gradient itself.

    bases: left singular vectors (d_out, q) of each snapshot; sketches (sketch_dim,): random projections, in which
    cosines are those of the gradients to 1 / sqrt(sketch_dim); spectra (p,): singular values over the largest;
    cumulative: the running sum of the gradients at unit norm; cumulative_ranks: directions with 90 % of its energy.
    """

    shape: tuple[int, int]
    bases: list[Tensor] = field(default_factory=list)
    sketches: list[Tensor] = field(default_factory=list)
    spectra: list[Tensor] = field(default_factory=list)
    cumulative: Tensor | None = None
    cumulative_ranks: list[int] = field(default_factory=list)


class GradientRecorder:
    """Records the weight gradients of named linear modules, whenever `snapshot` is called after a backward pass.

    q: size of the recorded subspaces, at most min(d_out, d_in) of each. Projections are drawn from `seed`, one for each
    matrix, and are the same at every snapshot. InputError for no modules or q < 1.
    """

    def __init__(self, modules: Mapping[str, nn.Linear], q: int = 16, sketch_dim: int = 1024, seed: int = 0) -> None:
        if not modules or q < 1 or sketch_dim < 1:
            raise InputError(f"needs modules, q and sketch_dim of at least 1; got {len(modules)}, {q}, {sketch_dim}")
        self.modules, self.q, self.sketch_dim, self.seed = dict(modules), q, sketch_dim, seed
        self.records = {
            name: GradientRecord((module.out_features, module.in_features)) for name, module in modules.items()
        }

    def snapshot(self) -> None:
        """RunError naming the module whose weight has no gradient, or one that is not finite or zero."""
        for index, (name, module) in enumerate(self.modules.items()):
            gradient = module.weight.grad
            if gradient is None:
                raise RunError(f"{name}: no gradient; call backward first, with the weight trainable")
            gradient = gradient.detach().double()
            if not torch.isfinite(gradient).all() or not gradient.any():
                raise RunError(f"{name}: its gradient is {'zero' if not gradient.any() else 'not finite'}")
            self._add(self.records[name], gradient, index)

    def _add(self, record: GradientRecord, gradient: Tensor, index: int) -> None:
        left, values, _ = torch.linalg.svd(gradient, full_matrices=False)
        record.bases.append(left[:, : self.q])
        record.spectra.append(values / values[0])
        record.sketches.append(_projected(gradient, self.sketch_dim, self.seed + index))
        unit = gradient / gradient.norm()
        record.cumulative = unit if record.cumulative is None else record.cumulative + unit
        record.cumulative_ranks.append(energy_rank(torch.linalg.svdvals(record.cumulative)))


def _projected(matrix: Tensor, size: int, seed: int) -> Tensor:
    """Products with rank-one Gaussian matrices: u_iᵀ M v_i / sqrt(size), which keep inner products in the mean."""
    generator = torch.Generator(device=matrix.device).manual_seed(seed)
    u = torch.randn(size, matrix.shape[0], generator=generator, dtype=matrix.dtype, device=matrix.device)
    v = torch.randn(matrix.shape[1], size, generator=generator, dtype=matrix.dtype, device=matrix.device)
    return ((u @ matrix) * v.T).sum(1) / size**0.5


def energy_rank(values: Tensor, energy: float = ENERGY) -> int:
    """How many of the singular values (descending) hold this share of their squared sum."""
    shares = values.square().cumsum(0) / values.square().sum()
    return int((shares < energy).sum()) + 1


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """||AᵀB||_F² / q of orthonormal bases (d, q): 1 for one and the same subspace, q / d for random ones."""
    if a.shape != b.shape:
        raise InputError(f"bases of one shape are needed; got {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a.T @ b).square().sum() / a.shape[1])


def late_cosine(record: GradientRecord) -> float:
    """Mean cosine between different gradients of the last half of the snapshots."""
    late = torch.stack(record.sketches[len(record.sketches) // 2 :])
    late = late / late.norm(dim=1, keepdim=True)
    count = len(late)
    return float(((late @ late.T).sum() - count) / (count * (count - 1)))


@dataclass(frozen=True)
class _Row:
    name: str
    overlap: list[float]
    chance: float
    cosine: float
    gradient_rank: float
    cumulative_rank: float
    retained: float


def stability_report(
    records: Mapping[str, GradientRecord], ranks: Mapping[str, int], groups: Mapping[str, str] | None = None
) -> Report:
    """Overlaps of neighbouring snapshots, early and late, cosines and ranks beside the rank that weights retain.

    ranks[name]: retained rank of each weight, of min(shape). groups[name]: the row that a matrix counts in, by default
    one each; ranks are shares of the smaller side. InputError for fewer than three snapshots, or other names.
    """
    if not records or records.keys() != ranks.keys():
        raise InputError("as many ranks as records are needed, of the same matrices, at least one")
    if any(len(record.bases) < 3 for record in records.values()):
        raise InputError("needs at least three snapshots")
    rows = [_row(name, record, ranks[name]) for name, record in records.items()]
    columns = ["", "overlap, early", "late", "by chance", "late cosine", "gradient rank", "cumulative", "weight rank"]
    report = Report("Gradients of one batch while the model trains", columns, x_label="snapshot", y_label="overlap")
    labels = [groups[name] if groups else name for name in records]
    for label in dict.fromkeys(labels):
        own = [row for row, group in zip(rows, labels, strict=True) if group == label]
        report.add(label, *[sum(values) / len(own) for values in zip(*map(_cells, own), strict=True)])
        overlaps = [sum(values) / len(own) for values in zip(*(row.overlap for row in own), strict=True)]
        report.curves.append(Curve(label, [float(i + 1) for i in range(len(overlaps))], overlaps))
    report.findings.append("ranks are shares of the smaller side: of 90 % of the energy, and retained by the threshold")
    if len(rows) > 2:
        found = scipy.stats.spearmanr([row.cosine for row in rows], [row.retained for row in rows]).statistic
        report.findings.append(
            f"Spearman correlation of late cosine and weight rank over {len(rows)} matrices: {found:.2f}"
        )
    return report


def _row(name: str, record: GradientRecord, rank: int) -> _Row:
    small = min(record.shape)
    overlap = [subspace_overlap(a, b) for a, b in pairwise(record.bases)]
    own = [energy_rank(spectrum) / small for spectrum in record.spectra]
    chance = record.bases[0].shape[1] / record.shape[0]
    cumulative = record.cumulative_ranks[-1] / small
    return _Row(name, overlap, chance, late_cosine(record), sum(own) / len(own), cumulative, rank / small)


def _cells(row: _Row) -> Sequence[float]:
    middle = len(row.overlap) // 2
    early, late = row.overlap[:middle] or row.overlap[:1], row.overlap[middle:]
    means = sum(early) / len(early), sum(late) / len(late)
    return (*means, row.chance, row.cosine, row.gradient_rank, row.cumulative_rank, row.retained)


def retained_ranks(weights: Mapping[str, Tensor], err: float) -> dict[str, int]:
    """The ranks that one threshold over all normalised spectra leaves: WeLore's, at this rank reduction."""
    spectra = [normalize_spectrum(torch.linalg.svdvals(weight.double())) for weight in weights.values()]
    threshold = global_threshold(spectra, err)
    return {name: max(1, int((s >= threshold).sum())) for name, s in zip(weights, spectra, strict=True)}


class GradientStability:
    Options: ClassVar[type[GradientStabilityOptions]] = GradientStabilityOptions
    #: asks for the model itself and the tokens, beside what sites see
    trains = True

    def __init__(self, options: GradientStabilityOptions | None = None) -> None:
        self.options = options or GradientStabilityOptions()

    def analyze(self, subject: Subject) -> Report:
        """Trains the model that the subject holds, on all sequences but the first, whose gradients are recorded."""
        options = self.options
        model, tokens = subject.trainable()
        if len(tokens) < 2:
            raise InputError("needs two sequences: one whose gradients are recorded, and others to train on")
        modules = {site.name: model.get_submodule(site.name) for site in subject.sites}
        ranks = retained_ranks(subject.weights, options.err)
        recorder = GradientRecorder(modules, options.q, seed=subject.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
        order = torch.arange(options.snapshots * options.steps) % (len(tokens) - 1) + 1
        for number in range(options.snapshots):
            _backward(model, tokens[:1])
            recorder.snapshot()
            if number + 1 < options.snapshots:
                for row in order[number * options.steps : (number + 1) * options.steps]:
                    _backward(model, tokens[row : row + 1])
                    optimizer.step()
        optimizer.zero_grad()
        groups = {site.name: getattr(site, "name" if options.by == "site" else options.by) for site in subject.sites}
        return stability_report(recorder.records, ranks, {name: str(group) for name, group in groups.items()})


def _backward(model: nn.Module, tokens: Tensor) -> None:
    model.zero_grad()
    with torch.enable_grad():
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

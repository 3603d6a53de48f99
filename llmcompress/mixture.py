"""Calibration text as a recipe names it: one source, or several in proportions that are fitted to a target text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.calibration import text
from llmcompress.calibration.modes import evaluation_mode
from llmcompress.models.load import StreamedModel
from llmcompress.progress import Progress
from llmcompress.recipe import Calibration

FIT_TOKENS = 4096  # of each domain, that the proportions are fitted with


def calibration_tokens(
    section: Calibration,
    model: PreTrainedModel | StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Tensor, str | None]:
    """Sequences (samples, length) int64, fewer where a text ends, and what was found of a mixture.

    A mixture's weights are the means of those fitted at the inputs of three blocks; each text gives its share of the
    sequences, in a seeded random order. InputError as `read_documents` and `pack`.
    """
    streams = {
        source: text.tokenize(tokenizer, text.read_documents(source, "calibration", section.field))
        for source in section.sources
    }
    if section.mix is None:
        return text.pack(streams[section.dataset], section.samples, section.length, section.dataset), None
    domains = {source: streams[source] for source in (section.dataset, *section.mix.domains)}
    weights = _fitted(section, model, domains, streams[section.mix.target], seed, progress)
    counts = shares(weights, section.samples)
    parts = [
        text.pack(stream, count, section.length, source)
        for (source, stream), count in zip(domains.items(), counts, strict=True)
        if count
    ]
    tokens = torch.cat(parts)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    told = ", ".join(f"{w:.2f} {source}" for source, w in zip(domains, weights.tolist(), strict=True))
    return tokens[order], f"calibration mixture for {section.mix.target}: {told}"


def _fitted(
    section: Calibration,
    model: PreTrainedModel | StreamedModel,
    domains: dict[str, Tensor],
    target: Tensor,
    seed: int,
    progress: Progress | None,
) -> Tensor:
    """Weights (domains,) on the simplex."""
    from llmcompress.analyze import gather_texts
    from llmcompress.backends.geometry.spd_batchnorm import bures_mix_weights, gram_of

    assert section.mix is not None
    length, wanted = min(section.length, section.mix.tokens), section.mix.tokens
    tokens = {"target": text.pack(target, -(-wanted // length), length, section.mix.target)} | {
        f"domain {source}": text.pack(stream, max(1, FIT_TOKENS // length), length, source)
        for source, stream in domains.items()
    }
    with evaluation_mode(model.model if isinstance(model, StreamedModel) else model):
        subject = gather_texts(model, tokens, (), seed, progress)
    fits = []
    for site in subject.sites:
        few = subject.inputs[site.name][:wanted].double()
        grams = torch.stack([gram_of(other.inputs[site.name]) for other in subject.others.values()])
        fits.append(bures_mix_weights(grams, few.T @ few / len(few)).cpu())
    return torch.stack(fits).mean(0)


def shares(weights: Tensor, count: int) -> list[int]:
    """Whole numbers that sum to `count`, nearest to weights (K,) times it, by largest remainders."""
    exact = weights.double() * count
    whole = exact.floor()
    rest = count - int(whole.sum())
    whole[(exact - whole).argsort(descending=True, stable=True)[:rest]] += 1
    return [int(part) for part in whole]

"""What `llmcompress analyze` does: runs a model on a text, and a backend on what a few of its sites see."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress import catalog
from llmcompress.backends.ports import Analysis, Subject
from llmcompress.backends.report import Report
from llmcompress.calibration import text
from llmcompress.calibration.collect import capture_inputs
from llmcompress.environment import choose_device
from llmcompress.errors import InputError
from llmcompress.models.load import StreamedModel, load_model, load_tokenizer, locate
from llmcompress.models.runner import Runner
from llmcompress.models.structure import Structure, analyse
from llmcompress.plan import select_sites
from llmcompress.progress import Progress, Silent
from llmcompress.types import Site

Key = TypeVar("Key", str, int)

#: where in the model's depth the default sites lie
DEPTHS = (0.05, 0.5, 0.85)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs, values in YAML."""
    found = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not separator or not key:
            raise InputError(f"--set {option}: expected KEY=VALUE, for instance rank=32")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {option}: the value is not YAML") from None
    return found


def build_analysis(backend: str, options: dict[str, Any]) -> Analysis:
    """The backend, with its options. InputError if it is unknown, has no analysis, or an option is wrong."""
    entry = catalog.get("backend", backend)
    cls = entry.load()
    try:
        built = cls(cls.Options(**options))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = list(cls.Options.model_fields)
        what = f"unknown key{catalog.nearest(key, known)}" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"--set {key}: {what}") from None
    if not isinstance(built, Analysis):
        raise InputError(f"backend '{backend}' plugs in at '{entry.port}' alone: it has no analysis")
    return built


def analyze_model(
    model: str,
    backend: str,
    options: dict[str, Any] | None = None,
    data: str = "python-docs",
    field: str = "text",
    samples: int = 8,
    length: int = 512,
    sites: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Runs the backend's analysis on the model and the text; see `gather` for what it is shown."""
    analysis = build_analysis(backend, options or {})
    location = locate(model)
    tokenizer = load_tokenizer(location)
    texts = {"": data} | getattr(analysis, "texts", {})
    tokens = {
        label: text.pack(
            text.tokenize(tokenizer, text.read_documents(source, "calibration", field)), samples, length, source
        )
        for label, source in texts.items()
    }
    whole = location.gguf is not None or getattr(analysis, "trains", False)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = choose_device(device)
        opened: PreTrainedModel | StreamedModel = (
            load_model(location).to(chosen) if whole else StreamedModel(location, Path(scratch), device=chosen)
        )
        subject = gather_texts(opened, tokens, sites, seed, progress)
        if isinstance(opened, PreTrainedModel):
            subject.model, subject.tokens, subject.tokenizer = opened, tokens[""].to(chosen), tokenizer
    return analysis.analyze(subject)


def gather_texts(
    model: PreTrainedModel | StreamedModel,
    tokens: dict[str, Tensor],
    targets: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Subject:
    """`gather` of several texts (sequences, length) of one length in one pass: the first one's, the others within."""
    whole = gather(model, torch.cat(list(tokens.values())), targets, seed, progress)
    sizes = [part.numel() for part in tokens.values()]
    parts = zip(tokens, _by_text(whole.inputs, sizes), _by_text(whole.residual, sizes), strict=True)
    subjects = {
        label: dataclasses.replace(whole, inputs=inputs, residual=residual, others={})
        for label, inputs, residual in parts
    }
    first = subjects.pop(next(iter(tokens)))
    return dataclasses.replace(first, others=subjects)


def _by_text(rows: dict[Key, Tensor], sizes: list[int]) -> list[dict[Key, Tensor]]:
    parts = {key: value.split(sizes) for key, value in rows.items()}
    return [{key: split[index] for key, split in parts.items()} for index in range(len(sizes))]


def gather(
    model: PreTrainedModel | StreamedModel,
    tokens: Tensor,
    targets: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Subject:
    """What the sites see: their inputs, weights, and the residual stream behind their blocks.

    tokens (sequences, length) int64. targets as in a recipe; without them, every distinct input of three blocks. The
    model is run block by block as far as the last site.
    """
    progress = progress or Silent()
    structure = analyse(model.model if isinstance(model, StreamedModel) else model)
    chosen = _chosen(structure, targets)
    readers = {site.input for site in chosen}
    runner = Runner(model, structure)
    subject = Subject(chosen, {}, {site.name: runner.weight(site).float() for site in chosen}, {}, seed)
    rows: dict[str, list[Tensor]] = {name: [] for name in readers}
    with runner.ends_loaded(), torch.no_grad():
        runner.record_arguments(tokens)
        hidden = runner.embed(tokens)
    blocks = sorted({site.block for site in chosen})
    progress.start("run", blocks[-1] + 1)
    for index in range(blocks[-1] + 1):
        read = [site for site in structure.in_block(index) if site.name in readers]

        def receive(site: Site, x: Tensor) -> None:
            rows[site.name].append(x.float())

        with runner.block_loaded(index), capture_inputs(runner.model, read, receive), torch.no_grad():
            hidden = torch.cat([runner.run_block(index, part) for part in hidden.split(4)])
        if index in blocks:
            subject.residual[index] = hidden.float().flatten(0, 1)
        progress.advance(structure.blocks[index])
    subject.inputs = {site.name: torch.cat(rows[site.input]) for site in chosen}
    return subject


def _chosen(structure: Structure, targets: Sequence[str]) -> list[Site]:
    if targets:
        return select_sites(structure, targets, "--site")
    blocks = {min(len(structure.blocks) - 1, int(depth * len(structure.blocks))) for depth in DEPTHS}
    return [site for site in structure.sites if site.block in blocks and site.input == site.name]

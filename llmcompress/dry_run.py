"""What `apply --dry-run` shows: the plan, with an estimate of time and memory."""

from __future__ import annotations

import shutil
import time
from typing import Any

import torch
from rich.table import Table

from llmcompress.measurement import Settings
from llmcompress.pipeline import Pipeline
from llmcompress.plan import Plan
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe


def plan_tables(recipe: Recipe) -> list[Table | str]:
    """Sites with sizes and stored values, then totals and the estimate. Nothing is written."""
    pipeline = Pipeline(recipe, Silent())
    fresh = not pipeline.work.exists()
    try:
        source, plan, tokens, _ = pipeline.prepare()
        width = source.model.dtype.itemsize
        tables: list[Table | str] = []
        stored = operations = 0.0
        for index, step in enumerate(plan.steps):
            table = Table(title=f"compress.{index}: {step.recipe.method}, {step.recipe.ratio:.0%} removed")
            for column in ("unit", "sizes", "values dense", "values stored"):
                table.add_column(column, justify="right" if column.startswith("values") else "left")
            for unit in step.units:
                dense = sum(site.dense_values for site in unit)
                sizes = step.compressor.plan(unit, _uniform(unit, step.recipe.ratio))
                values = sizes.pop("values")
                stored += values
                operations += sizes.pop("operations", 0)
                shown = ", ".join(f"{key} {value}" for key, value in sizes.items())
                name = unit[0].name if len(unit) == 1 else f"{unit[0].name} +{len(unit) - 1}"
                table.add_row(name, shown, f"{dense:,}", f"{values:,.0f}")
            tables.append(table)
            if step.allocation.needs_profiles:
                tables.append(f"allocation {step.recipe.allocation.name} measures first; shown is the uniform budget")
        dense = sum(site.dense_values for site in plan.sites)
        return [
            *tables,
            *_totals(dense, stored, width),
            *_estimate(plan, tokens, pipeline.settings(), width, operations),
        ]
    finally:
        if fresh:
            shutil.rmtree(pipeline.work, ignore_errors=True)


def _uniform(unit: list[Any], ratio: float) -> Any:
    from llmcompress.types import Budget

    return Budget.for_ratio(unit, ratio)


def _totals(dense: int, stored: float, width: int) -> list[str]:
    return [
        f"targeted values: {dense:,} dense, {stored:,.0f} stored ({1 - stored / dense:.1%} removed); "
        f"{dense * width:,} bytes dense, {stored * width:,.0f} stored at full width"
    ]


def _estimate(plan: Plan, tokens: torch.Tensor, settings: Settings, width: int, factorising: float) -> list[str]:
    """Operations over the speed of a matrix product measured now: an order of magnitude, not a promise."""
    n, sites = tokens.numel(), plan.structure.sites
    inputs = {site.input: site.d_in for site in sites}
    forward = 2 * sum(site.dense_values for site in sites)
    operations = n * forward * (1 + plan.two_passes * plan.propagate)
    if "gram" in plan.needs:
        operations += 2 * n * sum(d * d for d in inputs.values()) * 5 // 8
    if plan.backward_needs:  # a block runs again and backward: three times a forward pass
        output_grams = 2 * sum(site.d_out**2 for site in plan.sites) if "output_gram" in plan.needs else 0
        operations += settings.backward_sequences(tokens) * tokens.shape[1] * (3 * forward + output_grams)
    svds = sum(22 * min(s.d_in, s.d_out) ** 2 * max(s.d_in, s.d_out) * 4 for s in plan.sites)
    a = torch.rand(1024, 1024)
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    speed = 5 * 2 * 1024**3 / (time.perf_counter() - start)
    seconds = (operations + svds + factorising) / speed
    width_model = max((site.d_in for site in sites if site.role in ("q", "qkv")), default=0)
    block = max(sum(s.dense_values for s in plan.structure.in_block(i)) for i in range(len(plan.structure.blocks)))
    gram_bytes = max(sum(8 * d * d for d in {s.input: s.d_in for s in plan.structure.in_block(i)}.values())
                     for i in range(len(plan.structure.blocks)))  # fmt: skip
    streams = (len(plan.structure.blocks) + 1) if plan.backward_needs else 2
    return [
        f"calibration: {tokens.shape[0]} x {tokens.shape[1]} tokens; about {seconds / 60:.1f} min here "
        f"({speed / 1e9:.0f} GFLOP/s in a matrix product); a GPU is used where torch finds one",
        f"memory: about {(block * width + 3 * gram_bytes) / 2**20 + 600:.0f} MiB; "
        f"disk for hidden states: {streams * n * width_model * width / 2**20:.0f} MiB",
    ]

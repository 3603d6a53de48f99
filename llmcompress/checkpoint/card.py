"""The model card that a compressed checkpoint carries."""

from __future__ import annotations

from typing import Any

from llmcompress.recipe import Recipe


def model_card(recipe: Recipe, metrics: dict[str, Any]) -> str:
    """Markdown with the facts of a run: model, method, sizes, perplexity, how to load it."""
    size = metrics["size"]
    steps = "; ".join(f"{s.method} on {', '.join(s.targets)}, {s.ratio:.0%} removed" for s in recipe.compress)
    base = recipe.model if "/" in recipe.model and not recipe.model.startswith(("/", ".")) else None
    lines = ["---", "library_name: transformers", "tags: [llmcompress, low-rank]"]
    lines += [f"base_model: {base}"] if base else []
    lines += [
        "---",
        "",
        f"# {recipe.model}, compressed",
        "",
        f"Factorised by llmcompress: {steps}. The recipe is in `recipe.yaml`, figures by site in `metrics.json`.",
        "",
        "| | dense | compressed | removed |",
        "|---|---|---|---|",
        f"| values of the targeted matrices | {size['targeted']['dense']:,} | {size['targeted']['compressed']:,.0f} "
        f"| {size['targeted']['removed']:.1%} |",
        f"| values of the whole model | {size['model']['dense']:,} | {size['model']['compressed']:,.0f} "
        f"| {size['model']['removed']:.1%} |",
        f"| bytes of tensor files | {size['bytes']['dense']:,} | {size['bytes']['compressed']:,} | |",
    ]
    for source, pair in metrics.get("perplexity", {}).items():
        dense, compressed = pair["dense"]["perplexity"], pair["compressed"]["perplexity"]
        lines.append(f"| perplexity, {source.rsplit('/', 1)[-1]} | {dense:.2f} | {compressed:.2f} | |")
    lines += [
        "",
        "```python",
        "import llmcompress",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)

"""`llmcompress eval`: one model, any text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from llmcompress.engine import Progress
from llmcompress.errors import InputError
from llmcompress.models.load import DTYPES, load_model, load_tokenizer, locate
from llmcompress.pipeline import choose_device
from llmcompress_eval.compare import evaluation_windows
from llmcompress_eval.perplexity import check_input, perplexity


def evaluate_model(
    model: str,
    sources: list[str],
    length: int,
    windows: int | None,
    batch: int,
    dtype: str,
    device: str,
    field: str,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Perplexity on each source: {"model": ..., "perplexity": {source: figures}}."""
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES)}")
    location = locate(model)
    where = choose_device(device)
    texts = evaluation_windows(load_tokenizer(location), sources, length, windows, field)
    loaded = load_model(location, DTYPES.get(dtype, "auto"), trust_remote_code=trust_remote_code).to(where)
    for tokens in texts.values():
        check_input(loaded, tokens)
    found = {}
    for source, tokens in texts.items():
        progress.start("perplexity", len(tokens))
        found[source] = asdict(perplexity(loaded, tokens, batch, progress.advance))
    return {"model": model, "length": length, "perplexity": found}


def evaluation_table(model: str, found: dict[str, Any]) -> Table:
    table = Table(title=Text(model), title_justify="left")
    for column in ("text", "perplexity", "nll", "± (standard error)", "windows", "tokens"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for source, figures in found["perplexity"].items():
        table.add_row(
            Text(source), f"{figures['perplexity']:.3f}", f"{figures['nll']:.4f}", f"{figures['standard_error']:.4f}",
            str(figures["windows"]), f"{figures['tokens']:,}",
        )  # fmt: skip
    return table

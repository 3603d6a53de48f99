"""`llmcompress report`: what runs cost and gained, as one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress_eval.compare import SIZE, columns_of, frontier, rows_of, shown
from llmcompress_eval.runs import Run

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def build_report(runs: list[Run], problems: list[str]) -> str:
    """HTML without scripts and without a reference to anything outside. InputError if the extra is not installed."""
    try:
        import jinja2

        from llmcompress_eval import plots
    except ModuleNotFoundError as error:
        raise InputError(f"report: needs the module {error.name}: pip install 'llmcompress[report]'") from None
    rows = rows_of(runs)
    columns = columns_of(rows)
    texts = [column for column in columns if column.startswith("perplexity")]
    plotted = [column for column in texts if sum(SIZE in row and column in row for row in rows) > 1]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        columns=columns,
        rows=[[shown(column, row.get(column)) for column in columns] for row in rows],
        best={row["run"] for column in plotted for row in frontier(rows, column)},
        frontiers=[
            plots.numbered(plots.frontier_plot(rows, column), f"text{index}") for index, column in enumerate(plotted)
        ],
        runs=[_section(index, run) for index, run in enumerate(runs)],
        problems=problems,
    )


def _section(index: int, run: Run) -> dict[str, Any]:
    from llmcompress_eval import plots

    samples = run.evaluation.get("samples", [])
    sites = run.metrics.get("sites", [])
    speed, spectra = run.evaluation.get("speed"), run.evaluation.get("spectra")
    figures = [(title, plots.site_map(sites, what)) for what, title in plots.MAPS.items()] if sites else []
    if spectra:
        figures.append(("Spectra", plots.spectra_plot(spectra)))
    if speed:
        figures.append((f"Speed ({speed['dtype']}, {speed['device']})", plots.speed_plot(speed)))
    anchor = f"run-{index}"
    return {
        "anchor": anchor,
        "name": run.name,
        "folder": str(run.folder),
        "method": run.method,
        "figures": [
            (title, plots.numbered(figure, f"{anchor}-{place}"))
            for place, (title, figure) in enumerate(figures)
            if figure
        ],
        "speed": _speed_rows(speed) if speed else [],
        "sites": [_site_row(site) for site in sites],
        "notes": list(dict.fromkeys(note for site in sites for note in site["notes"])),
        "samples": [list(samples[0]), *[list(sample.values()) for sample in samples]] if samples else [],
        "recipe": run.recipe_text,
        "versions": run.evaluation.get("versions", {}),
    }


def _speed_rows(speed: dict[str, Any]) -> list[list[str]]:
    names = list(speed["limit"])
    rows = {**speed["end_to_end"], f"byte limit at {speed['bandwidth'] / 1e9:,.1f} GB/s": speed["limit"]}
    return [["", *names]] + [[what, *[f"{rates[name]:,.1f}" for name in names]] for what, rates in rows.items()]


def _site_row(site: dict[str, Any]) -> list[str]:
    spec = site["spec"] or {"type": "dense"}
    size = next((f", {key} {spec[key]}" for key in ("rank", "atoms") if key in spec), "")
    error = "" if site["error"] is None else f"{site['error']:.4f}"
    return [site["name"], f"{spec['type']}{size}", f"{site['stored_values'] / site['dense_values']:.1%}", error]

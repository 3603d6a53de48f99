"""The report's figures, drawn by matplotlib as SVG that stands in a page: text stays text, and each has an alt text."""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

from llmcompress_eval.compare import SIZE, Row, frontier

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two $ is no formula
    "svg.hashsalt": "llmcompress",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SIZES = {"line": (4.4, 3.2), "map": (4.4, 1.9), "bars": (4.4, 2.6)}
MAPS = {"kept": "Share of values kept", "error": "Relative error of the outputs, on calibration text"}
COLORS = {"dense": "#7a7a7a", "compressed": "#1f6fb4"}


def frontier_plot(rows: list[Row], column: str) -> str:
    """Perplexity over bytes on disk: a line for each method, the dense models, a ring around what nothing beats."""
    from matplotlib.ticker import MaxNLocator

    with _style():
        figure, axes = _figure("line")
        methods: dict[str, list[Row]] = {}
        for row in rows:
            if row.get(SIZE) is not None and row.get(column) is not None:
                methods.setdefault(row["method"], []).append(row)
        for method, own in methods.items():
            points = sorted((row[SIZE] / 1e6, row[column]) for row in own)
            style = {"marker": "*", "linestyle": "", "color": COLORS["dense"], "markersize": 10}
            axes.plot(*zip(*points, strict=True), label=method, **(style if method == "dense" else {"marker": "o"}))
        for row in methods.get("dense", []):
            axes.axhline(row[column], color=COLORS["dense"], linewidth=0.8, linestyle=":")
        best = frontier(rows, column)
        axes.scatter(
            [row[SIZE] / 1e6 for row in best], [row[column] for row in best], s=110, facecolors="none",
            edgecolors="#d1661f", label="frontier",
        )  # fmt: skip
        axes.set(xlabel="MB on disk", ylabel=column, yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _plain_numbers(axes)
        axes.legend(fontsize="small", frameon=False)
        told = "; ".join(
            f"{row['run']} ({row['method']}) {row[column]:.2f} at {row[SIZE] / 1e6:,.0f} MB" for row in best
        )
        return _svg(figure, f"{column} over bytes on disk. On the frontier: {told}.")


def site_map(sites: list[dict[str, Any]], what: str) -> str:
    """Blocks across, roles down; what: a key of MAPS."""
    values = {
        (site["role"], site["block"]): site["stored_values"] / site["dense_values"] if what == "kept" else site["error"]
        for site in sites
    }
    roles = list(dict.fromkeys(role for role, _ in values))
    blocks = range(1 + max(block for _, block in values))
    grid = [[_nan(values.get((role, block))) for block in blocks] for role in roles]
    known = {key: value for key, value in values.items() if value is not None}
    if not known:
        return ""
    with _style():
        figure, axes = _figure("map")
        mesh = axes.pcolormesh(grid, cmap="viridis", edgecolors="white", linewidth=0.3)
        axes.set_yticks([index + 0.5 for index in range(len(roles))], roles)
        axes.set_xticks([block + 0.5 for block in blocks if block % max(1, len(blocks) // 6) == 0],
                        [str(block) for block in blocks if block % max(1, len(blocks) // 6) == 0])  # fmt: skip
        axes.invert_yaxis()
        axes.set(xlabel="block")
        figure.colorbar(mesh, ax=axes)
        least, most = min(known, key=lambda key: known[key]), max(known, key=lambda key: known[key])
        ends = [f"{known[at]:.3f} ({at[0]} of block {at[1]})" for at in (least, most)]
        return _svg(figure, f"{MAPS[what]}, by role and block: from {ends[0]} to {ends[1]}.")


def spectra_plot(spectra: dict[str, dict[str, list[float]]]) -> str:
    """Singular values over their number, relative to the dense weight's largest: of each kind of site, a middle one."""
    kinds: dict[str, list[str]] = {}
    for name in spectra:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    with _style():
        figure, axes = _figure("line")
        for index, (kind, names) in enumerate(kinds.items()):
            pair = spectra[names[len(names) // 2]]
            top = max(pair.get("dense", pair["compressed"])[0], 1e-30)
            for role, values in pair.items():
                share = [100 * place / max(1, len(values) - 1) for place in range(len(values))]
                drawn = [value / top if value > 1e-6 * top else float("nan") for value in values]
                axes.plot(share, drawn, color=f"C{index}", linestyle=":" if role == "dense" else "-",
                          label=kind if role == "compressed" else None, linewidth=1.2)  # fmt: skip
        axes.set(xlabel="% of the singular values", ylabel="relative size", yscale="log")
        axes.legend(fontsize="x-small", frameon=False, ncols=2)
        return _svg(figure, "Singular values of compressed weights (solid) and dense ones (dotted), one middle block's "
                            f"site of each kind: {', '.join(kinds)}.")  # fmt: skip


def speed_plot(speed: dict[str, Any]) -> str:
    """Bars of tokens a second, dense and compressed; marks where reading the weights alone would end."""
    rows = {what: rates for what, rates in speed["end_to_end"].items() if what != "prefill"}
    with _style():
        figure, axes = _figure("bars")
        names = list(speed["limit"])
        height = 0.8 / len(names)
        for place, name in enumerate(names):
            places = [index + (place - (len(names) - 1) / 2) * height for index in range(len(rows))]
            axes.barh(places, [rates[name] for rates in rows.values()], height,
                      color=COLORS.get(name, COLORS["compressed"]), label=name)  # fmt: skip
            axes.plot([speed["limit"][name]] * len(places), places, linestyle="", marker="|", markersize=12,
                      markeredgewidth=2, color="#d1661f", label="byte limit" if place == 0 else None)  # fmt: skip
        axes.set_yticks(range(len(rows)), [what.replace(", ", ",\n") for what in rows])
        axes.invert_yaxis()
        axes.set(xlabel="tokens a second, one sequence")
        axes.legend(fontsize="small", frameon=False)
        told = "; ".join(f"{what}: " + ", ".join(f"{name} {rate:,.1f}" for name, rate in rates.items())
                         for what, rates in {**rows, "byte limit": speed["limit"]}.items())  # fmt: skip
        return _svg(figure, f"Tokens a second. {told}.")


def numbered(svg: str, number: str) -> str:
    """The figure with ids of its own on a page of many."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{number}-", svg)


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(size: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZES[size], facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    return figure, axes


def _plain_numbers(axes: Any) -> None:
    """Perplexities as 20 and 30, not as powers of ten."""
    from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(9, 9)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _svg(figure: Any, told: str) -> str:
    """The <svg> element alone; ids that only name groups go, since a page holds many figures."""
    text = io.StringIO()
    figure.savefig(
        text,
        format="svg",
        metadata={"Date": None, "Creator": None},
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.05,
    )
    svg = text.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(told, quote=True)}" ', 1)

"""The command line. Heavy imports happen inside commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from llmcompress import __version__, catalog, heap
from llmcompress.errors import InputError, RunError, one_line

if TYPE_CHECKING:
    from rich.table import Table

    from llmcompress.backends.report import Report
    from llmcompress.merge.recipe import MergeRecipe

app = typer.Typer(
    help="Make language models smaller and faster by factorising their weights.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
#: columns in a file or a pipe, where nothing has to be folded
WIDE = 200
out, err = Console(), Console(stderr=True)
if not out.is_terminal and "COLUMNS" not in os.environ:
    out.width = WIDE
INTERRUPTED = 130  # what typer returns after Ctrl-C

RecipeOption = Annotated[Path, typer.Option("--recipe", "-r", help="the recipe, a YAML file")]
SetOption = Annotated[list[str], typer.Option("--set", help="override a key: compress.0.ratio=0.4")]
ModelArgument = Annotated[str, typer.Argument(help="hub id, folder, .gguf file, or builtin:smollm2-135m-instruct")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")]


def main() -> None:
    """Runs a command. Exit codes: 0 done, 1 failed while running, 2 bad input."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    heap.keep_freed_memory()
    try:
        # typer would turn Ctrl-C into a silent end, and wrap usage errors in a box
        if app(standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has gone: `llmcompress backends | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        err.print(_message(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2 if isinstance(error, InputError) or _is_usage_error(error) else 1) from None


def _is_usage_error(error: BaseException) -> bool:
    return hasattr(error, "format_message")  # click's, or the copy of click that newer versions of typer hold


def _message(error: BaseException) -> str:
    text = one_line(str(error))
    if _is_usage_error(error):
        return f"{one_line(error.format_message())} (see `llmcompress --help`)"  # type: ignore[attr-defined]
    if isinstance(error, (InputError, RunError)):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; finished parts are kept: run the same command again to go on"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; try a smaller calibration.batch_tokens"
    return f"failed: {type(error).__name__}: {text}; --debug shows where"


@app.callback(invoke_without_command=True)
def _global(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def apply(
    recipe: RecipeOption,
    overrides: SetOption = [],  # noqa: B006  (typer's way of an empty list)
    output: Annotated[str | None, typer.Option("--output", "-o", help="folder of the result")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Run a recipe: calibrate, compress, save, evaluate. Killed and run again, it goes on where it stopped."""
    from llmcompress import pipeline, show
    from llmcompress.merge.recipe import MergeRecipe, load_recipe

    loaded = load_recipe(recipe, overrides + ([_output_override(output)] if output is not None else []))
    if isinstance(loaded, MergeRecipe):
        if dry_run:
            raise InputError(f"{recipe}: a merge has no plan to show; leave out --dry-run")
        _merge(loaded)
        return
    if dry_run:
        from llmcompress.dry_run import plan_tables

        _print_tables(plan_tables(loaded))
        return
    with show.Bars(err) as bars:
        _log_to(err)
        outcome = pipeline.apply(loaded, progress=bars)
    out.print(show.result_table(outcome.folder, outcome.metrics, outcome.speed))
    out.print(show.kept_table(outcome.metrics["sites"]))
    if pair := outcome.metrics.get("finetune", {}).get("validation_perplexity"):
        out.print(f"fine-tuning: perplexity of the held-out text {pair['before']:.2f} -> {pair['after']:.2f}")
    for report in outcome.reports:
        _print_report(report)
    if outcome.seconds:
        out.print(show.seconds_line(outcome.seconds), style="dim")


def _output_override(output: str) -> str:
    return f"output={json.dumps(output, ensure_ascii=False)}"  # YAML would read \ud83d\ude00 as two characters


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(help="two or more models of one architecture, as MODEL elsewhere")],
    out_folder: Annotated[str, typer.Option("--out", "-o", help="folder of the result")],
    match: Annotated[str, typer.Option(help="auto, signed, orthogonal or none")] = "auto",
    lam: Annotated[float | None, typer.Option(help="share of the second of two models; 0.5 if absent")] = None,
    weights: Annotated[list[float], typer.Option("--weight", help="share of each model, once a model")] = [],  # noqa: B006
    barrier: Annotated[str | None, typer.Option(help="text source: measure the loss along the path")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw that path into this .png, .svg or .pdf")] = None,
    r_metric: Annotated[bool, typer.Option("--r-metric", help="measure how far singular vectors agree")] = False,
    perplexity: Annotated[list[str], typer.Option(help="text source: measure the models and the merge")] = [],  # noqa: B006
    length: Annotated[int, typer.Option(min=2, help="tokens in a window of text")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="windows measured")] = 16,
    dtype: Annotated[str, typer.Option(help="of the result: auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="order in which more than two models are matched")] = 0,
) -> None:
    """Align models, average them, and write a plain checkpoint. Killed and run again, it goes on."""
    from llmcompress.merge.run import build_recipe

    given = {"lam": lam, "weights": weights or None, "barrier": barrier, "plot": str(plot) if plot else None}
    keys: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    evaluation = {"perplexity": perplexity, "length": length, "windows": windows}
    keys |= {"match": match, "r_metric": r_metric, "eval": evaluation, "dtype": dtype, "device": device, "seed": seed}
    _merge(build_recipe(models, out_folder, keys, "llmcompress merge"))


def _merge(recipe: MergeRecipe) -> None:
    from llmcompress import show
    from llmcompress.merge.report import findings, merge_table
    from llmcompress.merge.run import run_merge

    with show.Bars(err) as bars:
        _log_to(err)
        outcome = run_merge(recipe, bars)
    out.print(merge_table(outcome.folder, outcome.metrics))
    for finding in findings(outcome.metrics):
        _print_line(finding)
    if outcome.seconds:
        out.print(show.seconds_line(outcome.seconds), style="dim")


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="a compressed checkpoint; with method full any model")],
    recipe: RecipeOption,
    overrides: SetOption = [],  # noqa: B006
    output: Annotated[str | None, typer.Option("--output", "-o", help="folder of the result")] = None,
) -> None:
    """Train a compressed checkpoint as the recipe's finetune section says. Killed and run again, it goes on."""
    from llmcompress import show
    from llmcompress.finetune import command

    given = overrides + ([_output_override(output)] if output is not None else [])
    loaded = command.FinetuneRecipe.load(recipe, given)
    with show.Bars(err) as bars:
        _log_to(err)
        outcome = command.finetune_checkpoint(model, loaded, progress=bars)
    if outcome is None:
        return
    out.print(command.training_table(outcome.folder, outcome.metrics))
    if outcome.seconds:
        out.print(show.seconds_line(outcome.seconds), style="dim")


@app.command(name="eval")
def evaluate(
    model: ModelArgument,
    perplexity: Annotated[list[str], typer.Option(help="text source: wikitext2, a file, python-docs; NAME:SPLIT")] = [],  # noqa: B006
    against: Annotated[
        str | None, typer.Option(help="the dense model: measured too, and the agreement of both")
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks: piqa,arc_easy; piqa=FOLDER reads local records")] = "",
    speed: Annotated[bool, typer.Option("--speed", help="tokens per second, with dense ones beside them")] = False,
    samples: Annotated[int, typer.Option(min=0, help="greedy continuations of the text to show")] = 0,
    spectra: Annotated[bool, typer.Option("--spectra", help="singular values of the compressed weights")] = False,
    length: Annotated[int, typer.Option(min=2, help="tokens in a window")] = 1024,
    stride: Annotated[int | None, typer.Option(min=1, help="tokens between windows; no overlap if absent")] = None,
    windows: Annotated[int, typer.Option(min=0, help="windows measured; 0 for the whole text")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="windows or task items at a time")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="items of each task; all if absent")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    field: Annotated[str, typer.Option(help="column or key that holds the text")] = "text",
    trust_remote_code: Annotated[bool, typer.Option(help="run code that the model's folder brings along")] = False,
    save: Annotated[bool, typer.Option("--save", help="keep the figures in the model's folder, for report")] = False,
    json_file: JsonOption = None,
) -> None:
    """Measure a model, dense or compressed: perplexity, agreement with the dense one, tasks, speed."""
    _check_json_file(json_file)
    from llmcompress_eval.command import Request, evaluate_model, evaluation_tables

    from llmcompress import show

    request = Request(
        model, against, perplexity, [name for name in tasks.split(",") if name], speed, samples, spectra, length,
        stride, windows or None, batch, limit, dtype, device, field, trust_remote_code, save,
    )  # fmt: skip
    with show.Bars(err) as bars:
        found = evaluate_model(request, bars)
    if found is None:
        return
    for table in evaluation_tables(found):
        out.print(table)
    _write_json(json_file, found)


RunsArgument = Annotated[list[Path], typer.Argument(help="folders of runs")]


@app.command()
def compare(
    runs: RunsArgument,
    json_file: JsonOption = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="also write the table to this file")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="also write the table to this file")] = None,
) -> None:
    """One table of runs and their dense models: sizes, perplexity, agreement, tasks, speed, as far as measured."""
    for option, path in (("--json", json_file), ("--csv", csv_file), ("--markdown", markdown_file)):
        _check_file(option, path)
    from llmcompress_eval.compare import as_csv, as_markdown, comparison_table, rows_of
    from llmcompress_eval.runs import read_runs

    found, problems = read_runs(runs)
    _warn(problems)
    rows = rows_of(found)
    out.print(comparison_table(rows))
    _write_json(json_file, {"rows": rows})
    _write_file("--csv", csv_file, as_csv(rows))
    _write_file("--markdown", markdown_file, as_markdown(rows))


@app.command()
def sweep(
    recipe: RecipeOption,
    ratio: Annotated[str, typer.Option(help="0.1..0.6, 0.1..0.6:0.05 or 0.2,0.3")],
    methods: Annotated[str, typer.Option(help="methods, as in svd_llm,cospadi; the recipe's own if absent")] = "",
    overrides: SetOption = [],  # noqa: B006
    output: Annotated[str | None, typer.Option("--output", "-o", help="folder of all results")] = None,
    json_file: JsonOption = None,
) -> None:
    """Run a recipe at several ratios and with several methods, calibrated once; killed and run again, it goes on."""
    _check_json_file(json_file)
    from llmcompress_eval.compare import frontier_table, rows_of
    from llmcompress_eval.runs import read_runs

    from llmcompress import show
    from llmcompress import sweep as sweeping
    from llmcompress.recipe import Recipe

    given = overrides + ([_output_override(output)] if output is not None else [])
    base = Recipe.load(recipe, given)
    recipes = sweeping.sweep_recipes(base, sweeping.parse_ratios(ratio), [name for name in methods.split(",") if name])
    with show.Bars(err) as bars:
        _log_to(err)
        outcomes = sweeping.sweep(recipes, bars)
    rows = rows_of(read_runs([outcome.folder for outcome in outcomes.values()])[0])
    _print_tables(frontier_table(rows))
    _print_line(f"llmcompress report {base.output}/*")
    _write_json(json_file, {"rows": rows})


@app.command()
def report(
    runs: RunsArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="the HTML file")] = Path("report.html"),
) -> None:
    """Write one HTML file about runs: what they cost in quality, what they gain, and where."""
    _check_file("--output", output)
    from llmcompress_eval.report import build_report
    from llmcompress_eval.runs import read_runs

    found, problems = read_runs(runs)
    _warn(problems)
    _write_file("--output", output, build_report(found, problems))
    _print_line(f"{output}: {len(found)} runs")


def _warn(problems: list[str]) -> None:
    """Names what is left out; the others are still reported."""
    for problem in problems:
        err.print(f"left out: {problem}", style="yellow", highlight=False, markup=False, soft_wrap=True)


@app.command()
def inspect(model: ModelArgument, json_file: JsonOption = None) -> None:
    """Print a model's blocks, linear sites, roles, shapes, and what shares an input."""
    _check_json_file(json_file)
    from llmcompress.inspect import inspect_model, structure_tables

    found = inspect_model(model)
    _print_tables(structure_tables(found))
    _write_json(json_file, found)


@app.command()
def analyze(
    model: ModelArgument,
    backend: Annotated[str, typer.Option("--backend", "-b", help="name in `llmcompress backends`")],
    options: Annotated[list[str], typer.Option("--set", help="an option of the backend: rank=32")] = [],  # noqa: B006
    data: Annotated[str, typer.Option(help="text source: wikitext2, a file, python-docs; NAME:SPLIT")] = "python-docs",
    field: Annotated[str, typer.Option(help="column or key that holds the text")] = "text",
    samples: Annotated[int, typer.Option(min=1, help="sequences")] = 8,
    length: Annotated[int, typer.Option(min=2, help="tokens in a sequence")] = 512,
    site: Annotated[
        list[str], typer.Option(help="roles, or regexes over module names; three blocks' inputs if absent")
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0, help="seed of everything random")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(help="also draw the curves into this .png, .svg or .pdf")] = None,
) -> None:
    """Measure what a backend finds in a model, and whether it helps there."""
    _check_json_file(json_file)
    from llmcompress import show
    from llmcompress.analyze import analyze_model, parse_options

    with show.Bars(err) as bars:
        report = analyze_model(
            model, backend, parse_options(options), data, field, samples, length, site, seed, device, bars
        )
    _print_report(report)
    _write_json(json_file, report.as_json())
    if plot is not None:
        report.save_plot(plot)


def _print_report(report: Report) -> None:
    out.print(report.table())
    for finding in report.findings:
        _print_line(finding)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="a compressed checkpoint")]) -> None:
    """Check a checkpoint's files against their recorded SHA-256."""
    from llmcompress.checkpoint.verify import verify as run

    _print_line(f"{folder}: {run(folder)} tensor files as written")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from llmcompress.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def backends() -> None:
    """List every method, allocation and backend."""
    from rich.table import Table

    table = Table()
    for column in ("name", "kind", "port", "paper", "what it does"):
        table.add_column(column)
    for entry in catalog.entries():
        if entry.kind != "layer":
            table.add_row(entry.name, entry.kind, entry.port, entry.paper, entry.summary)
    out.print(table)


def _print_tables(tables: list[Table | str]) -> None:
    for table in tables:
        if isinstance(table, str):
            _print_line(table)
        else:
            out.print(table)


def _print_line(text: str) -> None:
    """As it is: a path such as runs/[30] is no markup."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def _check_json_file(path: Path | None) -> None:
    _check_file("--json", path)


def _check_file(option: str, path: Path | None) -> None:
    """Before anything is computed whose result could not be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(f"{option} {path}: not a file in an existing folder")


def _write_json(path: Path | None, found: dict[str, Any]) -> None:
    _write_file("--json", path, json.dumps(found, indent=1) + "\n")


def _write_file(option: str, path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{option} {path}: cannot be written: {error.strerror}") from error


def _log_to(console: Console) -> None:
    """The pipeline's remedies and findings, one line each, above the progress bars."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    logger: Any = logging.getLogger("llmcompress")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    logger.propagate = False

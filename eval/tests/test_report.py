"""Comparison and report of real runs of a tiny model; the page is also looked at in a headless browser."""

import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from llmcompress_eval.command import Request, evaluate_model
from llmcompress_eval.compare import SIZE, as_csv, as_markdown, columns_of, comparison_table, frontier, rows_of
from llmcompress_eval.report import build_report
from llmcompress_eval.runs import read_run, read_runs
from rich.console import Console

import llmcompress
from llmcompress.errors import InputError
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from tests.tiny import recipe, save_tiny, write_text

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome-headless-shell")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs, one of them measured in full, in a folder whose name is markup."""
    place = tmp_path_factory.mktemp("runs") / "<b>&"
    model, text = save_tiny(place / "tiny"), write_text(place / "letters.txt", 1000)
    for method, ratio in (("svd", 0.5), ("svd_llm", 0.3)):
        data = recipe(model, text, place / f"{method}-{ratio}", method=method, ratio=ratio)
        data["eval"] = {"perplexity": [str(text)], "length": 32, "windows": 4}
        llmcompress.apply(Recipe.parse(data))
    evaluate_model(
        Request(str(place / "svd_llm-0.3"), against=str(model), perplexity=[str(text)], speed=True, samples=2,
                spectra=True, length=32, windows=3, device="cpu", save=True),
        Silent(),
    )  # fmt: skip
    return place


@pytest.fixture(scope="module")
def runs(place):
    return read_runs([place / "svd-0.5", place / "svd_llm-0.3"])[0]


@pytest.fixture(scope="module")
def page(runs):
    return build_report(runs, ["runs/x: incomplete: <it> holds neither"])


# --- comparison ------------------------------------------------------------------------------------------------------


def test_rows_are_the_dense_model_and_the_runs(place, runs):
    rows = {row["run"]: row for row in rows_of(runs)}
    assert list(rows) == ["tiny", "svd-0.5", "svd_llm-0.3"]
    metrics = json.loads((place / "svd-0.5" / "metrics.json").read_text())
    pair = metrics["perplexity"][str(place / "letters.txt")]
    column = "perplexity letters.txt (4 x 32)"
    assert (rows["tiny"][column], rows["svd-0.5"][column]) == tuple(
        pair[name]["perplexity"] for name in ("dense", "compressed")
    )
    assert rows["svd-0.5"][SIZE] == metrics["size"]["bytes"]["compressed"]
    evaluation = json.loads((place / "svd_llm-0.3" / "evaluation.json").read_text())
    assert rows["svd_llm-0.3"]["decode tokens/s"] == evaluation["speed"]["end_to_end"]["decode"]["compressed"]
    assert rows["tiny"]["decode tokens/s"] == evaluation["speed"]["end_to_end"]["decode"]["dense"]
    assert "decode tokens/s" not in rows["svd-0.5"]
    agreed = evaluation["agreement"][str(place / "letters.txt")]
    assert rows["svd_llm-0.3"]["KL letters.txt"] == agreed["kl"]


def test_other_windows_are_another_column(runs):
    """3 x 32 tokens of `eval` beside the 4 x 32 of `apply`."""
    columns = [column for column in columns_of(rows_of(runs)) if column.startswith("perplexity")]
    assert columns == ["perplexity letters.txt (4 x 32)", "perplexity letters.txt (3 x 32)"]


def test_every_form_has_every_figure(runs):
    rows = rows_of(runs)
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["run"] for row in read] == [row["run"] for row in rows]
    assert float(read[1][SIZE]) == rows[1][SIZE]
    lines = as_markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {len(columns_of(rows)) + 1}
    console = Console(width=1000, file=io.StringIO())
    console.print(comparison_table(rows))
    printed = console.file.getvalue()
    for row in rows:
        assert f"{row[SIZE]:,}" in printed
        assert f"{row[SIZE]:,}" in as_markdown(rows)


def test_the_frontier_is_what_nothing_beats_in_both():
    points = {"a": (10, 5.0), "b": (8, 6.0), "c": (9, 6.5), "d": (8, 7.0), "e": (5, 9.0), "f": (12, 5.0)}
    rows = [{"run": name, SIZE: size, "p": loss} for name, (size, loss) in points.items()] + [{"run": "g", SIZE: 1}]
    assert [row["run"] for row in frontier(rows, "p")] == ["e", "b", "a"]


# --- incomplete runs -------------------------------------------------------------------------------------------------


def test_incomplete_runs_are_named_and_the_others_read(place, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(place / "svd-0.5", tmp_path / "broken")
    (tmp_path / "broken" / "metrics.json").write_text("{")
    shutil.copytree(place / "svd-0.5", tmp_path / "bare")
    (tmp_path / "bare" / "recipe.yaml").unlink()
    shutil.copytree(place / "svd-0.5", tmp_path / "half")
    (tmp_path / "half" / "metrics.json").write_text('{"perplexity": {}}')
    names = ["empty", "broken", "bare", "half"]
    found, problems = read_runs([place / "svd-0.5", *[tmp_path / name for name in names]])
    assert [run.name for run in found] == ["svd-0.5"]
    expected = ["holds neither metrics.json nor evaluation.json", "not JSON", "holds no recipe.yaml", "holds no size"]
    for name, problem, reason in zip(names, problems, expected, strict=True):
        assert str(tmp_path / name) in problem
        assert reason in problem
    with pytest.raises(InputError, match="empty: incomplete"):
        read_runs([tmp_path / "empty"])


def test_a_dense_model_whose_figures_were_saved_is_a_row_of_its_own(place):
    request = Request(str(place / "tiny"), perplexity=[str(place / "letters.txt")], length=32, windows=4, save=True)
    evaluate_model(request, Silent())
    (row,) = rows_of([read_run(place / "tiny")])
    assert row["method"] == "dense"
    assert row["perplexity letters.txt (4 x 32)"] > 1
    (place / "tiny" / "evaluation.json").unlink()


# --- the page --------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags and attributes; fails on a tag that is closed out of order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.found, self.stack = [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_needs_nothing_from_elsewhere(page):
    found = Page(page)
    assert not found.all("script")
    assert not found.all("link")
    for _, attributes in found.found:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), attributes
        assert not any(key.startswith("on") for key in attributes)
    assert not re.search(r"url\((?!#)|@import", page)


def test_the_page_is_accessible(page):
    found = Page(page)
    assert found.all("html")[0]["lang"] == "en"
    pictures = found.all("svg")
    assert len(pictures) == 2 + (1 + 2) + 2, (
        "frontiers; maps, of which svd, data-free, knows no error; spectra and speed"
    )
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 40 for picture in pictures)
    assert len(found.all("caption")) == len(found.all("table")) >= 5
    assert all(cell["scope"] in ("col", "row") for cell in found.all("th"))
    identifiers = [attributes["id"] for tag, attributes in found.found if "id" in attributes and tag != "path"]
    assert len(identifiers) == len(set(identifiers))


def test_the_page_says_everything(place, runs, page):
    for row in rows_of(runs):
        assert f"{row[SIZE]:,}" in page
    evaluation = json.loads((place / "svd_llm-0.3" / "evaluation.json").read_text())
    for figure in (evaluation["speed"]["limit"]["dense"], evaluation["speed"]["end_to_end"]["decode"]["compressed"]):
        assert f"{figure:,.1f}" in page
    assert "method: svd_llm" in page
    assert f"torch {evaluation['versions']['torch']}" in page
    assert "runs/x: incomplete: &lt;it&gt; holds neither" in page
    assert "<b>&" not in page, "names are shown as they are"
    assert "model.layers.2.mlp.down_proj" in page


def test_a_report_loads_no_torch():
    """It would take longer than all figures."""
    code = "import sys; import llmcompress_eval.report, llmcompress_eval.plots; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_same_runs_give_the_same_page(runs, page):
    assert build_report(runs, ["runs/x: incomplete: <it> holds neither"]) == page


# --- in a browser ----------------------------------------------------------------------------------------------------

PROBE = """<script>addEventListener("load", () => {
  const shown = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
  const colors = getComputedStyle(document.body);
  document.documentElement.setAttribute("data-found", JSON.stringify({
    wide: document.documentElement.scrollWidth - innerWidth,
    pictures: shown.filter(box => box.width > 200 && box.height > 60 && box.right <= innerWidth + 1).length,
    text: parseFloat(colors.fontSize), ink: colors.color, paper: colors.backgroundColor,
  }));
});</script></body>"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)}")

    def run(*arguments):
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout

    return run


def probed(browser, page, folder, width, *options):
    """What a script, put into a copy of the page for the test alone, finds when it is shown in a window."""
    path = folder / "probe.html"
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    path.write_text(policy.sub("", page).replace("</body>", PROBE), encoding="utf-8")
    shown = browser(f"--window-size={width},900", "--virtual-time-budget=3000", *options, "--dump-dom", path.as_uri())
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', shown)[1]))


def test_the_page_fits_a_phone_and_a_desk(browser, page, tmp_path):
    for width in (390, 1280):
        found = probed(browser, page, tmp_path, width)
        assert found["wide"] <= 0, "nothing is cut off at the right"
        assert found["pictures"] == 7
        assert found["text"] >= 16


def test_dark_mode_turns_the_page_dark(browser, page, tmp_path):
    light, dark = (
        probed(browser, page, tmp_path, 390, f"--blink-settings=preferredColorScheme={scheme}") for scheme in (1, 0)
    )
    brightness = [sum(map(int, re.findall(r"\d+", found["paper"])[:3])) for found in (light, dark)]
    assert brightness[0] > 700
    assert brightness[1] < 120
    assert sum(map(int, re.findall(r"\d+", dark["ink"])[:3])) > 600


def test_the_page_prints(browser, page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser(f"--print-to-pdf={tmp_path}/page.pdf", (tmp_path / "page.html").as_uri())
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")

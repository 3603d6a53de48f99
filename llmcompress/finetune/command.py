"""`llmcompress finetune`: trains a checkpoint that exists already."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.table import Table
from rich.text import Text
from torch import Tensor

from llmcompress.environment import versions
from llmcompress.errors import InputError
from llmcompress.finetune.data import check_teacher, read_tokens, teacher_config
from llmcompress.finetune.stage import is_main_process, leave_group, read_report, stored_dtype, train_checkpoint
from llmcompress.models.files import file_digest
from llmcompress.models.load import DTYPES, Location, fingerprint, load_model, load_tokenizer, locate, read_config
from llmcompress.pipeline import Outcome, Pipeline
from llmcompress.progress import Progress, Silent
from llmcompress.recipe import Compress, Finetune, Recipe
from llmcompress.workspace import digest

if TYPE_CHECKING:
    from llmcompress_eval.perplexity import Windows


class FinetuneRecipe(Recipe):
    """A recipe whose `compress` section, if it has one, has been run already; `model` is the dense model."""

    compress: list[Compress] = Field(default_factory=list, description="steps that made the model; not run")
    finetune: Finetune = Field(description="training after compression")


def finetune_checkpoint(
    model: str,
    recipe: FinetuneRecipe | str | Path,
    *,
    overrides: list[str] | None = None,
    progress: Progress | None = None,
) -> Outcome | None:
    """Trains `model`, a compressed checkpoint or with `method: full` any, as the recipe's `finetune` section says.

    The result goes to the recipe's `output`; `model` stays as it is. Every process of a distributed run calls this;
    all but the first return None. InputError for bad input, before anything is written; RunError for a failure on
    the way, after which the same call goes on with the last checkpoint.
    """
    loaded = recipe if isinstance(recipe, FinetuneRecipe) else FinetuneRecipe.load(recipe, overrides)
    outcome = FinetuneRun(model, loaded, progress or Silent()).run_or_resume()
    leave_group()
    return outcome


class FinetuneRun(Pipeline):
    """One run of the command; work in progress, the finished folder and its metrics are those of any run."""

    recipe: FinetuneRecipe

    def __init__(self, model: str, recipe: FinetuneRecipe, progress: Progress) -> None:
        self.student = locate(model)
        self.section = recipe.finetune
        if self.section.method == "none":
            raise InputError("finetune.method: none trains nothing; choose lrc, full or lora")
        super().__init__(recipe, progress)
        self.teacher = locate(self.section.teacher) if self.section.teacher else self.location

    def _fingerprint(self) -> str:
        """Identifies all that the trained weights depend on."""
        recipe = self.recipe.model_dump(mode="json", include={"finetune", "convert", "seed", "dtype", "device"})
        path = Path(self.section.dataset or self.recipe.calibration.dataset).expanduser()
        models = [fingerprint(self.student)]
        if self.section.loss == "kd":
            models.append(fingerprint(locate(self.section.teacher) if self.section.teacher else self.location))
        return digest([recipe, models, file_digest(path) if path.is_file() else str(path), versions()])

    def run_or_resume(self) -> Outcome | None:
        finished = self._finished()
        if finished and self._measured(finished):
            return Outcome(self.output, finished, {})
        if not finished:
            self._check_output()
        with self.nothing_left_behind():
            with self._timed("load"):
                tokens, texts = self._read()
            result = self.output
            if not finished:
                with self._timed("fine-tune"):
                    result = self._train(tokens)
        if not is_main_process():
            return None
        metrics = finished or {"fingerprint": self.fingerprint, "finetune": read_report(self.work)}
        metrics |= {"evaluation": self._evaluation_digest(), "perplexity": self._measure(result, texts)}
        self._publish(result, metrics)
        return Outcome(self.output, metrics, self.seconds)

    def _read(self) -> tuple[Tensor, dict[str, Windows]]:
        """Training sequences and evaluation windows: all that can be wrong with the texts and the teacher."""
        from llmcompress_eval.text import evaluation_windows

        tokenizer, evaluation = load_tokenizer(self.student), self.recipe.eval
        if self.section.method == "lrc" and not compressed_sites(self.student) and not self.recipe.convert:
            raise InputError(
                f"finetune.method: lrc trains compressed sites, and {self.student.folder} has none; use full"
            )
        if self.section.loss == "kd":
            check_teacher(teacher_config(self.student), teacher_config(self.teacher))
        tokens = read_tokens(self.section, self.recipe.calibration.dataset, tokenizer)
        texts = evaluation_windows(
            tokenizer, evaluation.perplexity, evaluation.length, evaluation.windows, evaluation.field
        )
        return tokens, texts

    def _train(self, tokens: Tensor) -> Path:
        recipe = self.recipe
        return train_checkpoint(
            self.student, self.teacher, tokens, self.section, self.work,
            dtype=DTYPES.get(recipe.dtype) or stored_dtype(self.student), device=self.device, seed=recipe.seed,
            max_shard_size=recipe.max_shard_size, progress=self.progress, trust_remote_code=recipe.trust_remote_code,
            convert=recipe.convert,
        )  # fmt: skip

    def _measure(self, result: Path, texts: dict[str, Windows]) -> dict[str, Any]:
        """Perplexity of the dense model, of the given one and of the result as it loads, on every text."""
        from llmcompress_eval.perplexity import perplexity

        found: dict[str, Any] = {source: {} for source in texts}
        places = {"dense": self.location, "before": self.student, "compressed": Location(result)}
        with self._timed("evaluate"):
            for name, place in places.items() if texts else ():
                model = load_model(place, DTYPES.get(self.recipe.dtype, "auto")).to(self.device)
                for source, windows in texts.items():
                    self.progress.start(f"perplexity, {name}", len(windows))
                    found[source][name] = asdict(perplexity(model, windows, advance=self.progress.advance))
                del model
        return found

    def _card(self, metrics: dict[str, Any]) -> str:
        lines = ["---", "library_name: transformers", "tags: [llmcompress, low-rank]", "---", ""]
        lines += [f"# {self.recipe.model}, compressed and fine-tuned", "", "| perplexity | dense | before | after |"]
        lines += ["|---|---|---|---|"]
        for source, figures in metrics["perplexity"].items():
            shown = " | ".join(f"{figures[name]['perplexity']:.2f}" for name in ("dense", "before", "compressed"))
            lines.append(f"| {Path(source).name} | {shown} |")
        lines += ["", "```python", "import llmcompress", "from transformers import AutoModelForCausalLM", ""]
        lines += ['model = AutoModelForCausalLM.from_pretrained("this/folder")', "```", ""]
        return "\n".join(lines)


def compressed_sites(location: Location) -> dict[str, Any]:
    """The structured sites that a checkpoint's config lists; none for a dense model."""
    if location.gguf:
        return {}
    sites: dict[str, Any] = read_config(location.folder).get("quantization_config", {}).get("sites", {})
    return sites


def training_table(folder: Path, metrics: dict[str, Any]) -> Table:
    """What was trained, and the perplexities before and after."""
    table = Table(title=Text(str(folder)), title_justify="left")
    for column in ("", "dense", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    training = metrics["finetune"]
    if pair := training.get("validation_perplexity"):
        table.add_row("perplexity, held out", "", f"{pair['before']:.2f}", f"{pair['after']:.2f}")
    for source, figures in metrics["perplexity"].items():
        shown = [f"{figures[name]['perplexity']:.2f}" for name in ("dense", "before", "compressed")]
        table.add_row(Text(f"perplexity, {Path(source).name}"), *shown)
    table.add_row("values trained", "", "", f"{training['trained_values']:,}")
    table.add_row("bytes of the optimiser", "", "", f"{training['optimizer_bytes']:,}")
    table.add_row("steps, kept", "", "", f"{training['steps']}, {training['kept']}")
    return table

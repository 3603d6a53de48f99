"""Tasks: local records through lm-eval's own task, against likelihoods computed here one answer at a time."""

import json
import sys

import pytest
import torch
from llmcompress_eval.compare import rows_of
from llmcompress_eval.perplexity import perplexity
from llmcompress_eval.runs import read_run
from llmcompress_eval.tasks import evaluate_tasks, load_tasks
from rich.console import Console
from transformers import AutoModelForCausalLM

import llmcompress
from llmcompress.errors import InputError
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from llmcompress.show import result_table
from tests.tiny import VOCABULARY, recipe, save_tiny, tiny_model, tiny_tokenizer, write_text

RECORDS = [
    {"goal": f"{verb} a {thing}", "sol1": f"Take it {end}.", "sol2": f"Leave the {thing}."}
    for verb, thing, end in [("Cut", "loaf", "up"), ("Fix", "tap", "off"), ("Dry", "hat", "in"), ("Bag", "pie", "out"),
                             ("Tie", "knot", "on"), ("Boil", "egg", "hot")]
]  # fmt: skip
LABELS = [0, 1, 1, 0, 1, 0]


@pytest.fixture(scope="module")
def piqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("piqa")
    (folder / "valid.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "valid-labels.lst").write_text("".join(f"{label}\n" for label in LABELS))
    return folder


@pytest.fixture(scope="module")
def tasks(piqa):
    return load_tasks([f"piqa={piqa}"])


def evaluate(tasks, batch=1, limit=None, model=None):
    return evaluate_tasks(
        model or tiny_model("llama", max_position_embeddings=128), tiny_tokenizer(), tasks, batch, limit, Silent()
    )


def log_likelihood(model, prompt, answer):
    tokenizer = tiny_tokenizer()
    start, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, prompt + answer))
    with torch.no_grad():
        scores = model.double()(input_ids=whole).logits.log_softmax(-1)[0]
    model.float()
    places = range(start.shape[1], whole.shape[1])
    return sum(scores[place - 1, whole[0, place]].item() for place in places)


def test_accuracy_is_that_of_the_likelier_answer(tasks):
    """`acc` takes the likelier answer, `acc_norm` the likelier one by byte."""
    model = tiny_model("llama", max_position_embeddings=128)
    plain = by_byte = 0
    for record, label in zip(RECORDS, LABELS, strict=True):
        prompt = f"Question: {record['goal']}\nAnswer:"
        scores = [log_likelihood(model, prompt, f" {record[key]}") for key in ("sol1", "sol2")]
        sizes = [len(record[key].encode()) for key in ("sol1", "sol2")]
        plain += (scores[1] > scores[0]) == label
        by_byte += (scores[1] / sizes[1] > scores[0] / sizes[0]) == label
    found = evaluate(tasks)["piqa"]
    assert found["items"] == 6
    assert found["acc"]["value"] == plain / 6
    assert found["acc_norm"]["value"] == by_byte / 6
    share = plain / 6
    assert found["acc"]["standard_error"] == pytest.approx((share * (1 - share) / 5) ** 0.5)


def test_perplexity_is_lm_evals_on_the_same_windows():
    from lm_eval.models.huggingface import HFLM

    model = tiny_model("llama")
    rows = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    requests = [(("", ""), row[:1].tolist(), row[1:].tolist()) for row in rows]
    harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=2)
    scores = [score for score, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert perplexity(model, rows).nll == pytest.approx(-sum(scores) / (4 * 23), rel=1e-5)


def test_the_batch_size_does_not_matter(tasks):
    assert evaluate(tasks, batch=1) == evaluate(tasks, batch=4)


def test_the_first_items_alone(tasks):
    assert evaluate(tasks, limit=2)["piqa"]["items"] == 2


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning")  # lm-eval does, for any quantizer
def test_lm_eval_loads_a_compressed_checkpoint_as_an_hf_model(piqa, tasks, tmp_path, monkeypatch):
    """Its own command, with a task of its own format, gives the same accuracy as `llmcompress eval --tasks`."""
    from llmcompress_eval import harness

    folder = tmp_path / "small"
    model = tiny_model("llama", max_position_embeddings=128)
    llmcompress.compress(model, method="svd", ratio=0.4, tokens=torch.arange(3, 35)[None]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    records = [{**record, "label": label} for record, label in zip(RECORDS, LABELS, strict=True)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {tmp_path}/records.jsonl}}}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\ndoc_to_target: label\n"
        'doc_to_text: "Question: {{goal}}\\nAnswer:"\ndoc_to_choice: "{{[sol1, sol2]}}"\nmetric_list: [{metric: acc}]\n'
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [
        "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={folder}", "--device", "cpu", "--tasks",
        str(tmp_path / "mine" / "mine.yaml"), "--output_path", str(tmp_path / "found"),
    ])  # fmt: skip
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *_, **__: _small_manager(tmp_path / "mine"))
    harness.cli_evaluate()
    found = json.loads(next((tmp_path / "found").rglob("results*.json")).read_text())
    assert found["results"]["mine"]["acc,none"] == evaluate(tasks, model=model)["piqa"]["acc"]["value"]


def _small_manager(folder):
    """lm-eval's index of this folder alone: reading its 14,000 files would take half a minute."""
    from lm_eval.tasks.manager import TaskManager

    return TaskManager(include_defaults=False, include_path=str(folder))


def test_a_recipe_measures_tasks_dense_and_compressed(piqa, tasks, tmp_path):
    folder, data = save_tiny(tmp_path / "dense", max_position_embeddings=128), write_text(tmp_path / "text.txt")
    run = recipe(folder, data, tmp_path / "run") | {"eval": {"tasks": [f"piqa={piqa}"], "limit": 4}}
    outcome = llmcompress.apply(Recipe.parse(run))
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())["tasks"]
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert stored == {
        "dense": evaluate(tasks, limit=4),
        "compressed": evaluate(tasks, limit=4, model=compressed),
    }
    rows = rows_of([read_run(tmp_path / "run")])
    assert [row["piqa acc"] for row in rows] == [stored[name]["piqa"]["acc"]["value"] for name in stored]
    console = Console(width=120)
    with console.capture() as shown:
        console.print(result_table(outcome.folder, outcome.metrics, None))
    assert "piqa, acc_norm" in shown.get()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_recipe_with_an_unknown_task_leaves_nothing(monkeypatch, piqa, tmp_path):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *_, **__: _small_manager(piqa))
    folder, data = save_tiny(tmp_path / "dense"), write_text(tmp_path / "text.txt")
    run = recipe(folder, data, tmp_path / "run") | {"eval": {"tasks": ["no_such_task"]}}
    with pytest.raises(InputError, match=r"^eval\.tasks: unknown task 'no_such_task'"):
        llmcompress.apply(Recipe.parse(run))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]


def test_an_unknown_task_offers_the_nearest(monkeypatch, piqa):
    import lm_eval.tasks
    from lm_eval.tasks.manager import TaskManager

    folder = str(next(iter(lm_eval.tasks.__path__))) + "/piqa"
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **_: TaskManager(include_defaults=False, include_path=folder)
    )
    with pytest.raises(InputError, match=r"^--tasks: unknown task 'piqq'; did you mean 'piqa'\?$"):
        load_tasks(["piqq"])
    with pytest.raises(InputError, match=r"unknown task 'zzz'; `lm_eval ls tasks` lists them"):
        load_tasks(["zzz"])


def test_records_out_of_reach():
    """The tests are offline: the hub gives nothing."""
    with pytest.raises(InputError, match=r"^--tasks: the hub's records \(from a folder: piqa=FOLDER\): .*baber/piqa"):
        load_tasks(["piqa"])


def test_bad_folders(tmp_path, piqa):
    with pytest.raises(InputError, match="no such folder"):
        load_tasks([f"piqa={tmp_path}/none"])
    with pytest.raises(InputError, match=r"holds none of train\.jsonl"):
        load_tasks([f"piqa={tmp_path}"])
    (tmp_path / "valid.jsonl").write_text((piqa / "valid.jsonl").read_text())
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(InputError, match=r"valid-labels\.lst: 2 labels for 6 records of valid\.jsonl"):
        load_tasks([f"piqa={tmp_path}"])
    (tmp_path / "valid.jsonl").write_text("{]\n")
    with pytest.raises(InputError, match=r"valid\.jsonl: not JSON lines"):
        load_tasks([f"piqa={tmp_path}"])
    (tmp_path / "valid.jsonl").write_text("\n")
    (tmp_path / "valid-labels.lst").unlink()
    with pytest.raises(InputError, match=r"valid\.jsonl: holds no records"):
        load_tasks([f"piqa={tmp_path}"])
    (tmp_path / "valid.jsonl").rename(tmp_path / "test.jsonl")
    (tmp_path / "test.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(InputError, match=r"--tasks: .*: no split or field 'validation', which the task reads"):
        load_tasks([f"piqa={tmp_path}"])

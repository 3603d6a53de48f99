"""A training that is killed at any instant goes on when it is started again, with the same losses and bytes."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

import llmcompress
from llmcompress import Recipe
from llmcompress.finetune import trainer as trainer_module
from llmcompress.finetune.trainer import last_checkpoint
from tests.tiny import recipe, save_tiny, write_text

SECTION = {"steps": 10, "lr": 3e-3, "length": 16, "batch": 4, "validation": 8, "evaluate_every": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_tiny(folder / "model"), write_text(folder / "letters.txt")


def data(inputs, output, **section):
    made = recipe(*inputs, output, method="cospadi", propagate=True)
    return {**made, "finetune": {**SECTION, **section}, "block_recovery": {"steps": 3}}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    llmcompress.apply(Recipe.parse(data(inputs, output)))
    return files(output)


class Killed(BaseException):
    """Stands for a signal: nothing in the program may catch it."""


def test_stopped_at_every_checkpoint_it_ends_in_the_same_bytes(inputs, undisturbed, tmp_path, monkeypatch):
    """Each run ends right after its first checkpoint, or in the middle of writing it, in turn."""
    save, kills = trainer_module.FinetuneTrainer._save_checkpoint, 0

    def interrupted(self, model, trial):
        nonlocal kills
        kills += 1
        if kills % 2:
            save(self, model, trial)
        else:
            super(trainer_module.FinetuneTrainer, self)._save_checkpoint(model, trial)  # without the mark at its end
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.FinetuneTrainer, "_save_checkpoint", interrupted)
        while not (tmp_path / "out").exists() and kills < 30:
            try:
                llmcompress.apply(Recipe.parse(data(inputs, tmp_path / "out")))
            except Killed:
                (work,) = tmp_path.glob(".out.work-*")
                found = last_checkpoint(work / "training")
                assert found is None or (found / "complete").exists()
                if kills == 9:
                    break
    assert kills == 9, "the last one after the last step"
    llmcompress.apply(Recipe.parse(data(inputs, tmp_path / "out")))
    found = files(tmp_path / "out")
    assert [name for name in undisturbed if found[name] != undisturbed[name]] == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the work folder is gone"


def test_stopped_while_old_checkpoints_are_deleted_it_ends_in_the_same_bytes(
    inputs, undisturbed, tmp_path, monkeypatch
):
    """Of the checkpoint that is being deleted the optimizer's state is gone, and nothing else."""
    given = Recipe.parse(data(inputs, tmp_path / "out"))

    def interrupted(path):
        (path / "optimizer.pt").unlink()
        raise Killed

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module.shutil, "rmtree", interrupted)
            with pytest.raises(Killed):
                llmcompress.apply(given)
        (work,) = tmp_path.glob(".out.work-*")
        assert (last_checkpoint(work / "training") / "optimizer.pt").is_file()
    llmcompress.apply(given)
    found = files(tmp_path / "out")
    assert [name for name in undisturbed if found[name] != undisturbed[name]] == []


def _apply(given):
    os.makedirs(os.path.dirname(given["output"]), exist_ok=True)
    llmcompress.apply(Recipe.parse(given))


def test_sigkill_while_training(inputs, undisturbed, tmp_path):
    """Killed at random moments of the training, then run to its end: same bytes, same losses in the metrics."""
    context = multiprocessing.get_context("spawn")
    generator = random.Random(0)
    given = data(inputs, tmp_path / "runs" / "out")
    for _ in range(3):
        process = context.Process(target=_apply, args=(given,))
        process.start()
        deadline = time.monotonic() + 120
        while process.is_alive() and not list((tmp_path / "runs").glob(".out.work-*/training/checkpoint-*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(generator.random() * 0.3)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    llmcompress.apply(Recipe.parse(given))
    found = files(tmp_path / "runs" / "out")
    assert json.loads(found["metrics.json"]) == json.loads(undisturbed["metrics.json"])
    assert [name for name in undisturbed if found[name] != undisturbed[name]] == []

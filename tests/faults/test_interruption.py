"""A run that is killed at any instant goes on when it is started again, and ends in the same bytes."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import yaml

import llmcompress
from llmcompress import Recipe, RunError, workspace
from tests.tiny import recipe, save_tiny, write_text


def two_passes(model, text, output):
    """Forward and backward statistics of all blocks, spectra, then compression; several shards; an evaluation."""
    data = recipe(model, text, output, method="fwsvd", weighting="gram", allocation="svd_llm_v2")
    data["eval"] = {"perplexity": [str(text)], "length": 16, "windows": 4}
    return {**data, "max_shard_size": "20KB"}


def propagated(model, text, output):
    """Two streams of hidden states, one through the dense model, one through the compressed prefix."""
    return recipe(model, text, output, refit=True, propagate=True)


RECIPES = {"two passes": two_passes, "propagated": propagated}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_tiny(folder / "model", num_hidden_layers=6), write_text(folder / "letters.txt")


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """Files of each recipe's undisturbed run."""
    found = {}
    for name, make in RECIPES.items():
        output = tmp_path_factory.mktemp("undisturbed") / "out"
        llmcompress.apply(Recipe.parse(make(*inputs, output)))
        found[name] = files(output)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_resumes(data, wanted):
    llmcompress.apply(Recipe.parse(data))
    output = Path(data["output"])
    found = files(output)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    assert [path.name for path in output.parent.iterdir()] == [output.name], "the work folder is gone"


class Killed(BaseException):
    """Stands for a signal: nothing in the program may catch it."""


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_around_commits(name, moment, inputs, undisturbed, tmp_path, monkeypatch):
    """A file is committed by a rename: run after run ends just before or just after one of them, a few further on.

    A block takes up to three commits, so that a run of three or more makes progress.
    """
    data = RECIPES[name](*inputs, tmp_path / "out")
    commit, generator, left, kills = workspace.replace_durably, random.Random(1), 0, 0

    def interrupted(part, target):
        nonlocal left
        left -= 1
        if left == 0 and moment == "before":
            raise Killed
        commit(part, target)
        if left == 0:
            raise Killed

    monkeypatch.setattr(workspace, "replace_durably", interrupted)
    monkeypatch.setattr("llmcompress.pipeline.replace_durably", interrupted)
    while not (tmp_path / "out").exists():
        left = generator.randint(4, 12)
        try:
            llmcompress.apply(Recipe.parse(data))
        except Killed:
            kills += 1
            assert not (tmp_path / "out").exists(), "the result appears whole or not at all"
        assert kills < 60
    assert kills >= 4
    assert_resumes(data, undisturbed[name])


@pytest.fixture(scope="module")
def spawn():
    """Starts functions in processes that have everything imported and share nothing with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmcompress.pipeline", "llmcompress_eval.pair", "tests.faults.child"])
    process = context.Process(target=time.sleep, args=(0,))
    process.start()
    process.join()
    return context


def test_sigkill_at_ten_random_moments(inputs, undisturbed, tmp_path, spawn):
    from tests.faults import child

    generator = random.Random(0)
    seconds = {}
    for name, make in RECIPES.items():
        start = time.perf_counter()
        process = spawn.Process(target=child.run, args=(make(*inputs, tmp_path / "timing" / name),))
        process.start()
        process.join()
        assert process.exitcode == 0
        seconds[name] = time.perf_counter() - start
    killed = 0
    for attempt in range(40):
        if killed == 10:
            break
        name = list(RECIPES)[attempt % 2]
        folder = tmp_path / str(attempt)
        folder.mkdir()
        data = RECIPES[name](*inputs, folder / "out")
        process = spawn.Process(target=child.run, args=(data,))
        process.start()
        time.sleep(generator.uniform(0.05, 1) * seconds[name])
        process.kill()
        process.join()
        killed += process.exitcode == -9
        assert_resumes(data, undisturbed[name])
    assert killed == 10


def test_a_sweep_killed_at_five_random_moments_goes_on(inputs, tmp_path, spawn):
    from tests.faults import child

    choice = [0.3, 0.5], ["svd", "svd_llm"]

    def start(folder):
        process = spawn.Process(target=child.run_sweep, args=(recipe(*inputs, folder), *choice))
        process.start()
        return process

    began = time.perf_counter()
    start(tmp_path / "whole").join()
    seconds = time.perf_counter() - began
    wanted = {path.name: files(path) for path in (tmp_path / "whole").iterdir()}
    assert wanted.keys() == {"svd-0.3", "svd-0.5", "svd_llm-0.3", "svd_llm-0.5"}
    generator, killed = random.Random(3), 0
    for attempt in range(20):
        if killed == 5:
            break
        process = start(tmp_path / f"attempt{attempt}")
        time.sleep(generator.uniform(0.05, 1) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -9
        start(tmp_path / f"attempt{attempt}").join()
        assert {path.name: files(path) for path in (tmp_path / f"attempt{attempt}").iterdir()} == wanted
    assert killed == 5


def test_interrupt_says_how_to_go_on(inputs, undisturbed, tmp_path, capsys, monkeypatch):
    from llmcompress import cli

    data = propagated(*inputs, tmp_path / "out")
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data))
    commit, count = workspace.replace_durably, 0

    def control_c(part, target):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        commit(part, target)

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "replace_durably", control_c)
        patch.setattr("sys.argv", ["llmcompress", "apply", "--recipe", str(path)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code == 1
    assert "interrupted; finished parts are kept: run the same command again to go on" in capsys.readouterr().err
    path.unlink()
    assert_resumes(data, undisturbed["propagated"])


@pytest.mark.parametrize("limit", [1_000, 6_000, 14_000, 30_000])
def test_a_full_disk_is_one_line_and_resumable(limit, inputs, undisturbed, tmp_path, spawn):
    """No file may grow beyond the limit: hidden states, results and the final shards fail in turn."""
    from tests.faults import child

    data = two_passes(*inputs, tmp_path / "out")
    report = spawn.Queue()
    process = spawn.Process(target=child.run_limited, args=(data, limit, report))
    process.start()
    kind, message = report.get(timeout=60)
    process.join()
    assert kind == "RunError", message
    assert "\n" not in message
    assert "cannot be written" in message
    assert "run the same command again: it goes on where it stopped" in message
    assert not (tmp_path / "out").exists()
    assert_resumes(data, undisturbed["two passes"])


def test_a_corrupt_part_is_named(inputs, tmp_path, monkeypatch):
    """Nothing half-written can be there; what a disk has corrupted since is named, with the remedy."""
    data = propagated(*inputs, tmp_path / "out")
    monkeypatch.setattr("llmcompress.pipeline.save_streamed", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        llmcompress.apply(Recipe.parse(data))
    monkeypatch.undo()
    (part,) = tmp_path.glob(".out.work-*/store/blocks/00002.safetensors")
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(RunError, match=r"blocks/00002\.safetensors: corrupt.*remove it"):
        llmcompress.apply(Recipe.parse(data))


def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path, spawn):
    """40 blocks (0.5 GB of weights) need at most 1.15 times the resident memory of 10 blocks of the same width."""
    from tests.faults import child

    text = write_text(tmp_path / "letters.txt")
    peaks = {}
    for blocks in (10, 40):
        folder = save_tiny(
            tmp_path / f"model{blocks}", hidden_size=512, intermediate_size=1408, num_hidden_layers=blocks, shard="50MB"
        )
        data = recipe(folder, text, tmp_path / f"out{blocks}", targets=["k", "o"], propagate=True)
        report = spawn.Queue()
        process = spawn.Process(target=child.run_measured, args=(data, report))
        process.start()
        peaks[blocks] = report.get(timeout=300)
        process.join()
        shutil.rmtree(folder)
    assert peaks[40] <= 1.15 * peaks[10]

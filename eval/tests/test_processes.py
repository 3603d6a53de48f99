"""Windows shared by processes: each is measured once, and the totals are those of one process, to the last bit."""

import itertools
import json
import subprocess
import sys

import pytest
from llmcompress_eval.processes import ALONE, Processes

from tests.tiny import save_tiny, write_text


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 14])
def test_every_piece_of_work_is_shared_out_once(size, count):
    parts = [list(Processes(rank, size).share(count)) for rank in range(size)]
    assert list(itertools.chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_gathers_its_own():
    assert ALONE.gather([1, 2]) == [1, 2]


def test_two_processes_find_what_one_finds(tmp_path):
    model, text = save_tiny(tmp_path / "model"), write_text(tmp_path / "a.txt", 400)
    command = ["-m", "llmcompress", "eval", str(model), "--perplexity", str(text), "--against", str(model), "--length",
               "32", "--windows", "0", "--stride", "20", "--device", "cpu", "--json"]  # fmt: skip
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip
    found = []
    for start in ([sys.executable], launch):
        path = tmp_path / f"{len(start)}.json"
        ended = subprocess.run([*start, *command, str(path)], capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert ended.stdout.count("agreement with") == 1, "one process prints"
        found.append(json.loads(path.read_text()))
    one, two = found
    assert two == one
    assert one["perplexity"][str(text)]["windows"] == 19

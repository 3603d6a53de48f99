"""Windows shared by processes: each is measured once, and the totals are those of one process, to the last bit."""

import itertools
import json
import subprocess
import sys

import pytest
from llmcompress_eval.command import Request, evaluate_model
from llmcompress_eval.processes import ALONE, Processes

from llmcompress.progress import Silent
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
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "llmcompress", "eval", str(model), "--perplexity", str(text), "--against", str(model), "--length", "32",
        "--windows", "0", "--stride", "20", "--device", "cpu", "--json", str(tmp_path / "found.json"),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("agreement with") == 1, "one process prints"
    request = Request(str(model), str(model), [str(text)], length=32, windows=None, stride=20, device="cpu")
    alone = evaluate_model(request, Silent())
    assert json.loads((tmp_path / "found.json").read_text()) == alone
    assert alone["perplexity"][str(text)]["windows"] == 19

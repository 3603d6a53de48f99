"""Does the harness cost anything? Perplexity's throughput over the bare forward pass's, and the time of a report.

python benchmarks/evaluation.py --data FOLDER_OF_WIKITEXT --runs RUN [RUN ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from llmcompress_eval.perplexity import perplexity
from llmcompress_eval.report import build_report
from llmcompress_eval.runs import read_runs
from llmcompress_eval.text import evaluation_windows

from llmcompress.calibration.modes import evaluation_mode
from llmcompress.models.load import load_model, load_tokenizer, locate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds test.txt")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="folders of runs to report")
    options = parser.parse_args()
    location, source = locate(options.model), str(options.data / "test.txt")
    windows = evaluation_windows(load_tokenizer(location), [source], options.length, options.windows, "text")[source]
    model = load_model(location)
    bare, whole = [], []
    for number in range(options.rounds + 1):
        with torch.no_grad(), evaluation_mode(model):
            start = time.perf_counter()
            for row in windows.tokens:
                model(input_ids=row[None], use_cache=False)
            middle = time.perf_counter()
        perplexity(model, windows)
        if number:
            bare.append(middle - start)
            whole.append(time.perf_counter() - middle)
    tokens = windows.tokens.numel()
    ratio = statistics.median(a / b for a, b in zip(bare, whole, strict=True))
    print(
        f"{torch.get_num_threads()} threads, {options.windows} x {options.length} tokens, medians of {options.rounds}"
    )
    print(f"bare forward {tokens / statistics.median(bare):,.0f} tokens/s")
    print(f"perplexity   {tokens / statistics.median(whole):,.0f} tokens/s, {ratio:.3f} of the bare forward")
    if options.runs:
        start = time.perf_counter()
        runs, problems = read_runs(options.runs)
        page = build_report(runs, problems)
        print(f"report of {len(runs)} runs: {time.perf_counter() - start:.1f} s, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

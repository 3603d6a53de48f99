"""What a regular pattern of the codes costs: the error of dictionaries whose columns may choose any half of the atoms,
half of every 32, or 2 of every 4.

    python benchmarks/patterns.py --data FOLDER [--blocks 2 15 27]

FOLDER holds WikiText-2 as `wikitext-2/valid.txt`. SmolLM2-135M-Instruct in float32, Grams of 16 x 512 tokens, 30 %
removed, one dictionary for the sites that read one input, twice as many atoms as non-zeros. All patterns get the same
sizes, so that they store the same bits: one of mask an atom, 14 a value. Relative error of the outputs.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmcompress.calibration.collect import InputStatistics, capture_inputs
from llmcompress.calibration.text import pack, read_documents, tokenize
from llmcompress.compressors import dictionary_learning, hard_thresholding
from llmcompress.compressors.cospadi import learn_dictionary
from llmcompress.compressors.dictionary_sizes import sizes_within
from llmcompress.compressors.low_rank import joint_statistics, stacked_weight
from llmcompress.compressors.svd_llm import SVDLLM, SVDLLMOptions
from llmcompress.models.load import load_model, load_tokenizer, locate
from llmcompress.models.runner import Runner
from llmcompress.models.structure import analyse
from llmcompress.types import Budget, Problem

MODEL = "builtin:smollm2-135m-instruct"
PATTERNS = {"any half": None, "16 of 32": 32, "2 of 4": 4}
RATIO = 0.3


def half_of_each(block: int, scores: Tensor, s: int) -> Tensor:
    """`largest` for rows of `scores` (n, k), s = k / 2, where every `block` atoms in a row keep their own half."""
    if 2 * s != scores.shape[1] or s % (block // 2):
        raise ValueError(f"{s} of {scores.shape[1]} are not half of every {block}")
    parts = scores.unflatten(1, (-1, block))
    chosen = parts.abs().topk(block // 2, dim=2, sorted=False).indices
    return torch.zeros_like(parts).scatter_(2, chosen, 1.0).flatten(1)


def error(y: Tensor, k: int, block: int | None) -> float:
    if block is None:
        return learn_dictionary(y, k, k // 2).history[-1]
    choose: Callable[[Tensor, int], Tensor] = functools.partial(half_of_each, block)
    with mock.patch.object(dictionary_learning, "largest", choose), mock.patch.object(
        hard_thresholding, "largest", choose
    ):  # fmt: skip
        return learn_dictionary(y, k, k // 2).history[-1]


def problems(blocks: list[int], data: Path) -> list[Problem]:
    tokenizer, model = load_tokenizer(locate(MODEL)), load_model(locate(MODEL))
    text = read_documents(str(data / "wikitext-2" / "valid.txt"), "calibration")
    tokens = pack(tokenize(tokenizer, text), 16, 512, "valid.txt")
    structure = analyse(model)
    sites = [site for block in blocks for site in structure.in_block(block)]
    statistics = InputStatistics(sites, frozenset({"gram"}), torch.device("cpu"))
    with torch.no_grad(), capture_inputs(model, sites, statistics.receive):
        for part in tokens.split(4):
            model(input_ids=part)
    runner = Runner(model, structure)
    return [
        Problem(unit, [runner.weight(s) for s in unit], [None] * len(unit), [statistics.sums[s.input] for s in unit])
        for unit in SVDLLM(SVDLLMOptions(share="input")).units(sites)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 27])
    options = parser.parse_args()
    table = Table("sites", "atoms", *PATTERNS, "over any half", title="relative error of the outputs, 30 % removed")
    start = time.process_time()
    ratios = []
    for problem in problems(options.blocks, options.data):
        budget = Budget.for_ratio(problem.sites, RATIO)
        sizes = sizes_within(budget.values, problem.sites[0].d_in, [site.d_out for site in problem.sites], 2.0, 14)
        k = sizes.atoms // 32 * 32
        y = SVDLLM().space(stacked_weight(problem), joint_statistics(problem), problem.name).matrix.float()
        errors = [error(y, k, block) for block in PATTERNS.values()]
        ratios.append([own / errors[0] for own in errors[1:]])
        shown = [f"{own:.4f}" for own in errors], ", ".join(f"{ratio:.2f}" for ratio in ratios[-1])
        table.add_row(problem.name, str(k), *shown[0], shown[1])
    console = Console(width=120)
    console.print(table)
    means = torch.tensor(ratios).mean(0).tolist()
    told = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(list(PATTERNS)[1:], means, strict=True))
    console.print(f"mean over any half: {told}; {time.process_time() - start:.0f} CPU s")


if __name__ == "__main__":
    main()

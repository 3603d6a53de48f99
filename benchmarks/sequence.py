"""What a state-space adapter does for a language model: perplexity before and after training it, clean and perturbed.

    python benchmarks/sequence.py --data FOLDER [--steps 40] [--inits s5-ptd s4-ptd s4d]

FOLDER holds WikiText-2 as `wikitext-2/valid.txt` and `test.txt`. Setting: SmolLM2-135M-Instruct in float32, one adapter
of 64 states after block 10, which alone trains, by cross entropy on 256 tokens of the validation text a step at a
learning rate of 3e-3; perplexity on the first 4 x 512 tokens of the test text. Perturbed: to what the adapter reads
a sine of one radian a token is added, a tenth of the reading's root mean square.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llmcompress_eval.perplexity import perplexity, windows
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmcompress.backends.choice import Backend
from llmcompress.calibration.text import pack, read_documents, tokenize
from llmcompress.finetune.stage import convert_layers
from llmcompress.finetune.train import train
from llmcompress.layers.converted import added_parameters
from llmcompress.models.load import load_model, load_tokenizer, locate
from llmcompress.recipe import Finetune

BLOCK = 10


def disturbed(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    hidden = inputs[0]
    sine = torch.arange(hidden.shape[1], dtype=hidden.dtype).sin()[:, None]
    return hidden + 0.1 * hidden.square().mean().sqrt() * sine, *inputs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--inits", nargs="+", default=["s5-ptd", "s4-ptd", "s4d"])
    options = parser.parse_args()
    location, console = locate("builtin:smollm2-135m-instruct"), Console(width=120)
    tokenizer = load_tokenizer(location)
    valid, test = (
        tokenize(tokenizer, read_documents(str(options.data / "wikitext-2" / f"{split}.txt"), "evaluation"))
        for split in ("valid", "test")
    )
    tokens, held_out = pack(valid, options.steps, 256, "valid"), windows(test, 512, 4, "test")
    table = Table("adapter", "values that train", "perplexity", "perturbed", "CPU s a step")
    for init in options.inits:
        model = load_model(location)
        if init == options.inits[0]:
            table.add_row("none", "", f"{perplexity(model, held_out).perplexity:.3f}", "", "")
        convert_layers(model, [Backend(name="ptd", init=init, layers=[BLOCK])], 0)
        section = Finetune(steps=options.steps, loss="ce", lr=3e-3, length=256, batch=1, validation=0)
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            train(model, tokens, section, Path(folder) / "run")
        seconds = (time.process_time() - start) / options.steps
        clean = perplexity(model, held_out).perplexity
        (adapter,) = (m for name, m in model.named_modules() if name.endswith("adapter"))
        hook = adapter.register_forward_pre_hook(disturbed)
        noisy = perplexity(model, held_out).perplexity
        hook.remove()
        count = sum(p.numel() for p in added_parameters(model))
        table.add_row(init, f"{count:,}", f"{clean:.3f}", f"{noisy:.3f}", f"{seconds:.2f}")
        console.print(table)


if __name__ == "__main__":
    main()

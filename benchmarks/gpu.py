"""Builds, checks and times compressed layers on a GPU: Llama-3-8B's shapes, 30 % removed, beside torch's dense product.

    python benchmarks/gpu.py [--dtype bfloat16] [--rows 1 2 4 16 64 256 4096] [--ratio 0.3] [--fit] [--generate]

The layers are those that `compress` makes, siblings (q, k, v; gate, up) with one basis or dictionary, over random
values. Each call is timed in a CUDA graph of several copies, so that weights come from memory and the host does not
count. The byte limit, for fewer than 512 rows, is the layer's stored bytes over the bandwidth of a copy measured in the
same run; "a block" adds up the four groups. Every result is compared with float64 first.
--fit: seconds of learning dictionaries on the GPU. --generate: tokens a second of a random Llama-3.2-1B, one sequence,
each step a CUDA graph over a static cache; and a small model compressed, saved and loaded on the GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

import llmcompress
from llmcompress.compressors.cospadi import learn_dictionary
from llmcompress.compressors.dictionary_sizes import dictionary_sizes
from llmcompress.compressors.ranks import rank_costs, rank_within
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.block import BlockDenseLinear
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.layers.sparse_dictionary import SparseDictionaryLinear

GROUPS = {
    "o": (4096, [4096]),
    "q|k|v": (4096, [4096, 1024, 1024]),
    "gate|up": (4096, [14336, 14336]),
    "down": (14336, [4096]),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
COPIES, MANY_ROWS = 4, 512
console = Console(width=120)


class Random:
    """Random values of a dtype on the GPU, from one seed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator("cuda").manual_seed(0)

    def values(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device="cuda").div_(math.sqrt(shape[-1])).to(self.dtype)

    def chosen(self, rows: int, columns: int, count: int) -> Tensor:
        """(rows, count) ascending indices below `columns`."""
        order = torch.rand(rows, columns, generator=self.generator, device="cuda")
        return order.topk(count).indices.sort(1).values


Layer = nn.Linear | StructuredLinear


def dense(random: Random, d_in: int, d_outs: Sequence[int], ratio: float) -> list[Layer]:
    layers: list[Layer] = []
    for d_out in d_outs:
        layer = nn.Linear(d_in, d_out, bias=False, device="meta")
        layer.weight = nn.Parameter(random.values(d_out, d_in))
        layers.append(layer)
    return layers


def low_rank(random: Random, d_in: int, d_outs: Sequence[int], ratio: float) -> list[Layer]:
    rank = rank_within(rank_costs(d_in, d_outs, True), (1 - ratio) * d_in * sum(d_outs))
    pivots = torch.zeros(sum(d_outs), dtype=torch.bool, device="cuda")
    pivots[random.chosen(1, sum(d_outs), rank)[0]] = True
    A = nn.Parameter(random.values(d_in, rank))
    layers: list[Layer] = []
    offset = 0
    for mask in pivots.split(list(d_outs)):
        B = random.values(rank, int((~mask).sum()))
        layers.append(LowRankLinear.from_factors(A, B, None, mask, offset, {"A": "owner"} if layers else None))
        offset += int(mask.sum())
    return layers


def sparse(random: Random, d_in: int, d_outs: Sequence[int], ratio: float) -> list[Layer]:
    atoms, nonzeros = dictionary_sizes(d_in, sum(d_outs), ratio)
    dictionary = nn.Parameter(random.values(d_in, atoms).bfloat16(), requires_grad=False)
    return [
        SparseDictionaryLinear.from_factors(
            dictionary, random.chosen(d_out, atoms, nonzeros), random.values(d_out, nonzeros), dtype=random.dtype,
            shared={"dictionary": "owner"} if number else None,
        )
        for number, d_out in enumerate(d_outs)
    ]  # fmt: skip


def block_dense(random: Random, d_in: int, d_outs: Sequence[int], ratio: float) -> list[Layer]:
    layers: list[Layer] = []
    for d_out in d_outs:
        rank = int((1 - ratio) * d_in * d_out / (d_out + d_in / 4)) // 32 * 32
        layer = BlockDenseLinear(d_in, d_out, rank, 4, dtype=random.dtype, device="cuda")
        for parameter in layer.parameters():
            parameter.data = random.values(*parameter.shape)
        layers.append(layer)
    return layers


FORMS: dict[str, Callable[..., list[Layer]]] = {
    "dense": dense, "low rank, pivot": low_rank, "sparse dictionary": sparse, "block dense": block_dense,
}  # fmt: skip


def stored_bytes(layers: Sequence[Layer]) -> float:
    return sum(
        layer.weight.numel() * layer.weight.element_size() if isinstance(layer, nn.Linear) else layer.storage_bits / 8
        for layer in layers
    )


def check(name: str, layers: Sequence[Layer], x: Tensor) -> None:
    """SystemExit naming the form whose result is further from float64 than its dtype explains."""
    for layer in layers:
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.to_dense()
        found, expected = layer(x), F.linear(x.double(), weight.double())
        error = float((found.double() - expected).norm() / expected.norm())
        if not error <= TOLERANCE[x.dtype]:
            raise SystemExit(f"{name}, {tuple(weight.shape)}, {len(x)} rows: relative error {error:.1e} in {x.dtype}")


def seconds(call: Callable[[], Any], rounds: int = 20) -> float:
    """Median by events, the first three calls not counted."""
    times = []
    for number in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def recorded(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph, after two calls that tune and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(), call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def time_group(copies: Sequence[Sequence[Layer]], x: Tensor) -> float:
    return seconds(recorded(lambda: [layer(x) for group in copies for layer in group]).replay) / len(copies)


def bandwidth() -> float:
    """Bytes a second of the fastest copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copied(size: int) -> float:
        return seconds(lambda: target[:size].copy_(source[:size]))

    return max(2 * size / copied(size) for size in (1 << 28, 1 << 30))


def layers_table(dtype: torch.dtype, rows: Sequence[int], ratio: float) -> None:
    rate = bandwidth()
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate / 1e9:.0f} GB/s"
    title = f"{device}; {dtype}, {ratio:.0%} removed"
    table = Table(
        "group", "rows", *(f"{name}" for name in FORMS), title=title, caption="µs (over dense; times the byte limit)"
    )
    totals: dict[tuple[str, int], list[float]] = {}
    for group, (d_in, d_outs) in GROUPS.items():
        random = Random(dtype)
        copies = {name: [build(random, d_in, d_outs, ratio) for _ in range(COPIES)] for name, build in FORMS.items()}
        for count in rows:
            x = random.values(count, d_in) * math.sqrt(d_in)
            cells, base = [], 0.0
            for name, built in copies.items():
                check(f"{name}, {group}", built[0], x)
                taken, limit = time_group(built, x), stored_bytes(built[0]) / rate
                total = totals.setdefault((name, count), [0.0, 0.0])
                totals[name, count] = [total[0] + taken, total[1] + limit]
                base = taken if name == "dense" else base
                cells.append(cell(taken, base, limit, count))
            table.add_row(group, str(count), *cells)
        del copies
        torch.cuda.empty_cache()
    for count in rows:
        base = totals["dense", count][0]
        table.add_row(
            "a block",
            str(count),
            *(cell(totals[name, count][0], base, totals[name, count][1], count) for name in FORMS),
        )
    console.print(table)


def cell(taken: float, base: float, limit: float, rows: int) -> str:
    times = f"; {taken / limit:.2f}" if rows < MANY_ROWS else ""
    return f"{taken * 1e6:.1f} ({base / taken:.2f}x{times})"


def fit_table(ratio: float) -> None:
    """Seconds of the dictionary solver on the GPU, and the share of the float32 product's rate that it reaches."""
    for d_in, d_out in ((2048, 2048), (4096, 4096), (4096, 14336)):
        random = Random(torch.float32)
        scale = torch.arange(1, d_in + 1, device="cuda").float().rsqrt()
        y = torch.linalg.qr(random.values(d_in, d_in))[0] @ (scale[:, None] * random.values(d_in, d_out))
        atoms, nonzeros = dictionary_sizes(d_in, d_out, ratio)
        torch.cuda.synchronize()
        start = time.perf_counter()
        learnt = learn_dictionary(y, atoms, nonzeros)
        torch.cuda.synchronize()
        tail = torch.linalg.svdvals(y).square()
        rank = rank_within(rank_costs(d_in, [d_out], True), (1 - ratio) * d_in * d_out)
        console.print(
            f"dictionary of {d_in} x {d_out}: {time.perf_counter() - start:.1f} s, error {learnt.history[-1]:.4f}; "
            f"pivoted SVD {float((tail[rank:].sum() / tail.sum()).sqrt()):.4f}"
        )


def swap(model: LlamaForCausalLM, build: Callable[..., list[Layer]], random: Random, ratio: float) -> None:
    for block in model.model.layers:
        attention, ffn = block.self_attn, block.mlp
        groups = (
            (attention, ["q_proj", "k_proj", "v_proj"]),
            (attention, ["o_proj"]),
            (ffn, ["gate_proj", "up_proj"]),
            (ffn, ["down_proj"]),
        )
        for parent, names in groups:
            linears = [getattr(parent, name) for name in names]
            built = build(random, linears[0].in_features, [linear.out_features for linear in linears], ratio)
            for name, layer in zip(names, built, strict=True):
                setattr(parent, name, layer)


@torch.no_grad()
def decode_rate(model: LlamaForCausalLM) -> float:
    """Tokens a second of one sequence: a step is a CUDA graph over a static cache of 256 places, half of them used."""
    cache = StaticCache(config=model.config, max_cache_len=256)
    prompt = torch.randint(0, model.config.vocab_size, (1, 128), device="cuda")
    model(prompt, past_key_values=cache, logits_to_keep=1)
    token, place = prompt[:, -1:].clone(), torch.tensor([[128]], device="cuda")
    mask = torch.zeros(1, 1, 1, 256, dtype=model.dtype, device="cuda").masked_fill_(
        torch.arange(256, device="cuda") > 128, float("-inf")
    )
    graph = recorded(
        lambda: model(token, position_ids=place, attention_mask=mask, past_key_values=cache, cache_position=place[0])
    )
    return 1 / seconds(graph.replay, 50)


def generate_table(dtype: torch.dtype, ratio: float) -> None:
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    rates = {}
    for name in ("dense", "low rank, pivot", "sparse dictionary"):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if name != "dense":
            swap(model, FORMS[name], Random(dtype), ratio)
        rates[name] = decode_rate(model)
        console.print(f"Llama-3.2-1B, {name}: {rates[name]:.0f} tokens/s, {rates[name] / rates['dense']:.2f}x dense")
        del model
        torch.cuda.empty_cache()


def round_trip(dtype: torch.dtype) -> None:
    """A small random model compressed on the GPU, saved and loaded there: the same logits bit for bit."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=512,
    )  # fmt: skip
    tokens = torch.randint(0, 512, (16, 128), generator=torch.Generator().manual_seed(0))
    for method in ("svd", "svd_llm", "kfac_svd", "fwsvd", "cospadi"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to("cuda").eval()
        start = time.perf_counter()
        llmcompress.compress(model, method=method, ratio=0.3, tokens=tokens)
        taken = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda", dtype=dtype).eval()
            for length in (1, 7, 128):
                x = tokens[:1, :length].cuda()
                same = torch.equal(model(x).logits, loaded(x).logits)
                if not same:
                    raise SystemExit(f"{method}, {dtype}: logits of {length} tokens differ after loading")
            loaded.generate(tokens[:1, :8].cuda(), max_new_tokens=8, do_sample=False, pad_token_id=0)
        console.print(
            f"{method}, {dtype}: compressed on the GPU in {taken:.1f} s, the same logits after loading, generates"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 16, 64, 256, 4096])
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--generate", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; kernels/tests check the kernels under Triton's interpreter")
    dtype = getattr(torch, options.dtype)
    with torch.no_grad():
        layers_table(dtype, options.rows, options.ratio)
    if options.fit:
        fit_table(options.ratio)
    if options.generate:
        round_trip(dtype)
        generate_table(dtype, options.ratio)


if __name__ == "__main__":
    main()

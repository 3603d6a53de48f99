"""Groups of layers are timed together, side by side with the dense modules of the same names."""

import copy

import pytest
import torch
from llmcompress_eval import speed_modules
from llmcompress_eval.speed_modules import copy_bandwidth, measure_modules, module_table

from llmcompress.checkpoint.install import install
from llmcompress.layers.low_rank import LowRankLinear
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def models():
    """Two blocks: q and k share a basis, down stands alone, the rest stays dense."""
    dense = tiny_model("llama", num_hidden_layers=2)
    compressed, layers = copy.deepcopy(dense), {}
    for name, module in dense.named_modules():
        if name.endswith(("q_proj", "k_proj", "down_proj")):
            A = torch.nn.Parameter(torch.randn(module.in_features, 4))
            owner = name.replace("k_proj", "q_proj")
            shared = {} if owner == name else {"A": owner}
            A = layers[owner].A if shared else A
            layers[name] = LowRankLinear.from_factors(A, torch.randn(4, module.out_features), shared=shared)
    order = {name: layers[name] for name in sorted(layers, key=lambda n: n.endswith("k_proj"))}
    install(compressed, order)
    return dense, compressed


def test_groups_and_limits(models):
    dense, compressed = models
    found = {(entry.group, entry.rows): entry for entry in measure_modules(dense, compressed, [1, 5], 1, bandwidth=1e9)}
    assert {group for group, _ in found} == {"q_proj|k_proj", "down_proj"}
    pair = found["q_proj|k_proj", 1]
    assert pair.blocks == 2
    q, k = (compressed.get_submodule(f"model.layers.0.self_attn.{name}_proj") for name in "qk")
    stored = 4 * (q.A.numel() + q.B.numel() + k.B.numel())
    assert pair.limit_seconds["compressed"] == pytest.approx(stored / 1e9)
    assert pair.limit_seconds["dense"] == pytest.approx(4 * q.d_in * (q.d_out + k.d_out) / 1e9)
    assert all(seconds > 0 for entry in found.values() for seconds in entry.seconds.values())


def test_the_slower_model_shows(models, monkeypatch):
    """A clock that counts calls of modules: what is timed is each model's own modules, once a block."""
    dense, compressed = models
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, model in (("dense", dense), ("compressed", compressed))
        for path, module in model.named_modules()
        if path.endswith(("q_proj", "k_proj", "down_proj"))
    ]
    monkeypatch.setattr(
        speed_modules.time, "perf_counter", lambda: calls.count("dense") + 10 * calls.count("compressed")
    )
    found = measure_modules(dense, compressed, [1], 3, bandwidth=1e9)
    for hook in hooks:
        hook.remove()
    assert {entry.group: entry.seconds for entry in found} == {
        "q_proj|k_proj": {"dense": 2, "compressed": 20},
        "down_proj": {"dense": 1, "compressed": 10},
    }


def test_bandwidth_is_that_of_a_copy():
    assert 1e8 < copy_bandwidth(size=1 << 20) < 1e12


def test_the_table_shows_both_and_their_ratio(models):
    rows = module_table(measure_modules(*models, [1, 600], 1, bandwidth=1e9))
    assert rows.row_count == 4

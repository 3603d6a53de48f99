"""layer_sharing: what matching recovers exactly, what is stored, what trains, and its worth on the real model."""

import copy
import itertools

import pytest
import torch
import transformers

import llmcompress
from llmcompress import InputError, Recipe
from llmcompress.analyze import analyze_model
from llmcompress.backends.merging.block_matching import BlockMatch, match_layers, permuted
from llmcompress.compressors.layer_sharing import LayerSharing, share
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.heads import Heads
from llmcompress.models.load import Location, load_model
from llmcompress.models.structure import analyse
from llmcompress.plan import make_plan
from tests.tiny import recipe, save_tiny, tiny_model, tiny_tokenizer, write_text

TOKENS = torch.arange(20, 52).reshape(2, 16)
ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
         "down_proj": "down"}  # fmt: skip


def outputs(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def loss_on(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()


def maps_of(layer):
    return {
        role: module.weight.detach() for name, module in layer.named_modules()
        for leaf, role in ROLES.items() if name.endswith(leaf)
    }  # fmt: skip


def random_maps(seed, d=12, ffn=10, heads=4, groups=2, d_head=3):
    rng = torch.Generator().manual_seed(seed)
    shapes = {"q": (heads * d_head, d), "k": (groups * d_head, d), "v": (groups * d_head, d), "o": (d, heads * d_head),
              "gate": (ffn, d), "up": (ffn, d), "down": (d, ffn)}  # fmt: skip
    maps = {role: torch.randn(shape, generator=rng, dtype=torch.float64) for role, shape in shapes.items()}
    return maps, Heads.plain(heads * d_head, groups * d_head, groups * d_head, heads * d_head, heads, groups)


def twins(model, seed=3):
    """Makes block 1 a reordered copy of block 0, norms its own. Returns the element that reorders."""
    first, second = model.model.layers[0], model.model.layers[1]
    config = model.config
    d_head = first.self_attn.head_dim
    q, k = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    heads = Heads.plain(q, k, k, q, config.num_attention_heads, config.num_key_value_heads)
    drawn = BlockMatch.random(config.intermediate_size, heads, torch.Generator().manual_seed(seed))
    for role, tensor in permuted(maps_of(first), drawn, heads).items():
        maps_of(second)[role].copy_(tensor)
    return drawn


# --- exact cases -----------------------------------------------------------------------------------------------------


def test_a_match_is_as_good_as_the_best_of_all_elements():
    """Attention of two groups of two queries and two value dimensions: every element tried."""
    for seed in range(4):
        a, heads = random_maps(seed, d=5, ffn=4, heads=4, groups=2, d_head=2)
        b, _ = random_maps(seed + 50, d=5, ffn=4, heads=4, groups=2, d_head=2)

        def inner(match, a=a, b=b, heads=heads):
            moved = permuted(b, match, heads)
            return sum(float((a[role] * moved[role]).sum()) for role in a)

        pairs = list(itertools.permutations(range(2)))
        best = max(
            inner(BlockMatch(torch.tensor(ffn), torch.tensor(g), torch.tensor(queries), torch.tensor(values)))
            for ffn in itertools.permutations(range(4)) for g in pairs
            for queries in itertools.product(pairs, repeat=2) for values in itertools.product(pairs, repeat=2)
        )  # fmt: skip
        found, gain = match_layers(a, b, heads)
        assert inner(found) == pytest.approx(best, abs=1e-9)
        assert gain == pytest.approx(best - inner(BlockMatch.identity(4, heads)), abs=1e-9)


def test_many_queries_are_ordered_by_their_own_products():
    """Six to a group are 720 orders: the assignment finds a planted one."""
    a, heads = random_maps(0, d=20, heads=12, groups=2, d_head=3)
    drawn = BlockMatch.random(10, heads, torch.Generator().manual_seed(1))
    found, _ = match_layers(a, permuted(a, drawn, heads), heads)
    back = permuted(permuted(a, drawn, heads), found, heads)
    assert all(torch.equal(back[role], a[role]) for role in a)


def test_one_match_after_another_is_their_product():
    a, heads = random_maps(0)
    first, second = (BlockMatch.random(10, heads, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    one_by_one = permuted(permuted(a, first, heads), second, heads)
    at_once = permuted(a, first.then(second), heads)
    assert all(torch.equal(one_by_one[role], at_once[role]) for role in a)
    assert first.then(first.inverse()).is_identity
    assert first.inverse().then(first).is_identity


def test_three_blocks_that_are_one_reordered_are_shared_without_loss():
    a, heads = random_maps(0)
    drawn = [BlockMatch.random(10, heads, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    mean, matches = share([a, *[permuted(a, match, heads) for match in drawn]], heads)
    assert matches[0].is_identity
    for role in a:
        torch.testing.assert_close(mean[role], a[role], rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_reordered_blocks_share_without_changing_the_function(architecture):
    model = tiny_model(architecture)
    twins(model)
    for layer in model.model.layers[:2]:
        for name, bias in layer.named_parameters():
            if name.endswith("bias") and "o_proj" in name:
                bias.data.normal_()
    before = outputs(model)
    naive = llmcompress.compress(
        copy.deepcopy(model), tokens=TOKENS, method="layer_sharing", targets=[r"layers\.[01]\."], match=False
    )
    llmcompress.compress(model, tokens=TOKENS, method="layer_sharing", targets=[r"layers\.[01]\."])
    if architecture != "llama":  # its random biases differ from block to block: they stay each block's own
        torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-4)
    assert float((outputs(naive) - before).abs().max()) > 0.1
    first, second = (layer.mlp.up_proj for layer in model.model.layers[:2])
    assert first.weight is second.weight
    assert model.model.layers[0].input_layernorm is not model.model.layers[1].input_layernorm


# --- storage, training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt")


@pytest.mark.parametrize("architecture", ["llama", "bert", "phi3", "gpt2"])
def test_a_shared_pair_is_stored_once_and_trains(architecture, tmp_path, text):
    folder = save_tiny(tmp_path / "model", architecture)
    targets = r"mlp" if architecture in ("phi3", "gpt2") else "."
    data = recipe(folder, text, tmp_path / "out", method="layer_sharing", targets=[rf"\.[01]\..*{targets}"])
    outcome = llmcompress.apply(Recipe.parse(data))
    assert outcome.metrics["size"]["targeted"]["removed"] == 0.5
    assert "share their matrices; cosine" in outcome.metrics["sites"][0]["notes"][0]
    loaded = load_model(Location(tmp_path / "out"))
    assert torch.isfinite(outputs(loaded)).all()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(load_model(Location(tmp_path / "again"))), outputs(loaded))

    if architecture != "bert":
        tokens = torch.randint(4, 120, (8, 16), generator=torch.Generator().manual_seed(0))
        before = loss_on(loaded, tokens)
        training = llmcompress.finetune_model(loaded, tokens, loss="ce", steps=8, lr=1e-2, batch=4, validation=0)
        assert training.trained_values == outcome.metrics["size"]["targeted"]["compressed"]
        assert loss_on(loaded, tokens) < 0.9 * before
        shared = [m for m in loaded.modules() if isinstance(m, StructuredLinear) and m.shared]
        assert shared
        assert all(
            m.weight is loaded.get_parameter(f"{m.shared['weight']}.weight") for m in shared if hasattr(m, "weight")
        )


def test_loss_aware_shares_the_pair_that_costs_least():
    """Four blocks, the last two one reordered: of two pairs the budget holds one dense, and that is the first."""
    model = tiny_model(num_hidden_layers=4)
    model.model.layers = model.model.layers[2:] + model.model.layers[:2]
    twins(model)
    model.model.layers = model.model.layers[2:] + model.model.layers[:2]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    tokens = torch.randint(4, 120, (8, 16), generator=torch.Generator().manual_seed(0))
    before = outputs(model)
    llmcompress.compress(model, tokens=tokens, method="layer_sharing", ratio=0.25, allocation="loss_aware")
    shared = {name.split(".")[2] for name, m in model.named_modules() if isinstance(m, StructuredLinear)}
    assert shared == {"2", "3"}
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-4)


def test_a_last_block_joins_those_before_it():
    sites = analyse(tiny_model(num_hidden_layers=5)).sites
    assert [sorted({s.block for s in unit}) for unit in LayerSharing().units(sites)] == [[0, 1], [2, 3, 4]]
    three = LayerSharing(LayerSharing.Options(layers=3)).units(sites)
    assert [sorted({s.block for s in unit}) for unit in three] == [[0, 1, 2, 3, 4]]


def test_the_analysis_finds_the_reordered_pair(tmp_path, text):
    model = tiny_model()
    twins(model)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def analyse_sites(*sites):
        return analyze_model(
            str(tmp_path / "model"), "weight_matching", {}, str(text), samples=2, length=8, sites=sites
        )

    found = analyse_sites("attention", "ffn")
    assert found.column("blocks") == ["0, 1", "1, 2"]
    assert found.rows[0][2:] == [pytest.approx(1), found.rows[0][3], pytest.approx(1)]
    assert max(abs(found.rows[0][1]), abs(found.rows[0][3])) < 0.5
    assert found.rows[1][1] < found.rows[1][2] < 0.9
    assert found.findings[0].startswith("blocks 0, 1 are most alike once aligned (cosine 1.000)")
    with pytest.raises(InputError, match="target ffn as a whole, down, up too"):
        analyse_sites("gate")
    with pytest.raises(InputError, match="weight_matching compares blocks: name two or more"):
        analyse_sites(r"layers\.1\.")


# --- bad input -------------------------------------------------------------------------------------------------------


def plan(architecture="llama", **step):
    model = tiny_model(architecture)
    return make_plan(analyse(model), Recipe.parse(recipe("m", "t", "o", method="layer_sharing", **step)).compress)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"targets": [r"layers\.1\."]}, r"layers\.1\.self_attn\.q_proj: no targeted neighbour of its layout"),
        ({"targets": ["gate", "down"]}, r"layers\.0\.mlp\.gate_proj: target ffn as a whole, up too, or use match: f"),
        ({"targets": ["q", "ffn"]}, r"q_proj: target attention as a whole, k, o, v too"),
        ({"ratio": 0.7}, "3 blocks that share keep .* values, more than the budget of .*; lower ratio, or more layers"),
        ({"architecture": "gpt2"}, r"c_attn: its heads cannot be aligned; target ffn, or use match: false"),
    ],
)
def test_what_cannot_be_shared_is_named(step, message):
    with pytest.raises(InputError, match=message):
        plan(**step)


def test_heads_that_a_norm_tells_apart_are_not_aligned():
    config = transformers.Olmo2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=120
    )
    sites = analyse(transformers.Olmo2ForCausalLM(config)).sites
    with pytest.raises(InputError, match=r"o_proj: its heads are not understood; target ffn, or use match: false"):
        LayerSharing().units(sites)


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_matching_beats_the_plain_mean_on_smollm2(smollm2, smollm2_tokenizer, wikitext):
    """Blocks 10 and 11, where the plain mean does much harm."""
    from llmcompress_eval.perplexity import perplexity, windows

    from llmcompress.calibration.text import tokenize

    stream = windows(tokenize(smollm2_tokenizer, [wikitext["test"]]), 512, 4, "test")
    found = {}
    for match in (True, False):
        model = copy.deepcopy(smollm2)
        llmcompress.compress(
            model, tokens=stream[:1], method="layer_sharing", targets=[r"layers\.1[01]\."], match=match
        )
        found[match] = perplexity(model, stream).perplexity
    dropped = copy.deepcopy(smollm2)
    del dropped.model.layers[11]
    for index, layer in enumerate(dropped.model.layers):
        layer.self_attn.layer_idx = index
    dropped.config.num_hidden_layers -= 1
    assert found[True] < 0.7 * found[False]
    assert found[True] < perplexity(dropped, stream).perplexity

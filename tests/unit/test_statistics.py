"""Calibration statistics, against float64 sums and explicit per-sequence gradients."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from llmcompress.calibration.collect import InputStatistics, accumulate_gram, capture_inputs
from llmcompress.calibration.fisher import FisherAccumulator, OutputStatistics, sample_labels, token_losses
from llmcompress.errors import InputError, RunError
from llmcompress.models.structure import analyse
from llmcompress.types import Site, Statistics
from tests.tiny import VOCABULARY, tiny_model

CPU = torch.device("cpu")
FORWARD = frozenset({"gram", "abs_sum"})


def sequences(count, length=12, seed=0):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def rows(n, d, seed=0, dtype=torch.float32):
    """Rows whose scales span three decades."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator) * torch.logspace(0, -3, d)).to(dtype)


def site(d_in, d_out=8, name="layer"):
    return Site(name, "other", 0, d_in, d_out, name)


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 7, 255, 256, 301, 1030])
def test_the_gram_is_the_float64_sum(d):
    """256 and more are computed in tiles."""
    total = torch.zeros(d, d, dtype=torch.float64)
    parts = [rows(40, d, seed) for seed in range(3)]
    for part in parts:
        accumulate_gram(total, part)
    X = torch.cat(parts).double()
    expected = X.T @ X
    scale = expected.diagonal().sqrt()
    assert ((total - expected).abs() / (scale[:, None] * scale)).max() < 1e-6
    assert ((total - total.T).abs() / (scale[:, None] * scale)).max() < 1e-6


def test_the_gram_of_float64_rows_keeps_their_precision():
    x = rows(50, 300, dtype=torch.float64)
    total = torch.zeros(300, 300, dtype=torch.float64)
    accumulate_gram(total, x)
    torch.testing.assert_close(total, x.T @ x, rtol=1e-13, atol=1e-15)


def test_many_batches_lose_nothing():
    """A float32 sum over so many batches would be off by 1e-4."""
    x = torch.full((1, 3), 0.1)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(20000):
        accumulate_gram(total, x)
    expected = 20000 * float(x[0, 0] * x[0, 0])
    torch.testing.assert_close(total, torch.full_like(total, expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_over_an_input(dtype):
    x = rows(30, 20, dtype=dtype)
    collected = InputStatistics([site(20)], FORWARD, CPU)
    collected.receive(site(20), x[:13])
    collected.receive(site(20), x[13:])
    found, X = collected.sums["layer"], x.double()
    assert found.tokens == 30
    assert found.cross is None
    torch.testing.assert_close(found.gram, X.T @ X, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.abs_sum, X.abs().sum(0), rtol=1e-6, atol=0)


def test_cross_pairs_the_compressed_rows_with_the_dense_ones():
    dense, own = rows(30, 20), rows(30, 20, seed=1)
    collected = InputStatistics([site(20)], frozenset({"gram", "cross"}), CPU)
    for part in (slice(0, 12), slice(12, 30)):
        collected.receive_dense(site(20), dense[part])
        collected.receive(site(20), own[part])
    found = collected.sums["layer"]
    torch.testing.assert_close(found.cross, own.double().T @ dense.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gram, own.double().T @ own.double(), rtol=1e-5, atol=1e-6)


def test_hooks_see_each_distinct_input_once():
    model = tiny_model("llama")
    sites = analyse(model).sites
    collected = InputStatistics(sites, FORWARD, CPU)
    assert set(collected.sums) == {found.input for found in sites}
    seen = {}
    hooks = [model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1).double())
    ) for name in collected.sums]  # fmt: skip
    with capture_inputs(model, sites, collected.receive), torch.no_grad():
        for batch in sequences(6).split(4):
            model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    for name, found in collected.sums.items():
        X = torch.cat(seen[name])
        assert found.tokens == len(X) == 72
        torch.testing.assert_close(found.gram, X.T @ X, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model(input_ids=sequences(1))
    assert all(found.tokens == 72 for found in collected.sums.values()), "the hooks are gone"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_is_named(value):
    x = rows(5, 4)
    x[2, 1] = value
    with pytest.raises(RunError, match=r"^layer: its input is not finite$"):
        InputStatistics([site(4)], FORWARD, CPU).receive(site(4), x)


# --- merging ---------------------------------------------------------------------------------------------------------


def random_statistics(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return Statistics(tokens=seed, sequences=2 * seed, backward_tokens=3 * seed, **sums)


def test_statistics_add_up():
    shapes = {"gram": (3, 3), "abs_sum": (3,), "cross": (3, 3), "row_fisher": (3,), "column_fisher": (2,),
              "output_gram": (2, 2)}  # fmt: skip
    assert set(shapes) == set(Statistics.SUMS)
    a, b = random_statistics(1, **shapes), random_statistics(5, **shapes)
    merged = a + b
    assert (merged.tokens, merged.sequences, merged.backward_tokens) == (6, 12, 18)
    for name in shapes:
        assert torch.equal(getattr(merged, name), getattr(a, name) + getattr(b, name))


def test_what_only_one_side_measured_is_kept():
    merged = random_statistics(1, gram=(3, 3)) + random_statistics(2, row_fisher=(3,))
    assert torch.equal(merged.gram, random_statistics(1, gram=(3, 3)).gram)
    assert torch.equal(merged.row_fisher, random_statistics(2, row_fisher=(3,)).row_fisher)
    assert merged.abs_sum is None
    with pytest.raises(InputError, match=r"statistics differ in shape: gram \(3, 3\) and \(2, 2\)"):
        random_statistics(1, gram=(3, 3)) + random_statistics(1, gram=(2, 2))


def test_two_shards_of_inputs_are_one_run():
    x = rows(60, 20)
    runs = [InputStatistics([site(20)], FORWARD, CPU) for _ in range(3)]
    runs[0].receive(site(20), x[:25])
    runs[1].receive(site(20), x[25:])
    for part in (x[:25], x[25:]):
        runs[2].receive(site(20), part)
    merged, whole = runs[0].sums["layer"] + runs[1].sums["layer"], runs[2].sums["layer"]
    assert merged.tokens == whole.tokens
    torch.testing.assert_close(merged.gram, whole.gram, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.abs_sum, whole.abs_sum, rtol=1e-14, atol=0)


def test_a_statistic_that_is_missing_or_not_finite_is_named():
    found = random_statistics(1, gram=(2, 2))
    assert found.require("gram", "x") is found.gram
    with pytest.raises(InputError, match=r"^x: this method needs the statistic 'abs_sum'"):
        found.require("abs_sum", "x")
    with pytest.raises(InputError, match=r"^x: the statistic 'gram' is not finite$"):
        dataclasses.replace(found, gram=found.gram / 0).require("gram", "x")


# --- losses ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_models_own():
    """transformers' loss is the mean over tokens of labels that it shifts itself."""
    model, tokens = tiny_model("llama"), sequences(1)
    labels = tokens.clone()
    labels[0, 4:7] = -100
    with torch.no_grad():
        output = model(input_ids=tokens, labels=labels)
    assert token_losses(output.logits, labels).item() / 8 == pytest.approx(output.loss.item(), rel=1e-6)


def test_losses_predict_the_next_token():
    """Closed form: logits that are certain of token t + 1 cost nothing; any other shift costs."""
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    certain = 50.0 * F.one_hot(tokens.roll(-1, 1), 6).float()
    assert token_losses(certain, tokens).item() < 1e-6
    for shift in (0, 2):
        assert token_losses(50.0 * F.one_hot(tokens.roll(-shift, 1), 6).float(), tokens).item() > 10


def test_sampled_labels_follow_the_model():
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1)).expand(20000, 2, 5)
    labels = sample_labels(logits, torch.Generator().manual_seed(0))
    assert labels.shape == (20000, 2)
    assert (labels[:, 0] == -100).all()
    expected = logits[0, 0].softmax(-1)
    share = torch.bincount(labels[:, 1], minlength=5) / 20000
    assert ((share - expected) / (expected * (1 - expected) / 20000).sqrt()).abs().max() < 5
    assert torch.equal(labels, sample_labels(logits, torch.Generator().manual_seed(0)))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=2, attn_implementation="eager")  # the one that vmap can batch


@pytest.fixture(scope="module")
def sites(model):
    return analyse(model).sites


def per_sequence_gradients(model, sites, tokens, labels=None):
    """(sequences, d_out, d_in) a site: gradients of each sequence's mean next-token loss, by torch.func."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    own = {f"{found.name}.weight": parameters[f"{found.name}.weight"] for found in sites}
    labels = tokens if labels is None else labels

    def loss(weights, row, row_labels):
        inputs = {"input_ids": row[None], "use_cache": False}
        output = torch.func.functional_call(model, {**parameters, **weights}, kwargs=inputs)
        losses = F.cross_entropy(output.logits[0, :-1], row_labels[1:], reduction="none", ignore_index=-100)
        return losses.sum() / (row_labels[1:] != -100).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(own, tokens, labels)
    return {name.removesuffix(".weight"): value.double() for name, value in gradients.items()}


def fisher(model, sites, *batches):
    accumulator = FisherAccumulator(model, sites)
    with accumulator:
        for batch in batches:
            accumulator.update(batch if isinstance(batch, dict) else {"input_ids": batch})
    return accumulator


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def assert_same(found, expected, tolerance):
    assert found.samples == expected.samples
    for name in expected.row_weights:
        assert relative(found.row_weights[name], expected.row_weights[name]) <= tolerance, name
        assert relative(found.column_weights[name], expected.column_weights[name]) <= tolerance, name


def test_fisher_weights_are_mean_squared_gradients_of_single_sequences(model, sites):
    tokens = sequences(5)
    expected = per_sequence_gradients(model, sites, tokens)
    found = fisher(model, sites, tokens[:3], tokens[3:])
    assert found.samples == 5
    for name, gradient in expected.items():
        assert relative(found.row_weights[name], gradient.square().mean(0).sum(0)) <= 1e-5, name
        assert relative(found.column_weights[name], gradient.square().mean(0).sum(1)) <= 1e-5, name


def test_gradients_are_those_of_the_next_token(model, sites):
    """Labels shifted by hand before a loss that shifts them itself train on the token after the next: hard to see in
    the weights, which correlate with the right ones, but far from them in size."""
    tokens = sequences(4)
    right = fisher(model, sites, tokens).row_weights
    by_hand = per_sequence_gradients(model, sites, tokens[:, :-1], tokens[:, 1:])
    for name in right:
        wrong = by_hand[name].square().mean(0).sum(0)
        assert relative(wrong, right[name]) > 0.1, name


def test_fisher_weights_do_not_depend_on_the_batch_size(model, sites):
    tokens = sequences(6)
    assert_same(fisher(model, sites, *tokens.split(1)), fisher(model, sites, tokens), 1e-5)
    assert_same(fisher(model, sites, *tokens.split(4)), fisher(model, sites, tokens), 1e-5)


def test_the_squared_gradient_of_the_batch_mean_is_another_thing(model, sites):
    tokens = sequences(4)
    found = fisher(model, sites, tokens).row_weights
    gradients = per_sequence_gradients(model, sites, tokens)
    ratios = [float(found[name].sum() / gradients[name].mean(0).square().sum()) for name in found]
    print(f"per sequence over batch mean: {min(ratios):.2f} to {max(ratios):.2f}")
    assert min(ratios) >= 2


def test_two_half_runs_merge_to_one(model, sites):
    tokens = sequences(6)
    halves = fisher(model, sites, tokens[:2]) + fisher(model, sites, tokens[2:])
    assert_same(halves, fisher(model, sites, tokens), 1e-6)
    resumed = fisher(model, sites, tokens[:2])
    with resumed:
        resumed.update({"input_ids": tokens[2:]})
    assert_same(resumed, halves, 1e-6)


def test_labels_that_do_not_count_leave_no_trace(model, sites):
    """Padded on the right and masked, a sequence has the gradients that it has alone."""
    short, full = sequences(1, 8), sequences(1, 12, seed=1)
    padded = torch.cat([F.pad(short, (0, 4)), full])
    labels = padded.masked_fill(padded == 0, -100)
    mask = (padded != 0).long()
    found = fisher(model, sites, {"input_ids": padded, "labels": labels, "attention_mask": mask})
    assert_same(found, fisher(model, sites, short, full), 1e-5)


def test_output_grams_are_sums_over_tokens(model, sites):
    """From gradients that autograd gives at the outputs themselves."""
    tokens = sequences(3)
    chosen = [found for found in sites if found.role in ("k", "down")]
    hooks = OutputStatistics(model, chosen, frozenset({"output_gram"}))
    outputs = {}
    handles = [model.get_submodule(found.name).register_forward_hook(
        lambda _, args, output, name=found.name: outputs.update({name: output})) for found in chosen]  # fmt: skip
    hooks.lengths = torch.full((3,), 11)
    loss = token_losses(model(input_ids=tokens).logits, tokens).sum()
    gradients = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
    loss.backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    hooks.close()
    for found, gradient in zip(chosen, gradients, strict=True):
        g = gradient.flatten(0, 1).double()
        sums = hooks.sums[found.name]
        assert relative(sums.output_gram / 2, g.T @ g) <= 1e-5, "both passes were counted"
        assert (sums.sequences, sums.backward_tokens) == (6, 66)


def test_a_model_is_left_as_it_was():
    model = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.3).train()
    sites = analyse(model).sites
    model.model.layers[0].eval()
    first, *others = model.parameters()
    first.requires_grad_(False)
    others[0].grad = torch.ones_like(others[0])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    def assert_untouched():
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == flags
        assert torch.equal(others[0].grad, torch.ones_like(others[0]))
        assert all(p.grad is None for p in [first, *others[1:]])
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    trained = fisher(model, sites, sequences(3))
    assert_untouched()
    assert_same(trained, fisher(model.eval(), sites, sequences(3)), 1e-6)  # no dropout, whatever the mode
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    with pytest.raises(InputError, match="a sequence has no label"):
        fisher(model, sites, {"input_ids": sequences(2), "labels": torch.full((2, 12), -100)})
    assert_untouched()
    with pytest.raises(InputError, match=r"^model\.layers\.9: the model has no such module$"):
        fisher(model, [*sites, site(32, name="model.layers.9")], sequences(1))
    assert_untouched()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_sequence_without_a_label(model, sites):
    tokens = sequences(2)
    labels = tokens.clone()
    labels[1] = -100
    labels[1, 0] = 5  # predicts nothing: no token comes before the first
    with pytest.raises(InputError, match=r"^a sequence has no label: every token is -100$"):
        fisher(model, sites, {"input_ids": tokens, "labels": labels})


def test_a_loss_that_is_not_finite():
    broken = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(RunError, match="the loss is not finite"):
        fisher(broken, analyse(broken).sites, sequences(2))


def test_a_gradient_that_is_not_finite_names_the_site(model, sites):
    hooks = OutputStatistics(model, sites[-1:], frozenset({"row_fisher"}))
    hooks.lengths = torch.ones(1)
    loss = model(input_ids=sequences(1)).logits.sum() * torch.inf
    with pytest.raises(RunError, match=r"^model\.layers\.1\.mlp\.down_proj: the gradient at its output is not finite"):
        loss.backward()
    hooks.close()
    model.zero_grad()


def test_a_site_without_gradient_has_weights_of_zero(model, sites):
    """As an expert that no token was sent to: the compressor asks before it takes that for equal weights."""
    unused = torch.nn.Linear(32, 8)
    model.add_module("unused", unused)
    try:
        found = fisher(model, [site(32, name="unused"), *sites], sequences(3))
    finally:
        del model.unused
    assert found.samples == 3
    assert not found.row_weights["unused"].any()
    assert not found.column_weights["unused"].any()
    assert_same(fisher(model, sites, sequences(3)), fisher(model, sites, sequences(3)), 0)
    assert found.row_weights[sites[0].name].any()


def test_weights_before_any_sequence(model, sites):
    with pytest.raises(InputError, match="no sequence was measured"):
        _ = FisherAccumulator(model, sites).row_weights
    failed = FisherAccumulator(model, sites)

    def feed():
        with failed:
            failed.update({"input_ids": sequences(2)})
            failed.update({"input_ids": sequences(1), "labels": torch.full((1, 12), -100)})

    with pytest.raises(InputError, match="no label"):
        feed()
    with pytest.raises(InputError, match="no sequence was measured"):
        _ = failed.column_weights

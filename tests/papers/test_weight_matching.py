"""Weight matching: exact cases, planted permutations, identities, and the paper's claims on trained networks.

Git Re-Basin (2209.04836), Ito et al. (2402.04051), REPAIR (2211.08403).
"""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from sklearn.datasets import load_digits
from torch import nn

from llmcompress.backends.merging.alignment import Alignment, aligned, folded, mean
from llmcompress.backends.merging.connectivity import barrier, l2_ratio, r_metric
from llmcompress.backends.merging.decoder_matching import match_decoder
from llmcompress.backends.merging.permutations import PermutationSpec, assign, chain_spec, cross, mlp_spec
from llmcompress.backends.merging.repair import repair, reset_batch_norm
from llmcompress.backends.merging.ste_matching import ste_matching
from llmcompress.backends.merging.weight_matching import activation_matching, merge, merge_many, weight_matching
from llmcompress.errors import InputError
from llmcompress.models.symmetry import RESIDUAL, find_groups
from tests.scramble import noisy, reading, scrambled, with_values
from tests.tiny import tiny_model


def generator(seed):
    return torch.Generator().manual_seed(seed)


def mlp(*widths):
    layers = [part for m, n in itertools.pairwise(widths) for part in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def call(model, state, x):
    return torch.func.functional_call(model, state, (x,))


def random_state(*widths, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mlp(*widths), state_of(mlp(*widths))


def inner(a, b):
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


# --- exact cases -----------------------------------------------------------------------------------------------------


def test_one_layer_is_matched_as_well_as_by_trying_all_permutations():
    spec = mlp_spec(1)
    (_, a), (_, b) = random_state(5, 6, 3, seed=1), random_state(5, 6, 3, seed=2)
    found = weight_matching(spec, a, b)
    best = max(inner(a, spec.apply(b, {"hidden0": torch.tensor(p)})) for p in itertools.permutations(range(6)))
    assert inner(a, spec.apply(b, found.permutation)) == pytest.approx(best, abs=1e-9)
    assert found.objective[-1] == pytest.approx(best, abs=1e-9)


def test_the_objective_never_falls_and_is_what_it_says():
    spec = mlp_spec(3)
    for seed in range(5):
        (_, a), (_, b) = random_state(8, 16, 16, 16, 4, seed=seed), random_state(8, 16, 16, 16, 4, seed=seed + 50)
        found = weight_matching(spec, a, b, seed=seed)
        assert len(found.objective) > 3
        assert min(y - x for x, y in itertools.pairwise(found.objective)) >= -1e-9
        assert found.objective[-1] == pytest.approx(inner(a, spec.apply(b, found.permutation)), abs=1e-9)
        again = weight_matching(spec, a, b, seed=seed, init=found.permutation)
        assert again.sweeps == 1, "it had stopped at a fixed point"


def test_a_random_element_keeps_the_function():
    model, state = random_state(20, 40, 40, 40, 10)
    spec = mlp_spec(3)
    x = torch.randn(32, 20)
    moved = spec.apply(state, spec.random(state, generator(3)))
    assert not torch.equal(moved["2.weight"], state["2.weight"])
    torch.testing.assert_close(call(model, moved, x), call(model, state, x), rtol=0, atol=1e-5)


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


def test_a_convnet_given_as_a_state_dict_is_unscrambled():
    model = convnet()
    model(torch.randn(64, 1, 8, 8))  # batch norms with statistics of their own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = state_of(model.eval())
    spec = chain_spec(state)
    moved = spec.apply(state, spec.random(state, generator(1)))
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(call(model, moved, x), call(model, state, x), rtol=0, atol=1e-5)
    back = spec.apply(moved, weight_matching(spec, state, moved).permutation)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_batch_norms_are_measured_again():
    model, data = convnet(), torch.randn(256, 1, 8, 8) * 3 + 1
    reset_batch_norm(model, [data])
    assert model[1].momentum == 0.1
    outputs = model[0](data)
    torch.testing.assert_close(model[1].running_mean, outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[1].running_var, outputs.var((0, 2, 3)), rtol=1e-3, atol=1e-4)


# --- planted permutations --------------------------------------------------------------------------------------------


def planted(noise, seed):
    """A model, its permuted copy with noise in units of each tensor's standard deviation, and what undoes it."""
    _, a = random_state(20, 40, 40, 40, 10, seed=seed)
    spec = mlp_spec(3)
    drawn = spec.random(a, generator(seed))
    b = spec.apply(a, drawn)
    rng = generator(seed + 100)
    b = {k: t + noise * t.std() * torch.randn(t.shape, generator=rng) for k, t in b.items()}
    return spec, a, b, {group: index.argsort() for group, index in drawn.items()}


def recovered(found, truth):
    return float(torch.cat([found[group] == truth[group] for group in truth]).double().mean())


@pytest.mark.parametrize("noise", [0, 0.25, 0.5])
def test_planted_permutations_are_recovered(noise):
    spec, a, b, truth = planted(noise, 0)
    assert recovered(weight_matching(spec, a, b).permutation, truth) == 1


def test_under_strong_noise_both_sides_and_many_sweeps_are_needed():
    full, incoming, once = [], [], []
    for seed in range(5):
        spec, a, b, truth = planted(1.5, seed)
        full.append(recovered(weight_matching(spec, a, b).permutation, truth))
        once.append(recovered(weight_matching(spec, a, b, max_iter=1).permutation, truth))
        incoming.append(recovered(layer_after_layer(spec, a, b), truth))
    assert np.mean(full) >= 0.99
    assert np.mean(incoming) <= 0.95
    assert np.mean(once) <= 0.6


def layer_after_layer(spec, a, b):
    """By each layer's incoming weights alone, the layer before it already matched."""
    found = spec.identity(a)
    for layer in range(3):
        name, group = f"{2 * layer}.weight", f"hidden{layer}"
        found[group] = assign(cross(a[name], spec.apply_to(name, b[name], found, without=group), 0))
    return found


# --- identities ------------------------------------------------------------------------------------------------------


def test_the_r_metric_is_the_double_sum_over_singular_vectors():
    a, b = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    (ua, _, va), (ub, _, vb) = (np.linalg.svd(m.numpy(), full_matrices=False) for m in (a, b))
    double = sum((ua[:, i] @ ub[:, j]) * (va[i] @ vb[j]) for i in range(5) for j in range(5)) / 5
    assert r_metric({"w": a}, {"w": b}, ["w"]) == pytest.approx(double, abs=1e-12)
    polar = lambda m: torch.linalg.svd(m, full_matrices=False)  # noqa: E731
    (pa, _, qa), (pb, _, qb) = polar(a), polar(b)
    assert r_metric({"w": a}, {"w": b}, ["w"]) == pytest.approx(float(((pa @ qa) * (pb @ qb)).sum()) / 5, abs=1e-12)
    for gamma in (0, 0.3, 0.5):
        assert r_metric({"w": a}, {"w": a}, ["w"], gamma) == pytest.approx(1, abs=1e-12)


def test_the_distance_follows_from_the_singular_vectors():
    a, b = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    (ua, sa, va), (ub, sb, vb) = (torch.linalg.svd(m, full_matrices=False) for m in (a, b))
    met = torch.einsum("i,j,ij,ij->", sa, sb, ua.T @ ub, va @ vb.T)
    expected = sa.square().sum() + sb.square().sum() - 2 * met
    assert float((a - b).square().sum()) == pytest.approx(float(expected), abs=1e-10)


def test_equal_models_merge_to_themselves():
    _, a = random_state(5, 6, 3)
    for lam in (0, 0.3, 0.5, 1):
        assert all(torch.equal(merge(a, a, lam)[name], a[name]) for name in a)
    half = {name: tensor.bfloat16() for name, tensor in a.items()}
    assert all(torch.equal(merge(half, half, 0.3)[name], half[name]) for name in a)


# --- digits: trained pairs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """x (n, 64) in [0, 1], y (n,): training and test part."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=generator(0))
    return (x[order[:1300]], y[order[:1300]]), (x[order[1300:]], y[order[1300:]])


@pytest.fixture(scope="module")
def standardised(digits):
    (x, y), (test_x, test_y) = digits
    mean, std = x.mean(0), x.std(0).clamp_min(0.1)
    return ((x - mean) / std, y), ((test_x - mean) / std, test_y)


def trained(data, widths, seed, weight_decay, epochs=40, lr=1e-3, batch=128):
    (x, y), _ = data
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mlp(64, *widths, 10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    return model.eval()


def evaluate(model, state, data):
    """Test loss and accuracy of a state."""
    _, (x, y) = data
    with torch.no_grad():
        logits = call(model, state, x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


WIDE = (256, 256, 256)
WEIGHTS = ["0.weight", "2.weight", "4.weight", "6.weight"]


@pytest.fixture(scope="module")
def models(standardised):
    return [trained(standardised, WIDE, seed, 1e-3, lr=4e-4, batch=256) for seed in range(4)]


@pytest.fixture(scope="module")
def loss(standardised, models):
    return lambda state: evaluate(models[0], state, standardised)[0]


def in_pairs(models):
    return zip(models, [*models[1:], models[0]], strict=True)


def activations(model, x):
    found = {}
    for layer in range(3):
        x = model[2 * layer + 1](model[2 * layer](x))
        found[f"hidden{layer}"] = x.detach()
    return found


def test_matched_digits_models_are_connected_though_their_distance_hardly_falls(standardised, models, loss):
    spec = mlp_spec(3)
    (x, _), _ = standardised
    unmatched = []
    for first, second in in_pairs(models):
        a, b = state_of(first), state_of(second)
        naive = barrier(a, b, loss).height
        weights = spec.apply(b, weight_matching(spec, a, b).permutation)
        active = spec.apply(b, activation_matching(activations(first, x), activations(second, x)))
        for matched in (weights, active):
            assert barrier(a, matched, loss).height <= 0.15 * naive
            assert l2_ratio(a, b, matched) >= 0.75
        r = [r_metric(a, weights, WEIGHTS, gamma) for gamma in (0, 0.3, 0.5)]
        assert r[1] >= 0.15
        assert r[2] > r[1] > r[0]
        unmatched.append(r_metric(a, b, WEIGHTS, 0.3))
    # one pair lies by chance between 0.005 and 0.015, as it does in any random order: the direction that all neurons
    # of two layers have in common, and inputs and classes, stay where they are
    assert abs(np.mean(unmatched)) <= 0.01


@pytest.mark.slow
def test_the_straight_through_search_lowers_the_barrier_without_aligning_singular_vectors(standardised, models, loss):
    spec = mlp_spec(3)
    (x, y), _ = standardised
    a, b, c = (state_of(model) for model in models[:3])

    def batch_loss(state, step):
        rows = torch.randperm(len(x), generator=generator(step))[:256]
        return F.cross_entropy(call(models[0], state, x[rows]), y[rows])

    def search(target, model):
        return spec.apply(model, ste_matching(spec, target, model, batch_loss, random_state(64, *WIDE, 10, seed=99)[1]))

    def match(target, model):
        return spec.apply(model, weight_matching(spec, target, model).permutation)

    found, matched = search(a, b), match(a, b)
    naive = barrier(a, b, loss).height
    assert barrier(a, found, loss).height <= 0.25 * naive
    assert r_metric(a, found, WEIGHTS, 0.3) <= 0.6 * r_metric(a, matched, WEIGHTS, 0.3)
    between = barrier(matched, match(a, c), loss).height, barrier(found, search(a, c), loss).height
    print(f"barrier of two models matched to a third: {between[0]:.3f} by weights, {between[1]:.3f} by the search")
    assert max(between) < naive


def test_many_models_merge_better_to_their_mean_than_to_an_anchor(standardised, models):
    spec = mlp_spec(3)
    for triple in itertools.combinations(models, 3):
        states = [state_of(model) for model in triple]
        found = merge_many(spec, states)
        merged_loss, accuracy = evaluate(models[0], found.state, standardised)
        anchored = [states[0], *[spec.apply(s, weight_matching(spec, states[0], s).permutation) for s in states[1:]]]
        to_anchor = {name: torch.stack([s[name] for s in anchored]).mean(0) for name in states[0]}
        assert accuracy >= 0.95
        assert merged_loss < evaluate(models[0], to_anchor, standardised)[0]
        assert all(y <= x * (1 + 1e-12) for x, y in itertools.pairwise(found.scatter))
        moved = [spec.apply(s, p) for s, p in zip(states, found.permutations, strict=True)]
        expected = torch.stack([s["2.weight"].double() for s in moved]).mean(0).float()
        torch.testing.assert_close(found.state["2.weight"], expected)


def test_repair_restores_statistics_and_lowers_the_half_barrier(digits):
    """Deep and narrow, where matching alone leaves a barrier."""
    widths, spec = (64,) * 5, mlp_spec(5)
    (x, _), _ = digits
    nets = [trained(digits, widths, seed, 0) for seed in range(4)]
    layers = [str(2 * i) for i in range(6)]
    for first, second in in_pairs(nets):
        a, b = state_of(first), state_of(second)
        matched, middle = copy.deepcopy(second), copy.deepcopy(first)
        matched.load_state_dict(spec.apply(b, weight_matching(spec, a, b).permutation))
        middle.load_state_dict(merge(a, matched.state_dict()))
        repaired = repair(middle, first, matched, layers, [x[:650], x[650:]])
        line = (evaluate(first, a, digits)[0] + evaluate(first, b, digits)[0]) / 2
        (before, accuracy), (after, better) = (evaluate(first, state_of(m), digits) for m in (middle, repaired))
        assert after - line <= 0.6 * (before - line)
        assert better - accuracy >= 0.07
        with torch.no_grad():
            wanted = [net[2](net[1](net[0](x))) for net in (first, matched)]
            found = repaired[2](repaired[1](repaired[0](x)))
        torch.testing.assert_close(found.mean(0), (wanted[0].mean(0) + wanted[1].mean(0)) / 2, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.std(0), (wanted[0].std(0) + wanted[1].std(0)) / 2, rtol=0, atol=1e-4)


# --- decoders --------------------------------------------------------------------------------------------------------


WINDOW = 64


@pytest.mark.slow
def test_unrelated_tiny_llamas_come_closer_and_stay_apart(wikitext):
    """Byte-level, trained from different initialisations: the barrier falls, and is far from zero."""
    text = torch.tensor(list(wikitext["valid"].encode()))
    held_out = torch.tensor(list(wikitext["test"].encode()[: 256 * WINDOW])).view(-1, WINDOW)
    nets = [tiny_llama(text, seed) for seed in range(3)]
    groups = find_groups(nets[0])

    def loss(state):
        with torch.no_grad():
            logits = torch.func.functional_call(nets[0], dict(state), kwargs={"input_ids": held_out}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()).item()

    def values(read):
        return {name: read(name) for name in groups.axes}

    for first, second in in_pairs(nets):
        a, b = (values(reading(net)) for net in (first, second))
        naive = barrier(a, b, loss).height
        heights, ratios = {}, {}
        for kind, (signed, orthogonal) in {
            "plain": (False, False),
            "signed": (True, False),
            "rotated": (False, True),
        }.items():
            bases = [folded(reading(net), groups) if orthogonal else reading(net) for net in (first, second)]
            found = match_decoder(groups, *bases, signed=signed, orthogonal=orthogonal)
            matched = values(aligned(bases[1], groups, found.alignment))
            assert abs(loss(matched) - loss(b)) <= 1e-5
            heights[kind] = barrier(values(bases[0]), matched, loss).height / naive
            ratios[kind] = l2_ratio(values(bases[0]), values(bases[1]), matched)
        print(
            {key: round(value, 3) for key, value in heights.items()}, {k: round(v, 3) for k, v in ratios.items()}, naive
        )
        assert heights["plain"] <= 0.9
        assert heights["signed"] <= 0.8
        assert heights["rotated"] <= 0.65
        assert ratios["signed"] <= ratios["plain"] - 0.01
        assert ratios["rotated"] <= 0.7


def tiny_llama(text, seed):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=WINDOW, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(300):
            starts = torch.randint(len(text) - WINDOW, (16,))
            rows = torch.stack([text[start : start + WINDOW] for start in starts])
            optimizer.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
    return model.eval()


def test_under_strong_noise_the_ends_lead_the_search():
    """Five times the weights' spread. From a random order of blocks, all products together come first."""
    model = tiny_model()
    moved, drawn = scrambled(model)
    groups = find_groups(model)
    elsewhere = Alignment.random(groups, generator(9), signed=True)
    found = {"ends": [], "all": []}
    for seed in range(4):
        add = noisy(5, seed)
        shaken = with_values(moved, groups, lambda name, add=add: add(reading(moved)(name)))
        for kind, init in (("ends", None), ("all", elsewhere)):
            matched = match_decoder(groups, reading(model), reading(shaken), init=init)
            assert min(matched.gains) > 0
            index = matched.alignment.index
            found[kind].append(recovered(index, {group: places.argsort() for group, places in drawn.index.items()}))
    assert np.mean(found["ends"]) >= 0.6
    assert np.mean(found["all"]) <= 0.5


def test_ends_that_tell_nothing_do_not_move_blocks_that_agree():
    """Embedding and head drawn anew, as for another vocabulary of the same size."""
    model = tiny_model()
    groups = find_groups(model)

    def drawn(name):
        tensor, inside = reading(model)(name), name.startswith("model.layers.")
        return tensor if inside else torch.randn(tensor.shape, generator=generator(5)) * tensor.std()

    found = match_decoder(groups, reading(model), drawn)
    assert found.alignment.is_identity
    assert found.gains == []


def first_blocks(model, count):
    """The real model without its later blocks."""
    short = copy.deepcopy(model)
    short.model.layers = short.model.layers[:count]
    short.config.num_hidden_layers = count
    return short


def undone(model, moved, signed=True):
    groups = find_groups(model)
    found = match_decoder(groups, reading(model), reading(moved), signed=signed)
    return groups, found, aligned(reading(moved), groups, found.alignment)


def test_scrambled_blocks_of_smollm2_come_back_exactly(smollm2):
    model = first_blocks(smollm2, 3)
    moved, _ = scrambled(model)
    tokens = torch.arange(100, 116)[None]
    with torch.no_grad():
        torch.testing.assert_close(moved(tokens).logits, model(tokens).logits, rtol=0, atol=1e-3)
    groups, found, back = undone(model, moved)
    assert all(torch.equal(back(name), reading(model)(name)) for name in groups.axes)
    assert found.sweeps == 2


@pytest.mark.slow
def test_the_scrambled_smollm2_comes_back_exactly(smollm2):
    moved, _ = scrambled(smollm2)
    tokens = torch.arange(100, 164)[None]
    with torch.no_grad():
        torch.testing.assert_close(moved(tokens).logits, smollm2(tokens).logits, rtol=0, atol=1e-3)
    groups, _, back = undone(smollm2, moved)
    assert all(torch.equal(back(name), reading(smollm2)(name)) for name in groups.axes)
    merged = with_values(smollm2, groups, mean([reading(smollm2), back], [0.5, 0.5]))
    with torch.no_grad():
        assert torch.equal(merged(tokens).logits, smollm2(tokens).logits), "so any perplexity is equal"


@pytest.mark.slow
def test_a_signed_scramble_of_smollm2_is_found_under_noise_and_only_by_a_signed_search(smollm2):
    moved, drawn = scrambled(smollm2)
    groups = find_groups(smollm2)
    add = noisy(0.02, 3)
    shaken = with_values(moved, groups, lambda name: add(reading(moved)(name)))
    truth = {group: places.argsort() for group, places in drawn.index.items()}
    sign = drawn.sign[truth[RESIDUAL]]
    for signed in (True, False):
        _, found, _ = undone(smollm2, shaken, signed)
        index = found.alignment.index
        coordinates = (index[RESIDUAL] == truth[RESIDUAL]) & (found.alignment.sign == sign)
        if signed:
            assert recovered(index, truth) == 1
            assert coordinates.all()
        else:
            assert coordinates.double().mean() < 0.6, "in their places, half of them with the wrong sign"


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_states_name_the_first_tensor():
    spec = mlp_spec(1)
    _, a = random_state(5, 6, 3)
    with pytest.raises(InputError, match=r"0\.weight: shape \(6, 5\) in model 1, \(7, 5\) in model 2"):
        weight_matching(spec, a, random_state(5, 7, 3)[1])
    with pytest.raises(InputError, match=r"2\.bias: only in model 1 of 1 and 2"):
        weight_matching(spec, a, {k: t for k, t in a.items() if k != "2.bias"})
    with pytest.raises(InputError, match=r"0\.bias: not finite in model 2"):
        weight_matching(spec, a, {**a, "0.bias": a["0.bias"] * torch.nan})
    with pytest.raises(InputError, match=r"2\.weight: axis 1 of group 'hidden0' is 6 long, 0\.weight's 5"):
        weight_matching(PermutationSpec({**spec.axes, "0.weight": (None, "hidden0"), "0.bias": (None,)}), a, a)
    with pytest.raises(InputError, match=r"2\.bias: in the model, but not in the specification"):
        PermutationSpec({k: g for k, g in spec.axes.items() if k != "2.bias"}).sizes(a)
    with pytest.raises(InputError, match=r"4\.weight: in the specification, but not in the model"):
        mlp_spec(2).sizes(a)
    with pytest.raises(InputError, match=r"w: one group stands on two of its axes"):
        PermutationSpec({"w": ("d", "d")})
    with pytest.raises(InputError, match=r"2\.weight: reads 5 channels, the weight before it makes 6"):
        chain_spec({"0.weight": torch.ones(6, 5), "2.weight": torch.ones(3, 5)})


def test_bad_permutations_shares_and_counts():
    spec = mlp_spec(1)
    _, a = random_state(5, 6, 3)
    for index in (torch.zeros(6, dtype=torch.long), torch.arange(5)):
        with pytest.raises(InputError, match="group 'hidden0': not a permutation of its 6 places"):
            spec.apply(a, {"hidden0": index})
    for lam in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"lam must be in \[0, 1\]"):
            merge(a, a, lam)
    with pytest.raises(InputError, match="at least 2 models; got 1"):
        merge_many(spec, [a])
    with pytest.raises(InputError, match=r"gamma must be in \[0, 1\]"):
        r_metric(a, a, ["0.weight"], 2)
    with pytest.raises(InputError, match="at least 3 points"):
        barrier(a, a, lambda _: 0.0, 2)
    with pytest.raises(InputError, match=r"0: REPAIR rescales linear maps and convolutions with biases"):
        repair(*[nn.Sequential(nn.Linear(3, 2, bias=False))] * 3, ["0"], [torch.ones(2, 3)])

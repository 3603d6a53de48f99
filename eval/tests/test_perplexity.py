"""Perplexity against a Llama written down in numpy, float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from llmcompress_eval.perplexity import Windows, check_length, perplexity, windows
from llmcompress_eval.text import evaluation_windows, token_bytes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmcompress.errors import InputError, RunError
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=2)


def tokens(count, length=24, seed=0):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def numpy_llama(model, row):
    """Logits (length, vocabulary) of one sequence, float64: RMSNorm, rotary grouped-query attention, SwiGLU."""
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    heads, groups, d, n = 4, 2, 8, len(row)
    angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(np.hstack((angles, angles))), np.sin(np.hstack((angles, angles)))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.rms_norm_eps) * w[name]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def rotary(x):
        return x * cos + np.concatenate((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin

    x = w["model.embed_tokens.weight"][row]
    for layer in range(2):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (linear(h, f"{at}self_attn.{p}_proj").reshape(n, -1, d).transpose(1, 0, 2) for p in "qkv")
        k, v = (np.repeat(part, heads // groups, axis=0) for part in (rotary(k), v))
        scores = rotary(q) @ k.transpose(0, 2, 1) / np.sqrt(d) + np.triu(np.full((n, n), -np.inf), 1)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        x = x + linear((attention @ v).transpose(1, 0, 2).reshape(n, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = linear(h, at + "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def numpy_means(model, rows):
    """Mean negative log-likelihood of each window."""
    means = []
    for row in rows.numpy():
        logits = numpy_llama(model, row)[:-1]
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        means.append(-logits[np.arange(len(row) - 1), row[1:]].mean())
    return np.array(means)


def test_perplexity_is_that_of_a_llama_in_numpy(model):
    rows = tokens(5)
    found, means = perplexity(model, rows), numpy_means(model, rows)
    assert found.nll == pytest.approx(means.mean(), rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(means.mean()), rel=1e-5)
    assert found.standard_error == pytest.approx(means.std(ddof=1) / np.sqrt(5), rel=1e-4)
    assert (found.windows, found.tokens) == (5, 5 * 23)
    print(f"perplexity {found.perplexity:.3f} of {VOCABULARY} tokens")
    assert found.perplexity > 1.2 * VOCABULARY, "a random model is worse than guessing: a wrong shift would not show"


def test_a_model_that_has_learnt_a_text_predicts_it():
    """Far below the vocabulary only if position t is compared with token t + 1."""
    model, rows = tiny_model("llama", num_hidden_layers=2), tokens(1, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert perplexity(model, rows).perplexity < 1.5


@pytest.mark.parametrize("batch", [2, 3, 5, 64])
def test_the_batch_size_does_not_matter(model, batch):
    one, many = perplexity(model, tokens(5)), perplexity(model, tokens(5), batch)
    for name, value in dataclasses.asdict(one).items():
        assert getattr(many, name) == (value and pytest.approx(value, rel=1e-6)), name


def test_one_window_has_no_spread(model):
    assert perplexity(model, tokens(1)).standard_error == 0


def test_narrow_models_are_measured_in_float32():
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=2)
    exact = numpy_means(model, tokens(4)).mean()
    assert perplexity(model, tokens(4)).nll == pytest.approx(exact, rel=0.01)


def test_dropout_is_off_meanwhile():
    model = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5)
    quiet = perplexity(model, tokens(2))
    assert perplexity(model.train(), tokens(2)) == quiet
    assert all(module.training for module in model.modules())


def test_progress_is_told_of_each_window(model):
    told = []
    perplexity(model, tokens(3), 2, told.append)
    assert told == [f"window {index} of 3" for index in (1, 2, 3)]


def test_an_astronomic_loss_is_infinite_perplexity():
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    found = perplexity(model, tokens(2))
    assert found.nll > 1e5
    assert math.isinf(found.perplexity)


# --- windows ---------------------------------------------------------------------------------------------------------


def test_windows_do_not_overlap():
    stream = torch.arange(23)
    assert windows(stream, 5, 3, "x").tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert windows(stream, 5, None, "x").shape == (4, 5)
    assert windows(stream, 5, 99, "x").shape == (4, 5)
    with pytest.raises(InputError, match=r"^x: 23 tokens, fewer than one window of 24$"):
        windows(stream, 24, 1, "x")
    assert windows(stream, 5, 3, "x", 2).tolist() == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8]]
    for stride in (0, 6):
        with pytest.raises(InputError, match=f"^stride: {stride}; expected 1 to 5, the window's length$"):
            windows(stream, 5, 3, "x", stride)


@pytest.mark.parametrize("stride", [1, 7, 23, 24])
def test_strided_windows_predict_each_token_once_with_what_stands_before(model, stride):
    """The reference predicts tokens one by one from the numpy model's logits of their own window."""
    stream = tokens(1, 60)[0]
    found = perplexity(model, Windows(windows(stream, 24, None, "x", stride), stride))
    losses, sums, seen = [], [], 0
    for start in range(0, 60 - 24 + 1, stride):
        row = stream[start : start + 24].numpy()
        logits = numpy_llama(model, row)
        own = [t for t in range(1, 24) if start + t > seen or stride == 24]
        new = [np.log(np.exp(logits[t - 1]).sum()) - logits[t - 1, row[t]] for t in own]
        seen, losses, sums = start + 23, losses + new, [*sums, (sum(new), len(new))]
    assert found.tokens == len(losses)
    assert found.nll == pytest.approx(np.mean(losses), rel=1e-6)
    residuals = np.array([total - np.mean(losses) * count for total, count in sums])
    n = len(sums)
    assert found.standard_error == pytest.approx(np.sqrt((residuals**2).sum() * n / (n - 1)) / len(losses), rel=1e-4)


def test_a_longer_context_predicts_better():
    """Of a text that the model knows: with overlap every token has at least 16 before it."""
    model, row = tiny_model("llama", num_hidden_layers=2), tokens(1, 32)[0].repeat(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(input_ids=row[None, :64], labels=row[None, :64]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    apart, overlapping = (perplexity(model, Windows(windows(row, 24, None, "x", s), s)) for s in (24, 8))
    assert overlapping.nll < apart.nll


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_token_are_those_of_its_text():
    """One token a character here; é is unknown to the tokenizer and still has its two bytes."""
    sizes = token_bytes(tiny_tokenizer(), ["aé b", "c"])
    assert sizes.tolist() == [1, 2, 1, 1, 0, 1]


def test_bytes_of_a_byte_level_tokenizer_sum_to_the_text():
    """Also where one character takes several tokens, as 🙂 does."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    text = "Größe: 🙂 naïve\n\n  x = 1"
    sizes = token_bytes(tokenizer, [text])
    assert int(sizes.sum()) == len(text.encode())
    assert len(sizes) == len(text.encode()), "one token a byte"


def test_bits_per_byte(model, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("aé bcd" * 20)
    found = evaluation_windows(tiny_tokenizer(), [str(path)], 24, 3, "text", 12)[str(path)]
    figures = perplexity(model, found)
    covered = ("aé bcd" * 20)[1:48]  # 24 tokens and twice 12; the first is not predicted
    assert (figures.tokens, figures.bytes) == (47, len(covered.encode()))
    assert figures.bits_per_byte == pytest.approx(figures.nll * 47 / len(covered.encode()) / math.log(2))
    assert figures.byte_perplexity == pytest.approx(2**figures.bits_per_byte)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_logits_that_are_not_finite_name_the_window(model):
    broken = tiny_model("llama", num_hidden_layers=2)
    rows = tokens(4)
    rows[2, 7] = 2  # no other window holds this token
    with torch.no_grad():
        broken.model.embed_tokens.weight[2] = torch.nan
    for batch in (1, 3):
        with pytest.raises(RunError, match=r"^window 2: the logits are not finite$"):
            perplexity(broken, rows, batch)


def test_an_encoder_has_no_perplexity():
    with pytest.raises(InputError, match="BertForMaskedLM is no causal language model"):
        perplexity(tiny_model("bert"), tokens(1))


def test_windows_longer_than_the_context(model):
    assert perplexity(model, tokens(1, 64)).tokens == 63
    with pytest.raises(InputError, match="a window of 65 tokens exceeds the model's context of 64"):
        perplexity(model, tokens(1, 65))
    with pytest.raises(InputError, match="a window of 1 token predicts nothing"):
        check_length(model, 1)


def test_tokens_of_another_tokenizer(model):
    rows = tokens(2)
    rows[1, 3] = VOCABULARY
    with pytest.raises(InputError, match=f"the tokenizer gives token {VOCABULARY}, the model knows {VOCABULARY}"):
        perplexity(model, rows)

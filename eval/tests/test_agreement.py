"""KL divergence and top-1 agreement against a Llama written down in numpy, float64."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from llmcompress_eval.agreement import agreement
from llmcompress_eval.perplexity import Windows, perplexity, windows

from llmcompress.errors import RunError
from tests.tiny import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def models():
    """A model, and one whose weights were moved a little: most of the likeliest tokens stay."""
    dense = tiny_model("llama", num_hidden_layers=2)
    moved = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return dense, moved


def tokens(count, length=24):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def log_probabilities(model, rows):
    with torch.no_grad():
        logits = model.double()(input_ids=rows).logits.numpy()
    model.float()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_both_figures_are_those_of_the_definition(models):
    rows = tokens(5)
    p, q = (log_probabilities(copy.deepcopy(model), rows)[:, :-1] for model in models)
    kl, same = (np.exp(p) * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)
    *_, found = agreement(*models, rows)
    assert found.tokens == kl.size
    assert found.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert found.top1 == same.mean()
    assert 0.5 < found.top1 < 1
    assert found.kl_standard_error == pytest.approx(kl.mean(1).std(ddof=1) / np.sqrt(5), rel=1e-3)
    assert found.top1_standard_error == pytest.approx(same.mean(1).std(ddof=1) / np.sqrt(5))
    *_, back = agreement(*reversed(models), rows)
    assert abs(back.kl - found.kl) > 3e-4 * found.kl, "the divergence is not symmetric: the dense model comes first"


def test_the_perplexities_are_those_of_each_model_alone(models):
    strided = Windows(windows(tokens(1, 60)[0], 24, None, "x", 7), 7)
    first, second, found = agreement(*models, strided, batch=2)
    assert first == perplexity(models[0], strided, 2)
    assert second == perplexity(models[1], strided, 2)
    assert found.tokens == first.tokens


def test_a_model_agrees_with_itself(models):
    *_, found = agreement(models[0], models[0], tokens(3))
    assert dataclasses.astuple(found) == (0, 0, 1, 0, 3 * 23)


@pytest.mark.parametrize("batch", [2, 5])
def test_the_batch_size_does_not_matter(models, batch):
    *_, one = agreement(*models, tokens(5))
    *_, many = agreement(*models, tokens(5), batch)
    assert dataclasses.astuple(many) == pytest.approx(dataclasses.astuple(one), rel=1e-5)


def test_logits_that_are_not_finite_name_the_window(models):
    broken, rows = copy.deepcopy(models[1]), tokens(4)
    rows[2, 7] = 2
    with torch.no_grad():
        broken.model.embed_tokens.weight[2] = torch.nan
    with pytest.raises(RunError, match=r"^window 2: the logits are not finite$"):
        agreement(models[0], broken, rows, 3)

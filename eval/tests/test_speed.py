"""Tokens per second: what is run is generation with a cache, and what is counted is the median of the later rounds."""

import time

import pytest
import torch
from llmcompress_eval.speed import measure
from torch import nn

from tests.tiny import tiny_model

PROMPT = torch.arange(3, 19)[None]


class Slow(nn.Module):
    """A model that takes a given time a call, in the order of its calls."""

    def __init__(self, seconds):
        super().__init__()
        self.inner, self.seconds, self.calls = tiny_model("llama", num_hidden_layers=1), seconds, []

    def forward(self, input_ids, **options):
        self.calls.append(input_ids)
        time.sleep(self.seconds(len(self.calls)))
        return self.inner(input_ids=input_ids, **options)


def test_decoding_is_greedy_generation_with_a_cache():
    """Each call after the prompt reads one token: the likeliest one, as the whole prefix without a cache gives it."""
    model = Slow(lambda call: 0)
    measure({"model": model}, PROMPT, new_tokens=6, rounds=1)
    first_round = model.calls[:7]
    assert torch.equal(first_round[0], PROMPT)
    assert all(call.shape == (1, 1) for call in first_round[1:])
    expected = PROMPT
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model.inner(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(first_round, 1), expected)


@pytest.mark.parametrize("rounds", [1, 3])
def test_speed_is_tokens_over_the_time_of_a_call(rounds):
    """A call takes 20 ms and more: 16 tokens of the prompt, then one a call."""
    speed = measure({"slow": Slow(lambda call: 0.02)}, PROMPT, new_tokens=3, rounds=rounds)["slow"]
    assert 16 / 1.0 < speed.prefill <= 16 / 0.02
    assert 1 / 1.0 < speed.decode <= 1 / 0.02


def test_the_first_round_does_not_count():
    """Here it is the fast one, so that its share in a median would show."""
    speed = measure({"slow": Slow(lambda call: 0.2 if call > 3 else 0.0)}, PROMPT, new_tokens=2, rounds=1)["slow"]
    assert speed.prefill <= 16 / 0.2
    assert speed.decode <= 1 / 0.2


def test_models_take_turns_and_are_told_apart():
    order = []

    def turn(name, seconds):
        def wait(call):
            order.append(name)
            return seconds

        return wait

    found = measure({"a": Slow(turn("a", 0.0)), "b": Slow(turn("b", 0.1))}, PROMPT, new_tokens=1, rounds=2)
    assert "".join(order) == 3 * "aabb"
    assert found["a"].prefill > found["b"].prefill
    assert found["a"].decode > found["b"].decode


def test_an_outlier_does_not_move_the_median():
    speed = measure({"slow": Slow(lambda call: 1.0 if call == 3 else 0.0)}, PROMPT, new_tokens=1, rounds=3)["slow"]
    assert speed.prefill > 16

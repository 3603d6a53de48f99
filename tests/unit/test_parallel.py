import threading

import pytest
import torch

import llmcompress
from llmcompress.parallel import side_by_side
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_items_run_at_once_and_come_back_in_order(two_threads):
    both = threading.Barrier(2, timeout=30)

    def work(item):
        if item < 2:
            both.wait()  # breaks if one waits alone
        return item * 10, torch.get_num_threads()

    assert side_by_side(work, range(5), CPU) == [(10 * item, 1) for item in range(5)]
    assert torch.get_num_threads() == 2


def test_the_first_failure_is_raised_and_threads_are_given_back(two_threads):
    def work(item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        side_by_side(work, range(3), CPU)
    assert torch.get_num_threads() == 2


def test_a_gpu_and_a_single_item_take_the_caller_s_own_thread(two_threads):
    for items, device in (([1], CPU), ([1, 2], torch.device("cuda"))):
        assert set(side_by_side(lambda _: threading.get_ident(), items, device)) == {threading.get_ident()}


@pytest.mark.parametrize("method", ["svd_llm", "cospadi", "kfac_svd"])
def test_a_model_compressed_in_threads_is_the_same_each_time_and_as_without(two_threads, method):
    tokens = torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(0))

    def weights(threads):
        torch.set_num_threads(threads)
        model = llmcompress.compress(tiny_model(), tokens=tokens, method=method, ratio=0.3)
        return {name: tensor.double() for name, tensor in model.state_dict().items()}, model(tokens).logits

    first, logits = weights(2)
    again, _ = weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.testing.assert_close(weights(1)[1], logits, rtol=1e-3, atol=1e-3)

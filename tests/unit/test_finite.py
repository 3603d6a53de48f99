import pytest
import torch

from llmcompress.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_no_number_is_found_anywhere(dtype, value):
    x = torch.full((50, 70), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x)
    for place in (0, 1234, x.numel() - 1):
        broken = x.clone()
        broken.view(-1)[place] = value
        assert not all_finite(broken)
        assert not all_finite(broken.T)


def test_nothing_holds_nothing_else():
    assert all_finite(torch.empty(0, 3))

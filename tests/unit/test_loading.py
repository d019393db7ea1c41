"""Checks of tensors while a checkpoint is loaded."""

from __future__ import annotations

import pytest
import torch

from models.loading import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 517, 999])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype, bad, at):
    x = torch.linspace(-3, 3, 1000, dtype=dtype).view(10, 10, 10)
    assert is_finite(x)
    x.view(-1)[at] = bad
    assert not is_finite(x)


def test_the_largest_numbers_of_a_type_and_no_numbers_at_all_are_finite():
    assert is_finite(torch.full((3,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16))
    assert is_finite(torch.empty(0))

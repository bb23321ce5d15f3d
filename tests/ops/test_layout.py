"""Memory formats and element orders, on which all backends agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resfuse.layout import ordered_like, residual_for


@pytest.mark.parametrize(
    ("other", "copied"),
    [
        (torch.randn(2, 4, 3, 5), False),
        (torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last), True),
        (torch.randn(2, 4, 3, 10)[..., ::2], True),
        (torch.randn(2, 1, 1, 5).expand(2, 4, 3, 5), True),
    ],
)
def test_operands_get_the_layout_of_the_result(other: Tensor, copied: bool) -> None:
    target = torch.empty(2, 4, 3, 5)
    matched = ordered_like(other, target)
    assert (matched is not other) is copied
    assert matched.stride() == target.stride()
    assert torch.equal(matched, other)


def test_the_stride_of_a_single_element_does_not_matter() -> None:
    pooled = torch.randn(2, 4, 1, 1)
    same = torch.empty_strided((2, 4, 1, 1), (4, 1, 99, 7))
    assert ordered_like(same, pooled) is same


def test_a_residual_of_fewer_channels_is_placed_in_the_output() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        output = torch.full((2, 5, 3, 4), torch.nan).contiguous(memory_format=memory_format)
        residual = torch.randn(2, 3, 3, 4)
        placed = residual_for(output, residual)
        assert placed is output
        assert torch.equal(output[:, :3], residual)
        assert not output[:, 3:].any()
    assert residual_for(output, None) is None

"""Parameters and multiply-adds of a network, as the papers count them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


class Complexity(NamedTuple):
    """Size and work of a network."""

    parameters: int
    """Number of elements of its parameters; shared ones count once."""
    multiply_adds: int
    """Multiply-adds of the convolutions and linear layers for one input; the papers call them FLOPs."""


def complexity(model: nn.Module, input_shape: tuple[int, ...] = (3, 224, 224)) -> Complexity:
    """Parameters of a network, and multiply-adds of its convolutions and linear layers for one input.

    Nothing is computed: the model runs once, in `eval()`, on the meta device.  The model itself may be on any device,
    meta included, and is left unchanged.

    Args:
        model: any module with one input.
        input_shape: of one input, without the batch: (C, H, W) for an image.

    Returns:
        Both counts.

    Source: the counts of He et al. 2016 (arXiv:1512.03385), table 1 and section 4.2.

    Example:
        >>> complexity(nn.Conv2d(3, 8, 1), (3, 4, 4))
        Complexity(parameters=32, multiply_adds=384)
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    state = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, state, (torch.empty(1, *input_shape, device="meta"),))
    finally:
        for module, training in modes:
            module.training = training
    return Complexity(parameters, counter.get_total_flops() // 2)

"""Random convolutions of the cpu backend, held against float64.

`python -m tests.backends.cpu.random_convolutions SEED COUNT DTYPE` runs them in a process of its own: with another
instruction set, or a sanitizer.
"""

from __future__ import annotations

import ctypes
import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse.backends import cpu_kernels, reference
from resfuse.types import Convolution
from tests.contract import EAGER, FUSED, Call, assert_within_contract, forward, term_sizes


def fused(call: Call) -> Tensor:
    with torch.no_grad(), resfuse.use_backend("cpu"):
        return forward(FUSED, call)


def random_call(rng: random.Random, dtype: torch.dtype) -> Call:
    """Any convolution that PyTorch takes, small enough to be quick."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kernel = rng.choice(((1, 1), (1, 1), (3, 3), (3, 3), (3, 3), (7, 7), (5, 1), (2, 3), (1, 4)))
    stride = rng.choice(((1, 1), (1, 1), (2, 2), (1, 2), (3, 2)))
    dilation = rng.choice(((1, 1), (1, 1), (1, 1), (2, 2), (1, 3)))
    padding = rng.choice(((0, 0), (kernel[0] // 2, kernel[1] // 2), (kernel[0] // 2, kernel[1] // 2), (2, 1)))
    groups = rng.choice((1, 1, 1, 1, 2, 4, 8, 32))
    per_group = rng.choice((1, 2, 3, 4, 8, 16)) if groups > 1 else rng.choice((1, 3, 8, 16, 17, 32, 48, 64, 128, 300))
    filters = groups * (
        rng.choice((1, 2, 4, 5, 8, 16, 20)) if groups > 1 else rng.choice((1, 5, 8, 16, 24, 32, 40, 64, 96, 130))
    )
    batch = rng.choice((1, 1, 2, 3))
    size = []
    for axis in (0, 1):
        # PyTorch's own convolution crashes on inputs narrower than the stride (torch 2.11), so none are drawn.
        least = max(stride[axis], dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis])
        size.append(max(least, rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 20, 28, 29, 33))))
    input = layout(rng, randn(batch, groups * per_group, *size).to(dtype) + rng.choice((0, 0, 1, 10)))
    conv_weight = randn(filters, per_group, *kernel) * (per_group * kernel[0] * kernel[1]) ** -0.5
    conv_weight = layout(rng, conv_weight.to(dtype))
    conv_bias = rng.choice((None, randn(filters).to(dtype)))
    settings = (stride, padding, dilation, groups)
    z = F.conv2d(input.double(), conv_weight.double(), None if conv_bias is None else conv_bias.double(), *settings)
    vectors = torch.float32 if rng.random() < 0.6 else dtype
    mean = (z.mean((0, 2, 3)) + 0.3 * randn(filters)).to(vectors)  # of one pixel it would leave nothing but rounding
    var = (z.var((0, 2, 3), correction=0) + rng.choice((0.01, 1.0))).to(vectors)
    residual = None
    if rng.random() < 0.5:
        channels = filters if rng.random() < 0.7 else rng.randint(1, filters)
        residual = layout(rng, randn(batch, channels, *z.shape[2:]).to(dtype))
    tensors = {
        "input": input, "conv_weight": conv_weight, "running_mean": mean, "running_var": var,
        "weight": rng.choice((None, randn(filters).to(vectors))),
        "bias": rng.choice((None, randn(filters).to(vectors))),
        "conv_bias": conv_bias, "residual": residual,
    }  # fmt: skip
    options = {
        "activation": rng.choice(("relu", "relu", "identity")), "eps": rng.choice((1e-5, 1e-3)), "stride": stride,
        "padding": padding, "dilation": dilation, "groups": groups,
        "pad_residual": residual is not None and residual.shape[1] < filters,
    }  # fmt: skip
    return Call("conv_bn_act", tensors, options)


def layout(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    match rng.choice(("nhwc", "nhwc", "nchw", "sliced", "transposed")):
        case "nhwc":
            return tensor.contiguous(memory_format=torch.channels_last)
        case "nchw":
            return tensor.contiguous()
        case "sliced":
            n, c, h, w = tensor.shape
            room = tensor.new_zeros(n, h, w + 1, c + 3).permute(0, 3, 1, 2)
            return room[:, 1 : c + 1, :, 1:].copy_(tensor)
        case _:
            return tensor.permute(2, 1, 3, 0).contiguous().permute(3, 1, 0, 2)


def check(call: Call) -> None:
    """Hold the result against the contract, by eager in both memory formats."""
    formats = (torch.contiguous_format, torch.channels_last)
    eager = [
        forward(EAGER, call.map(lambda t: t.contiguous(memory_format=form) if t.dim() == 4 else t))  # noqa: B023
        for form in formats
    ]
    found, exact = fused(call), forward(EAGER, call.truth())
    shapes = {name: (tuple(t.shape), t.stride(), t.dtype) for name, t in call.tensors.items() if t is not None}
    terms = {"output": term_sizes(call, torch.zeros_like(exact))["output"]}
    try:
        assert_within_contract(
            {"output": found}, [{"output": each} for each in eager], {"output": exact}, call.input.dtype, terms
        )
    except AssertionError as error:
        raise AssertionError(f"{shapes}, {call.options}: {error}") from error
    assert torch.equal(found, fused(call)), f"{shapes}, {call.options}: not repeatable"


def check_weight_gradient(rng: random.Random, dtype: torch.dtype) -> None:
    """Hold the own kernel, which takes any 3x3 convolution of enough pixels and whole vectors of channels."""
    channels, filters, batch = (16 * rng.randint(1, 6), 16 * rng.randint(1, 6), rng.randint(1, 9))
    padding = (rng.randint(0, 2), rng.randint(0, 2))
    size = [rng.randint(3, 20) for _ in range(2)]
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    input = torch.randn(batch, channels, *size, generator=generator) + rng.choice((0, 0, 1, 10))
    weight = layout(rng, torch.randn(filters, channels, 3, 3, generator=generator).to(dtype))
    shape = (batch, filters, *(size[axis] + 2 * padding[axis] - 2 for axis in (0, 1)))
    input, grad_output = (
        tensor.to(dtype).contiguous(memory_format=torch.channels_last)
        for tensor in (input, torch.randn(shape, generator=generator))
    )
    convolution = Convolution((1, 1), padding, (1, 1), 1)
    found = cpu_kernels.conv_weight_grad(grad_output, input, weight, cpu_kernels.conv_settings(convolution))
    tiles = batch * -(-shape[2] // 2) * -(-shape[3] // 2)
    assert (found is not None) == (tiles >= 64), (shape, weight.shape)
    if found is None:
        return

    def eager(*tensors: Tensor) -> dict[str, Tensor]:
        gradient = reference.conv_backward(*tensors, convolution, (False, True, False))[1]
        assert gradient is not None
        return {"grad_conv_weight": gradient}

    tensors = (grad_output, input, weight)
    exact, size_of_terms = (eager(*(change(t.double()) for t in tensors)) for change in (torch.clone, torch.abs))
    eagers = [eager(*tensors), eager(*(t.contiguous() for t in tensors))]
    assert_within_contract({"grad_conv_weight": found}, eagers, exact, dtype, size_of_terms)


def main(seed: int, count: int, dtype: torch.dtype) -> None:
    """Hold `count` random calls against the contract, with fresh memory that is not zero: all of it must be written."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-6, 0x80)  # M_PERTURB: what malloc returns is filled with 0x7f, which is 3.4e38
    rng = random.Random(seed)
    for _ in range(count):
        check(random_call(rng, dtype))
    for _ in range(count // 5):
        check_weight_gradient(rng, dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]))

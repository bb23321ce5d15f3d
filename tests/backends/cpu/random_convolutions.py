"""Random convolutions of the cpu backend, held against float64.

`python -m tests.backends.cpu.random_convolutions SEED COUNT DTYPE` runs them in a process of its own: with another
instruction set, or a sanitizer.
"""

from __future__ import annotations

import ctypes
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse import contract


@dataclass
class Call:
    """Tensors and settings of one conv_bn_act in inference."""

    input: Tensor
    conv_weight: Tensor
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    options: dict[str, Any]

    def fused(self) -> Tensor:
        return resfuse.conv_bn_act(
            self.input, self.conv_weight, self.running_mean, self.running_var, self.weight, self.bias, **self.options
        )

    def eager(self, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """The eager operations in `dtype`."""

        def cast(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(dtype)

        options = self.options
        settings = (options["stride"], options["padding"], options["dilation"], options["groups"])
        input = cast(self.input).contiguous(memory_format=memory_format)
        conv_weight = cast(self.conv_weight).contiguous(memory_format=memory_format)
        z = F.conv2d(input, conv_weight, cast(options["conv_bias"]), *settings)
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        if dtype == torch.float64:
            vectors = tuple(map(cast, vectors))
        output = F.batch_norm(z, *vectors, eps=options["eps"])
        residual = options["residual"]
        if residual is not None:
            output[:, : residual.shape[1]] += cast(residual)
        return output.relu() if options["activation"] == "relu" else output

    def __str__(self) -> str:
        options = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return (
            f"input {tuple(self.input.shape)} {self.input.stride()}, conv_weight {tuple(self.conv_weight.shape)} "
            f"{self.conv_weight.stride()} {self.conv_weight.dtype}, {options}"
        )


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
        least = max(1, dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis])
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
    return Call(
        input, conv_weight, mean, var,
        weight=rng.choice((None, randn(filters).to(vectors))),
        bias=rng.choice((None, randn(filters).to(vectors))),
        options={
            "conv_bias": conv_bias, "residual": residual, "activation": rng.choice(("relu", "relu", "identity")),
            "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
            "eps": rng.choice((1e-5, 1e-3)),
            "pad_residual": residual is not None and residual.shape[1] < filters,
        },
    )  # fmt: skip


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


def check(call: Call, dtype: torch.dtype) -> None:
    """Hold the result against the contract."""
    with torch.no_grad(), resfuse.use_backend("cpu"):
        found = call.fused()
        eager = [call.eager(dtype, form) for form in (torch.contiguous_format, torch.channels_last)]
        deviation = contract.measure("output", found, eager, call.eager(torch.float64), dtype)
    assert not deviation.violated, f"{call}: {deviation}"
    assert torch.equal(found, call.fused()), f"{call}: not repeatable"


def main(seed: int, count: int, dtype: torch.dtype) -> None:
    """Hold `count` random calls against the contract, with fresh memory that is not zero: all of it must be written."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-6, 0x80)  # M_PERTURB: what malloc returns is filled with 0x7f, which is 3.4e38
    rng = random.Random(seed)
    for _ in range(count):
        check(random_call(rng, dtype), dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]))

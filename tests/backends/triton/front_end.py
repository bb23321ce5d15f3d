"""Passes kernels through Triton's front end, for test_compile.py: needs a process in which Triton does not interpret.

An integer argument that is 1 becomes a constant there, which the interpreter does not show: so the shapes have ones.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from resfuse.backends import triton
from resfuse.backends.triton import launch, plan
from resfuse.backends.triton.config import H100, ConvConfig
from resfuse.types import BatchNorm, Convolution
from tools.kernel_resources import pointwise_specs, source

SPLIT = ConvConfig(64, 16, 32, 4, 2, split_k=2)
# (input, output channels, kernel, stride, configuration)
CONVOLUTIONS = [
    ((1, 64, 1, 1), 64, 1, 1, SPLIT),  # one output pixel
    ((1, 2048, 3, 3), 512, 3, 2, None),  # DeepLab's pooled branch, ResNets on 32x32 images
    ((1, 1, 1, 1), 1, 1, 1, None),
    ((2, 1, 1, 1), 1, 1, 1, None),
    ((1, 1, 7, 7), 1, 3, 2, None),
    ((1, 64, 1, 9), 1, 3, 1, None),
    ((1, 3, 9, 1), 64, 7, 2, None),
    ((1 << 15, 1, 1, 3), 1, 3, 2, None),  # padded
    ((1, 3, 512, 512), 1, 7, 2, None),
    ((1, 64, 28, 28), 64, 1, 1, ConvConfig(64, 16, 32, 4, 2, persistent=True)),
]
ACTIVATIONS = [(1, 1, 1, 2), (2, 64, 1, 1)]


def meta(*shape: int, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=memory_format)


def collect() -> list[launch.KernelSpec]:
    """Each kernel that the shapes launch, once per specialisation."""
    with launch.collected(H100) as specs:
        for (n, c, h, w), channels, kernel, stride, config in CONVOLUTIONS:
            convolution = Convolution((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
            x, weight, v = meta(n, c, h, w), meta(channels, c, kernel, kernel), torch.empty(channels, device="meta")
            for training in (False, True):
                with plan.forced("forward", config):
                    bn = BatchNorm(v, v, v, v, training, 0.1, 1e-5)
                    output, *_ = triton.conv_bn_act_forward(x, weight, v, convolution, bn, None, False)
                    triton.conv_bn_act_forward(x, weight, None, convolution, bn, torch.empty_like(output), True)
    for shape, memory_format in itertools.product(ACTIVATIONS, (torch.channels_last, torch.contiguous_format)):
        specs += pointwise_specs(meta(*shape, memory_format=memory_format), H100)
    return list({str(spec._replace(grid=())): spec for spec in specs}.values())


def main() -> int:
    failed, target = 0, GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    specs = collect()
    for spec in specs:
        options = backend.parse_options(dict(spec.options))
        codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        try:
            source(spec).make_ir(target, options, codegen, modules, context)
        except Exception as error:
            failed += 1
            print(f"{spec}: {error}", file=sys.stderr)
    print(len(specs), *sorted({spec.name for spec in specs}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

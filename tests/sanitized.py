"""The program that compute-sanitizer watches: `python -m tests.sanitized cuda` launches every kernel on small problems.

`python -m tests.sanitized triton bfloat16 float32` does so for Triton's kernels, in two of the three dtypes.

No PyTorch kernel of any size runs beside them: tensors are made on the CPU, and convolutions' gradients, which are
cuDNN's, are left out.  It looks only for what is not finite; numbers are held to the contract elsewhere.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from resfuse.backends import cuda, cuda_conv, dispatch
from tests import shapes, split
from tests.contract import Call, to_device
from tests.shapes import ACTIVATIONS, CONVOLUTIONS, Convolution, add_relu_call, bn_act_call, conv_bn_act_call

LAYOUTS = ("nchw", "nhwc", "nhwc_misaligned")
SHAPES = ("typical", "odd_channels", "one_pixel", "one_image", "many_channels")
RAGGED = Convolution((2, 72, 9, 8), 136, (3, 3), padding=(1, 1))
"""Several of every tile, the last of them not full."""


def problems(dtype: torch.dtype) -> Iterator[tuple[str, Call, cuda_conv.ConvConfig | None]]:
    """(name, call, configuration of its convolution), on the CPU."""
    for shape, layout in itertools.product(map(ACTIVATIONS.__getitem__, SHAPES), LAYOUTS):
        yield f"add_relu {shape} {layout}", add_relu_call(shape, dtype, layout=layout), None
        for training, residual in ((True, "nhwc"), (False, None)):
            call = bn_act_call(shape, dtype, layout=layout, residual_layout=residual, training=training)
            yield f"bn_act {shape} {layout} {training=}", call, None
    for (name, conv), training in itertools.product(CONVOLUTIONS.items(), (True, False)):
        yield f"conv_bn_act {name} {training=}", conv_bn_act_call(conv, dtype, layout="nhwc", training=training), None
    for tile, (training, splits), launches in itertools.product(
        cuda_conv.TILES, ((True, 1), (False, 1), (False, 3)), (0, 2)
    ):
        config = cuda_conv.ConvConfig(*tile, splits, launches)
        yield f"conv_bn_act {config} {training=}", conv_bn_act_call(RAGGED, dtype, training=training), config


def run(backend: str, call: Call) -> Iterable[Tensor | None]:
    """Forward and the fused part of backward, by the kernel API."""
    kernels, t = dispatch.backend(backend), call.tensors
    if call.op == "add_relu":
        output = kernels.add_relu_forward(t["input"], t["residual"])
        return output, kernels.add_relu_backward(output, output)
    bn, training = call.batch_norm, call.batch_norm.training
    if call.op == "bn_act":
        residual = t.get("residual")
        output, mean, invstd = kernels.bn_act_forward(t["input"], bn, residual, True)
        z, parts = t["input"], []
        if training and len(call.input) > 1 and residual is not None:
            parts = [*split.results(backend, call, output, [slice(0, 1), slice(1, None)]).values()]
    else:
        output, z, mean, invstd = kernels.conv_bn_act_forward(
            t["input"], t["conv_weight"], None, call.convolution, bn, t["residual"], True
        )
        parts = []
    if mean is None or invstd is None:
        mean, invstd = bn[:2]
        z = z if z is not None else output
    grads = kernels.bn_act_backward(output, z, output, bn.weight, mean, invstd, training, True, True)
    return output, *grads, *bn[:2], *parts


def main(backend: str, dtypes: Iterable[torch.dtype] = cuda.DTYPES) -> int:
    reason = dispatch.backend(backend).unavailable_reason()
    if reason is not None:
        print(reason)
        return 2
    device, count = shapes.devices_of(backend)[0], 0
    for dtype in dtypes:
        for name, call, config in problems(dtype):
            if config is not None and backend == "triton":
                continue  # the configurations are those of csrc's kernels
            there = call.map(lambda tensor: to_device(tensor, device))
            # Of float32 the configured convolutions are TF32's: the others have the loops of IEEE.
            torch.backends.cudnn.conv.fp32_precision = "ieee" if config is None else "tf32"  # type: ignore[attr-defined]
            with cuda_conv.use_config(config):
                results = run(backend, there)
            finite = all(tensor is None or tensor.cpu().isfinite().all() for tensor in results)
            assert finite, f"{name} in {dtype}"
            count += 1
    print(f"{count} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]] or cuda.DTYPES))

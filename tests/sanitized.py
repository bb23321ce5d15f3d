"""What compute-sanitizer watches: `python -m tests.sanitized cuda` launches every kernel on small, odd problems.

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

from resfuse.backends import cuda_conv, registry
from tests import shapes, split
from tests.contract import Call
from tests.shapes import ACTIVATIONS, CONVOLUTIONS, Convolution, add_relu_call, bn_act_call, conv_bn_act_call

LAYOUTS = ("nchw", "nhwc", "nhwc_misaligned")
SHAPES = ("typical", "odd_channels", "one_pixel", "one_image", "many_channels")
RAGGED = Convolution((2, 72, 9, 8), 136, (3, 3), padding=(1, 1))
"""Of every tile several, the last of them not full."""


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
    """Forward and what is fused of backward, by the verbs."""
    verbs, t = registry.backend(backend), call.tensors
    if call.op == "add_relu":
        output = verbs.add_relu_forward(t["input"], t["residual"])
        return output, verbs.add_relu_backward(output, output)
    running = t["running_mean"], t["running_var"]
    training, vectors = bool(call.options["training"]), (t["weight"], t["bias"])
    if call.op == "bn_act":
        residual = t.get("residual")
        output, mean, invstd = verbs.bn_act_forward(t["input"], *running, *vectors, residual, True, training, 0.1, 1e-5)
        z, parts = t["input"], []
        if training and len(call.input) > 1 and residual is not None:
            parts = [*split.results(backend, call, output, [slice(0, 1), slice(1, None)]).values()]
    else:
        conv = (call.options[name] for name in ("stride", "padding", "dilation", "groups"))
        output, z, mean, invstd = verbs.conv_bn_act_forward(
            t["input"], t["conv_weight"], *running, *vectors, None, t["residual"], True, *conv, training, 0.1, 1e-5
        )
        parts = []
    if mean is None or invstd is None:
        mean, invstd = running
        z = z if z is not None else output
    grads = verbs.bn_act_backward(output, z, output, vectors[0], mean, invstd, training, True, True)
    return output, *grads, *running, *parts


def main(backend: str, dtypes: Iterable[torch.dtype] = cuda_conv.DTYPES) -> int:
    reason = registry.backend(backend).unavailable_reason()
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


def to_device(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides and the same distance to an aligned address."""
    room = torch.empty(tensor.storage_offset() + extent(tensor), dtype=tensor.dtype, device=device)
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]] or cuda_conv.DTYPES))

"""Operations written down by hand, one by one and for a whole network, and what they cost on an H200."""

from __future__ import annotations

from typing import Any

import torch

from resfuse import costs
from resfuse.backends import triton
from resfuse.costs import Cost, Device, Operation, TensorInfo

H200 = costs.describe("h200")
BF16 = torch.bfloat16
BACKENDS = ["cuda", "cpu", "reference"]
if triton.import_failure() is None:
    BACKENDS.append("triton")
ON_GPUS = [name for name in BACKENDS if name in ("cuda", "triton")]


def info(*shape: int, dtype: torch.dtype = BF16) -> TensorInfo:
    return TensorInfo(shape, dtype)


def forward(operation: Operation, backend: str | None = None, training: bool = False, device: Device = H200) -> Cost:
    return costs.forward_cost(operation, training=training, backend=backend, device=device)


def backward(operation: Operation, backend: str | None = None, training: bool = True, device: Device = H200) -> Cost:
    return costs.backward_cost(operation, training=training, backend=backend, device=device)


class ResNet50:
    """The operations of ResNet-50 v1.5 at 224 x 224, as a trace would have them."""

    def __init__(self, batch: int, fused: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        self.operations: list[Operation] = []
        self.fused, self.dtype = fused, dtype
        x = self.layer("conv1", self.info(batch, 3, 224, 224), 64, 7, 2, first=True)
        x = self.add("maxpool", "max_pool2d", (x,), self.info(batch, 64, 56, 56))
        for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            for block in range(blocks):
                path, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
                y = self.layer(f"{path}.conv1", x, width, 1)
                y = self.layer(f"{path}.conv2", y, width, 3, stride)
                if not block:
                    x = self.layer(f"{path}.downsample", x, 4 * width, 1, stride, relu=False)
                x = self.layer(f"{path}.conv3", y, 4 * width, 1, residual=x)
        x = self.add("avgpool", "adaptive_avg_pool2d", (x,), self.info(batch, 2048, 1, 1))
        x = self.add("", "flatten", (x,), self.info(batch, 2048))
        self.add("fc", "linear", (x,), self.info(batch, 1000), (self.info(1000, 2048), self.info(1000)))

    def info(self, *shape: int) -> TensorInfo:
        return TensorInfo(shape, self.dtype)

    def add(self, path: str, name: str, inputs: tuple[TensorInfo, ...], output: TensorInfo, parameters: tuple[TensorInfo, ...] = (), **options: Any) -> TensorInfo:  # fmt: skip  # noqa: E501
        self.operations.append(Operation(path, name, inputs, parameters, output, options))
        return output

    def layer(
        self, path: str, x: TensorInfo, filters: int, kernel: int, stride: int = 1,
        residual: TensorInfo | None = None, relu: bool = True, first: bool = False,
    ) -> TensorInfo:  # fmt: skip
        batch, channels, height, width = x.shape
        z = self.info(batch, filters, height // stride, width // stride)
        weight = self.info(filters, channels, kernel, kernel)
        vectors = (TensorInfo((filters,), torch.float32),) * 4  # as autocast leaves them
        options = {"stride": stride, "padding": kernel // 2, "needs_input_grad": not first}
        residuals = () if residual is None else (residual,)
        if self.fused:
            return self.add(path, "conv_bn_act", (x, *residuals), z, (weight, *vectors), relu=relu, **options)
        self.add(path, "conv2d", (x,), z, (weight,), **options)
        self.add(path, "batch_norm", (z,), z, vectors)
        if residual is not None:
            self.add(path, "add", (z, residual), z)
        if relu:
            self.add(path, "relu", (z,), z, inplace=True)
        return z

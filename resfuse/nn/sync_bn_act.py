"""SyncBNAct2d: a SyncBatchNorm that applies the activation, and can add a residual, in the same pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resfuse.nn.batch_norm import BatchNormKind
from resfuse.nn.fused_call import NormCall
from resfuse.nn.lazy import add_, call, evaluated


class SyncBNAct2d(nn.SyncBatchNorm):
    """The result of `SyncBatchNorm.convert_sync_batchnorm` on a `BNAct2d`; see `resfuse.functional.sync_bn_act`.

    In `train()`, with several processes, statistics are taken over the process group; otherwise it behaves as a
    `BNAct2d`.  Unlike its base class it also runs on CPUs.

    Shapes: input and residual (N, num_features, H, W); output the same, in the layout of input.

    Equivalent to::

        output = batch_norm(input)                     # torch.nn.SyncBatchNorm(num_features, ...)
        output = output if residual is None else output + residual
        output = act(output)                           # torch.nn.ReLU() or torch.nn.Identity()

    Source: the documentation of `torch.nn.SyncBatchNorm`.
    """

    act: nn.Module

    @evaluated
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        output = call(NormCall(self, BatchNormKind(synchronised=True)), input)
        return call(self.act, output if residual is None else add_(output, residual))

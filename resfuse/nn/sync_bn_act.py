"""SyncBNAct2d: a SyncBatchNorm that applies the activation, and can add a residual, in the same pass."""

from __future__ import annotations

from torch import Tensor, nn

from resfuse.nn.batch_norm import BatchNormKind, register_kind
from resfuse.nn.fused_call import activation_of, own_bn_act, synchronised_forward


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

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        activation = activation_of(self.act)
        output = own_bn_act(self, input, residual, activation or "identity", _KIND)
        if output is None:
            output = synchronised_forward(self, input)
            if residual is not None:
                output += residual
        elif activation is not None:
            return output
        return self.act(output)


_KIND = BatchNormKind(activated=True, synchronised=True)
register_kind(SyncBNAct2d, _KIND)

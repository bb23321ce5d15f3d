"""BNAct2d: a BatchNorm2d that applies the activation, and can add a residual, in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from resfuse.nn.batch_norm import BatchNormKind
from resfuse.nn.fused_call import NormCall
from resfuse.nn.lazy import add_, call, evaluated
from resfuse.nn.sync_bn_act import SyncBNAct2d


def make_activation(activation: str) -> nn.Module:
    """The module for "relu" or "identity"."""
    if activation not in ("relu", "identity"):
        raise ValueError(f'activation: expected "relu" or "identity", got {activation!r}')
    return nn.ReLU(inplace=True) if activation == "relu" else nn.Identity()


class BNAct2d(nn.BatchNorm2d):
    """Batch normalisation, an optional residual, and the activation, fused; see `resfuse.bn_act`.

    Subclasses `torch.nn.BatchNorm2d`: the same arguments, attributes and state_dict keys, and code that looks for
    batch norms finds it.  `SyncBatchNorm.convert_sync_batchnorm` turns it into a SyncBatchNorm with the activation.

    Shapes: input and residual (N, num_features, H, W); output the same, in the layout of input.

    Equivalent to::

        output = batch_norm(input)                     # torch.nn.BatchNorm2d(num_features, ...)
        output = output if residual is None else output + residual
        output = act(output)                           # torch.nn.ReLU() or torch.nn.Identity()

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for `torch.nn.BatchNorm2d`.
        activation: "relu" or "identity".

    Raises:
        ValueError: `activation` is unknown.  When called, whatever `resfuse.bn_act` raises.

    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), and the documentation of `torch.nn.BatchNorm2d`.

    Example:
        >>> norm = BNAct2d(8)
        >>> input = torch.randn(2, 8, 5, 5)
        >>> norm(input, residual=input).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.act = make_activation(activation)
        # convert_sync_batchnorm copies children to the module it makes, so the activation is a child, and marked.
        self.act._resfuse_activation = True  # type: ignore[assignment]
        _follow_sync_conversion()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _follow_sync_conversion()

    @evaluated
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        output = call(NormCall(self, BatchNormKind()), input)
        return call(self.act, output if residual is None else add_(output, residual))


_following = False


def _follow_sync_conversion() -> None:
    """Install the hook that follows `convert_sync_batchnorm`, once per process, with the first BNAct2d."""
    global _following
    if not _following:
        _following = True
        register_module_module_registration_hook(_on_registration)


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if type(module) is nn.SyncBatchNorm and name == "act" and hasattr(child, "_resfuse_activation"):
        module.__class__ = SyncBNAct2d

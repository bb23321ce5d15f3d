"""The numerical contract: a fused operation is never noticeably less accurate than the eager ones it replaces.

With ref the eager computation in float64 on the same (already rounded) inputs and E(t) = ||t - ref|| / ||ref||, every
output, gradient and running statistic satisfies

    E(fused) <= 1.5 E(eager) + floor    and    max|fused - ref| <= 2 max|eager - ref| + tiny,

where eager computes in the dtype of the fused operation, floor depends on that dtype, and tiny is floor, or half a unit
in the last place if that is more, times the largest value.

PyTorch's own accuracy depends on the memory format: the error of oneDNN's float32 3x3 convolution is twice as large in
channels_last as in NCHW.  A fused operation may choose its format, so several eager results can be given; the least
accurate one sets the bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FACTOR = 1.5
ELEMENT_FACTOR = 2.0
FLOORS = {torch.float64: 1e-15, torch.float32: 1e-7, torch.float16: 2e-4, torch.bfloat16: 1e-3}
TF32_FLOOR = 2e-4

# A larger eager error is not rounding (torch's bfloat16 weight gradient on the CPU can be uninitialised memory); it is
# then replaced by that of a single rounding.
_GARBAGE = 0.5


class ContractError(AssertionError):
    """A result cannot be compared: it has another shape than the reference."""


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Errors of a fused and of the eager result against float64, and the limit of the fused one.

    `fused`, `eager` and `limit` are relative, by the norm; those with `_max` are absolute, of the worst element.
    """

    quantity: str
    fused: float
    eager: float
    limit: float
    fused_max: float
    eager_max: float
    limit_max: float

    @property
    def used(self) -> float:
        """Fraction of the limit that is used, by the norm or by the worst element; more than 1 is a violation."""
        return max(_ratio(self.fused, self.limit), _ratio(self.fused_max, self.limit_max))

    @property
    def violated(self) -> bool:
        return not self.used <= 1

    def __str__(self) -> str:
        return (
            f"{self.quantity}: E(fused) {self.fused:.2e} (limit {self.limit:.2e}, eager {self.eager:.2e}), "
            f"worst element {self.fused_max:.2e} (limit {self.limit_max:.2e}, eager {self.eager_max:.2e})"
        )


def floor_of(dtype: torch.dtype, device: torch.device | str = "cpu", *, convolution: bool = False) -> float:
    """The contract's floor; a float32 convolution on a GPU that may use TF32 has TF32's."""
    return TF32_FLOOR if _uses_tf32(dtype, device, convolution) else FLOORS[dtype]


def rounding_of(dtype: torch.dtype, device: torch.device | str = "cpu", *, convolution: bool = False) -> torch.dtype:
    """The dtype that has the precision of a computation, for `decided_by_rounding`: TF32 rounds as float16 does."""
    return torch.float16 if _uses_tf32(dtype, device, convolution) else dtype


def relative_error(tensor: Tensor, reference: Tensor, scale: float | None = None) -> float:
    """E(tensor) = ||tensor - reference|| / ||reference||, NaN where one is not finite.

    Args:
        tensor: any floating-point dtype.
        reference: float64, same shape.
        scale: replaces ||reference||, for a quantity that would be zero but for rounding.
    """
    error = torch.linalg.vector_norm(_difference(tensor, reference)).item()
    scale = torch.linalg.vector_norm(reference.detach()).item() if scale is None else scale
    return error if scale == 0 else error / scale


def measure(
    quantity: str,
    fused: Tensor,
    eager: Tensor | Sequence[Tensor],
    reference: Tensor,
    dtype: torch.dtype,
    *,
    floor: float | None = None,
    scale: float | None = None,
) -> Deviation:
    """Compare a fused result with the contract.

    Args:
        quantity: its name, for messages.
        fused: the result under test.
        eager: PyTorch's own result, or one per memory format.
        reference: the result in float64.
        dtype: of both computations (results such as statistics may be wider).
        floor: of the contract; that of `dtype` if None.
        scale: see `relative_error`.
    """
    floor = FLOORS[dtype] if floor is None else floor
    rounding = torch.finfo(dtype).eps / 2
    largest = _largest(reference) if scale is None else scale
    eagers = [eager] if isinstance(eager, Tensor) else eager
    error = max(_credit(relative_error(tensor, reference, scale), 1, rounding) for tensor in eagers)
    error_max = max(_credit(_largest(_difference(tensor, reference)), largest, rounding) for tensor in eagers)
    return Deviation(
        quantity,
        fused=relative_error(fused, reference, scale),
        eager=error,
        limit=FACTOR * error + floor,
        fused_max=_largest(_difference(fused, reference)),
        eager_max=error_max,
        limit_max=ELEMENT_FACTOR * error_max + max(floor, rounding) * largest,
    )


def check(
    quantity: str,
    fused: Tensor,
    eager: Tensor | Sequence[Tensor],
    reference: Tensor,
    dtype: torch.dtype,
    **options: Any,
) -> Deviation:
    """`measure`, and raise ContractError where the contract is broken."""
    deviation = measure(quantity, fused, eager, reference, dtype, **options)
    if deviation.violated:
        raise ContractError(str(deviation))
    return deviation


def decided_by_rounding(preactivation: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask of the elements whose ReLU gate depends on rounding in `dtype`: their gradients have no bound.

    Args:
        preactivation: the ReLU's argument, in float64.
        dtype: of the computation under test.

    Returns:
        A boolean mask; set grad_output to zero there before comparing gradients.
    """
    return preactivation.abs() <= 4 * torch.finfo(dtype).eps * _largest(preactivation)


def _credit(error: float, scale: float, rounding: float) -> float:
    return error if error < _GARBAGE * scale else rounding * scale


def _difference(tensor: Tensor, reference: Tensor) -> Tensor:
    if tensor.shape != reference.shape:
        raise ContractError(f"shape {tuple(tensor.shape)}, expected {tuple(reference.shape)}")
    return tensor.detach().to(device=reference.device, dtype=torch.float64) - reference.detach()


def _largest(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item() if tensor.numel() else 0.0


def _ratio(error: float, limit: float) -> float:
    """error / limit, infinite where the error is not a number (max() would lose a NaN)."""
    if math.isnan(error):
        return math.inf
    return 0.0 if error == 0 else error / limit if limit else math.inf


def _uses_tf32(dtype: torch.dtype, device: torch.device | str, convolution: bool) -> bool:
    if not convolution or dtype != torch.float32 or torch.device(device).type != "cuda":
        return False
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # torch refuses to answer where its old and its new switch were both used
        return getattr(torch.backends.cudnn, "conv").fp32_precision == "tf32"  # noqa: B009 (unknown to type checkers)
